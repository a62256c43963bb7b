"""The tensors of an exported model: the parts of our parameters under their stored names."""

from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from mmfree_jax.errors import CheckpointError
from mmfree_jax.model.parameters import flatten
from mmfree_jax.model.weights import Master, Ternary
from mmfree_jax.model_config import ModelConfig
from mmfree_jax.pallas_kernels.packed_matmul import api as packed_matmul
from mmfree_jax.saved.tensor_names import stored_tensor, tensor_map
from mmfree_jax.saved.tensors import Slot
from mmfree_jax.saved.writing import StoredTensor

_pack = jax.jit(packed_matmul.pack)


def exported_tensors(
    config: ModelConfig, weights: Master | Ternary, dtype: Any
) -> Iterator[StoredTensor]:
    """All of them, as the authors' package names them.

    Args:
      config: of the model.
      weights: the ternary matrices of `Ternary` weights are stored at 2 bits: `packed` [N, Q] uint8
        (`packed_matmul/reference.py`) and `scale` [1] float32 in place of `weight`.
      dtype: of everything else.
    """
    leaves = flatten(weights.params)
    trits = flatten(weights.ternary) if isinstance(weights, Ternary) else {}
    for name, (slot,) in tensor_map(config).items():
        layer = slot.path.rpartition("/")[0]
        if slot.path not in leaves:
            yield from _packed(name, slot, trits[f"{layer}/trits"], trits[f"{layer}/scale"])
            continue
        leaf = leaves[slot.path]
        yield StoredTensor(name, slot.shape, dtype, lambda s=slot, x=leaf: _rounded(x, s, dtype))
    if config.short_conv and not config.share_short_conv:
        # The authors' module creates this convolution and never calls it.
        shape = (config.state_size, 1, config.short_conv)
        for i in range(config.num_layers):
            name = f"model.layers.{i}.attn.q_conv1d.weight"
            yield StoredTensor(name, shape, dtype, lambda: np.zeros(shape, dtype))


def _rounded(leaf: Any, slot: Slot, dtype: Any) -> np.ndarray:
    tensor = stored_tensor(leaf, slot)
    with np.errstate(over="ignore"):
        stored = tensor.astype(dtype)
    if not np.isfinite(stored).all():
        raise CheckpointError(
            f"{slot.path} holds values that {np.dtype(dtype)} cannot: export float32 or bfloat16, "
            "and check that the run did not diverge"
        )
    return stored


def _packed(name: str, slot: Slot, trits: Any, scale: Any) -> Iterator[StoredTensor]:
    stem = name.removesuffix(".weight")
    rows, columns = slot.shape
    shape = (rows, packed_matmul.packed_columns(columns))
    at = ... if slot.layer is None else slot.layer
    yield StoredTensor(f"{stem}.packed", shape, np.uint8, lambda: np.asarray(_pack(trits[at])))
    yield StoredTensor(
        f"{stem}.scale", (1,), np.float32, lambda: np.asarray(scale[at], np.float32).reshape(1)
    )
