"""Measurements that the repository's speed and memory claims come from."""
