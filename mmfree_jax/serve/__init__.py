"""Serving a model to many clients at once."""
