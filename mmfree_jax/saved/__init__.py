"""Everything on disk that holds a model."""
