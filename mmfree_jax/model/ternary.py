"""Moved to `weights.py`."""

from mmfree_jax.model.weights import linear_options, ternary_weights

__all__ = ["linear_options", "ternary_weights"]
