"""How many rows fit on the devices, and arrays onto them and back.

Shapes: B rows.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from mmfree_jax.errors import CheckpointError
from mmfree_jax.model_config import ModelConfig
from mmfree_jax.parallel.sharding import row_sharding

# Positions of each row whose logits are held at once.
HEAD_POSITIONS = 8
# Memory for activations where the device does not say how much it has (bytes): on a CPU,
# batches beyond the caches are no faster.
_DEFAULT_MEMORY = 256 * 2**20
_MOST_ROWS, _MOST_ROWS_CPU = 256, 32


def batch_rows(
    config: ModelConfig,
    mesh: Mesh | None,
    length: int,
    batch_tokens: int | None = None,
    limits: tuple[int, int] | None = None,
) -> int:
    """Rows of `length` tokens to read at once.

    Args:
      config: of the model.
      mesh: whose devices share the batch; None: one device.
      length: tokens.
      batch_tokens: to stay within; None: by the devices' free memory.
      limits: that memory (bytes) and the most rows of one device; None: looked up.
    """
    devices = 1 if mesh is None else mesh.shape["data"] * mesh.shape["fsdp"]
    memory, most = limits or free_memory(mesh)
    if batch_tokens is not None:
        fitting = batch_tokens // (length * devices)
    else:
        fitting = memory // _bytes_per_row(config, length)
    return devices * min(most, 1 << (max(1, fitting).bit_length() - 1))


def free_memory(mesh: Mesh | None) -> tuple[int, int]:
    """Bytes for one batch's activations, half of what the fullest device has left; most rows."""
    devices = [jnp.zeros(()).devices().pop()] if mesh is None else list(mesh.local_devices)
    free = []
    for device in devices:
        stats = device.memory_stats() or {}
        if "bytes_limit" in stats:
            free.append((stats["bytes_limit"] - stats.get("bytes_in_use", 0)) // 2)
    if not free:
        return _DEFAULT_MEMORY, _MOST_ROWS_CPU
    return min(free), _MOST_ROWS


def _bytes_per_row(config: ModelConfig, length: int) -> int:
    """What a row of `length` tokens takes at the largest moment of a forward pass, about."""
    size = jnp.dtype(config.compute_dtype).itemsize
    width, inner = config.hidden_size, config.glu_size
    layer = size * (6 * width + 3 * inner) + 4 * 4 * max(width, config.state_size)
    # Logits, and twice as much in their softmax.
    return length * 2 * layer + HEAD_POSITIONS * 3 * 4 * config.vocab_size


def put_batch(mesh: Mesh | None, *arrays: np.ndarray) -> tuple[jax.Array, ...]:
    """Arrays [B, ...] on the devices that share a batch."""
    if mesh is None:
        return tuple(jnp.asarray(a) for a in arrays)
    sharding = row_sharding(mesh)
    return tuple(
        jax.make_array_from_callback(a.shape, sharding, lambda i, a=a: a[i]) for a in arrays
    )


def replicate(x: np.ndarray, mesh: Mesh | None) -> jax.Array:
    """An array on every device of `mesh`."""
    if mesh is None:
        return jnp.asarray(x)
    return jax.make_array_from_callback(x.shape, NamedSharding(mesh, P()), lambda i: x[i])


def to_host(*arrays: jax.Array) -> tuple[np.ndarray, ...]:
    """Whole arrays on every process."""
    if any(not x.is_fully_addressable for x in arrays):
        from jax.experimental import multihost_utils

        arrays = multihost_utils.process_allgather(arrays, tiled=True)
    return tuple(np.asarray(x) for x in arrays)


def check_finite(values: np.ndarray) -> None:
    """Refuses what is no log-probability: NaN is neither above nor below another, but argmax
    finds it, so that an answer would count as chosen.

    Args:
      values: log-probabilities, or sums of them.

    Raises:
      CheckpointError: some are not finite.
    """
    if not np.isfinite(values).all():
        raise CheckpointError(
            "the model's logits are not finite: its weights are damaged, or its values too large "
            "for the compute dtype (set --compute-dtype float32)"
        )
