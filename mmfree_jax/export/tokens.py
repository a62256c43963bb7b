"""The token ids that an exported model is given. Nothing here imports JAX."""

from typing import Any

import numpy as np

from mmfree_jax.errors import DataError


def check_tokens(tokens: Any, vocabulary: int) -> Any:
    """The ids as an array; refuses what a runtime would cut to another id, or count from the end.

    Args:
      tokens: [B, T] whole numbers. Of an array on a device the values are not looked at, which
        would wait for them.
      vocabulary: of the model.

    Raises:
      DataError: they are not of that shape, no whole numbers, or ids that the model does not have.
    """
    found = tokens if hasattr(tokens, "addressable_shards") else np.asarray(tokens)
    if found.ndim != 2 or not found.size:
        raise DataError(f"tokens has the shape {found.shape}: give [rows, tokens], none of them 0")
    if not np.issubdtype(found.dtype, np.integer):
        raise DataError(f"tokens is of {found.dtype}: give whole numbers")
    if isinstance(found, np.ndarray) and not 0 <= found.min() <= found.max() < vocabulary:
        wrong = found.min() if found.min() < 0 else found.max()
        raise DataError(
            f"tokens has token id {wrong}: the model's ids go from 0 to {vocabulary - 1}"
        )
    return found
