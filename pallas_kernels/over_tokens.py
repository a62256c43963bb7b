"""Runs a kernel on each device's own tokens.

GSPMD cannot see into a kernel: under a sharded jit it would gather the operands of a bare
`pallas_call` (GPU) or refuse it (TPU). Kernels that work token by token therefore run inside
`shard_map`, with the tokens' leading axis split over the mesh axes that the caller names.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
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


def partial_sums(
    function: Callable[..., jax.Array], token_axes: Sequence[str], count: int
) -> Callable[..., jax.Array]:
    """A sum over tokens of which each device makes its own part: what `total` adds up.

    A compiler that partitions such a sum adds over devices at once, and whatever waits for the
    product waits for the exchange. Apart, the product can be made at once and the exchange run
    beside what follows.

    Args:
      function: arrays whose leading axes are tokens -> an array without tokens.
      token_axes: mesh axes that split the tokens.
      count: of function's arguments.

    Returns:
      A function of the same arguments, to [devices, ...]; to [1, ...] on one device, and where
      the axes do not cover the mesh and the compiler adds up over devices after all.
    """

    def local(*arrays: jax.Array) -> jax.Array:
        return function(*arrays)[None]

    if devices_in_mesh() == 1 or not covers_mesh(token_axes):
        return local
    tokens = P(tuple(token_axes))
    return jax.shard_map(local, in_specs=(tokens,) * count, out_specs=tokens, check_vma=False)


def total(partials: jax.Array) -> jax.Array:
    """The sum over devices of what `partial_sums` gave, exchanged and added in its dtype.

    In bfloat16 every hop of a collective rounds once: n devices, an error of about n 2^-9.
    """
    if partials.shape[0] == 1:
        return partials[0]
    # `jnp.sum` would add bfloat16 in float32, and exchange that.
    return jax.lax.reduce(partials, jnp.zeros((), partials.dtype), jax.lax.add, (0,))


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
