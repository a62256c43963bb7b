"""Job files: a module for each platform, and what they share."""
