"""Gated linear attention: a state of outer products with a decay for each row."""
