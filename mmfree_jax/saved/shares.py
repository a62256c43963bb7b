"""Each device's share of a state: what several devices hold alike is saved and read once.

A checkpoint is written from a copy of the shares on the devices, so that training goes on as soon
as that copy is under way, and what leaves the devices does so beside the next steps.
"""

import logging
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from mmfree_jax.parallel import processes

_log = logging.getLogger(__name__)
_SPARE = 0.05
"""Of a device's memory, left free beside a copy: what lies between blocks is no use to anyone."""


def share_sharding(sharding: Sharding, shape: tuple[int, ...]) -> Sharding:
    """`sharding` with the mesh axes that it does not use splitting dimensions too, as they divide.

    Every device's part lies within what it holds by `sharding`.
    """
    if not isinstance(sharding, NamedSharding):
        return sharding
    mesh, spec = sharding.mesh, [_names(entry) for entry in sharding.spec]
    spec += [()] * (len(shape) - len(spec))
    used = {name for names in spec for name in names}
    for axis in (name for name in mesh.axis_names if name not in used and mesh.shape[name] > 1):
        for i, size in enumerate(shape):
            if size % math.prod(mesh.shape[name] for name in (*spec[i], axis)) == 0:
                spec[i] = (*spec[i], axis)
                break
    if used == {name for names in spec for name in names}:
        return sharding
    parts = PartitionSpec(*(names or None for names in spec))
    return NamedSharding(mesh, parts, memory_kind=sharding.memory_kind)


def _names(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return () if entry is None else (entry,) if isinstance(entry, str) else entry


def share_shardings(tree: Any) -> Any:
    """`share_sharding` of every leaf of a pytree of arrays or abstract arrays with shardings."""
    return jax.tree.map(lambda x: share_sharding(x.sharding, x.shape), tree)


def memory_of(device: Any) -> tuple[int, int] | None:
    """Most bytes that were in use on a jax.Device, and those there are; None: it does not tell.

    CPU devices do not: their memory is the host's.
    """
    stats = device.memory_stats() or {}
    if "peak_bytes_in_use" not in stats or "bytes_limit" not in stats:
        return None
    return stats["peak_bytes_in_use"], stats["bytes_limit"]


def local_bytes(tree: Any) -> dict[Any, int]:
    """Bytes of a state's shares by jax.Device of this process."""
    total: dict[Any, int] = {}
    for x in jax.tree.leaves(tree):
        sharding = share_sharding(x.sharding, x.shape)
        size = math.prod(sharding.shard_shape(x.shape)) * x.dtype.itemsize
        for device in sharding.addressable_devices:
            total[device] = total.get(device, 0) + size
    return total


def _copied(tree: Any) -> Any:
    return jax.tree.map(jnp.copy, tree)


def _same(tree: Any) -> Any:
    return tree


def gather(tree: Any, shardings: Any) -> Any:
    """Lays shares out by the shardings that they are shares of; what lies so already stays."""
    leaves, structure = jax.tree.flatten(tree)
    wanted = structure.flatten_up_to(shardings)
    moved = [i for i, x in enumerate(leaves) if x.sharding != wanted[i]]
    if moved:
        out = [wanted[i] for i in moved]
        new = jax.jit(_same, out_shardings=out)([leaves[i] for i in moved])
        for i, x in zip(moved, new, strict=True):
            leaves[i] = x
    return structure.unflatten(leaves)


class Snapshots:
    """Copies of a state's shares on its devices, where there is room beside the training."""

    def __init__(self) -> None:
        self._training: dict[Any, int] = {}

    def take(self, state: Any) -> Any | None:
        """Starts a copy of the shares; None where a device has no room, or tells of none.

        All processes call it alike, and get the same answer.

        Args:
          state: pytree of jax.Arrays; may be donated as soon as this returns.
        """
        copy = None
        if self._fits(state):
            try:
                copy = jax.jit(_copied, out_shardings=share_shardings(state))(state)
            except jax.errors.JaxRuntimeError as e:
                _log.debug("no copy on the devices: %s", e)
        return copy if all(processes.exchange(copy is not None)) else None

    def _fits(self, state: Any) -> bool:
        """Whether copies fit beside the most that training was seen to need.

        The peak is of the whole process: one within a copy of what was seen before may be
        training's beside an earlier copy, a higher one is taken for training's own.
        """
        fits = True
        for device, size in local_bytes(state).items():
            memory = memory_of(device)
            if memory is None:
                return False
            peak, limit = memory
            known = self._training.get(device)
            if known is None or peak > known + size:
                known = self._training[device] = peak
            fits &= known + size <= (1 - _SPARE) * limit
        return fits
