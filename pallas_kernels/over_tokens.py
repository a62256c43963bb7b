"""Runs a kernel on each device's own tokens.

GSPMD cannot see into a kernel: under a sharded jit it would gather the operands of a bare
`pallas_call` (GPU) or refuse it (TPU). Kernels that work token by token therefore run inside
`shard_map`, with the tokens' leading axis split over the mesh axes that the caller names.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import PartitionSpec as P

TOKENS, WHOLE = "tokens", "whole"


def devices_in_mesh() -> int:
    """Devices of the mesh that `jax.set_mesh` set; one where none is set, or within `shard_map`."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty or mesh.are_all_axes_manual else mesh.size


def covers_mesh(token_axes: Sequence[str]) -> bool:
    """Whether splitting the tokens over these axes leaves no device without work of its own."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.are_all_axes_manual:
        return True
    named = 1
    for axis in token_axes:
        named *= mesh.shape[axis]
    return named == mesh.size


def over_tokens(
    function: Callable[..., Any],
    token_axes: Sequence[str],
    arguments: tuple[str, ...],
    results: tuple[str, ...],
) -> Callable[..., Any]:
    """`function` on each device's tokens, or as it is where the mesh is one device.

    Args:
      function: takes and returns tuples of pytrees.
      token_axes: mesh axes that split the leading axis of `TOKENS` arrays.
      arguments: TOKENS or WHOLE for each argument; whole ones reach every device complete.
      results: likewise; a WHOLE result must come out equal on every device.

    Returns:
      A function of the same arguments.
    """
    if devices_in_mesh() == 1:
        return function
    specs = {TOKENS: P(tuple(token_axes)), WHOLE: P()}
    return jax.shard_map(
        function,
        in_specs=tuple(specs[a] for a in arguments),
        out_specs=tuple(specs[r] for r in results),
        check_vma=False,
    )
