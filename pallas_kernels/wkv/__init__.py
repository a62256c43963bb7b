"""RWKV-4's weighted average over time."""
