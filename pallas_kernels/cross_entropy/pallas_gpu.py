"""The head on a Hopper: `xla`'s chunks, with kernels for the logits and for their rows.

The logits of the ternary head come from the op `ternary_matmul`, their rows go through Pallas
Mosaic GPU. A program keeps one row of logits in shared memory, in pieces: it reads each for the
loss as the copy brings it, then again for the gradient, after which a piece of the next row takes
its place. Memory sees one read of the logits and one write of the gradient.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax import lax

from .. import mosaic
from .. import mosaic_gpu as plgpu
from ..errors import MosaicError
from ..refs import Ref
from ..ternary_matmul.api import ternary_matmul
from . import xla

_WIDEST = 3200  # columns of a piece: 25 of each thread, with three values each from piece to piece
_MOST_SLOTS = 32  # Mosaic GPU has no more barriers in a group.
_LEAST = -1e30  # Below any logit, and finite: differences of it are no NaN.
_GROUP = 4  # rows whose scalars, 16 bytes, are copied together
_BLOCK_BYTES = 232448 - 4096  # of shared memory, less the scratch of reductions


def forward(*args: Any, interpret: bool = False, **options: Any) -> tuple[jax.Array, ...]:
    """See `xla.forward`."""
    return xla.forward(*args, **options, **_kernels(interpret))


def forward_with_gradients(
    *args: Any, interpret: bool = False, **options: Any
) -> tuple[jax.Array, ...]:
    """See `xla.forward_with_gradients`."""
    return xla.forward_with_gradients(*args, **options, **_kernels(interpret))


backward = xla.backward


def _kernels(interpret: bool) -> dict[str, Callable[..., Any]]:
    rows = functools.partial(softmax_rows, interpret=interpret)
    return {"logits": _logits, "rows": rows}


def _logits(
    left_PD: jax.Array, scale_P1: jax.Array, weights_VD: jax.Array, w_scale: jax.Array | None
) -> jax.Array:
    if w_scale is None:
        return xla._logits(left_PD, scale_P1, weights_VD, w_scale)
    return ternary_matmul(
        left_PD, scale_P1, weights_VD, jnp.atleast_2d(w_scale), out_dtype=jnp.float32
    )


def takes(V: int) -> bool:
    """Whether the kernel runs for V words."""
    if V % mosaic.WARPGROUP:
        return False
    piece, slots = _cut(V, 4)
    return slots > V // piece


def _cut(V: int, gradient_bytes: int) -> tuple[int, int]:
    """The columns of a piece, and how many pieces shared memory holds beside two of gradients."""
    parts, most = V // mosaic.WARPGROUP, _WIDEST // mosaic.WARPGROUP
    piece = mosaic.WARPGROUP * next(n for n in range(most, 0, -1) if parts % n == 0)
    left = _BLOCK_BYTES - 2 * piece * gradient_bytes - 256
    return piece, min(_MOST_SLOTS, 2 * V // piece, left // (4 * piece))


def softmax_rows(
    logits_PV: jax.Array,
    targets_P: jax.Array,
    z_loss: float,
    dtype: jax.typing.DTypeLike | None,
    *,
    interpret: bool = False,
) -> tuple[jax.Array, ...]:
    """Cross-entropy of rows of logits and the gradient of its sum.

    Args:
      logits_PV: float32.
      targets_P: int32 columns; below zero means no loss and no gradient.
      z_loss: weight of lse^2.
      dtype: of the gradient; None leaves it out.
      interpret: run the kernel as a JAX program.

    Returns:
      loss_P, correct_P (bool), lse_P, and the gradient [P, V].

    Raises:
      MosaicError: the vocabulary is no multiple of 128, or a row and a piece do not fit.
    """
    P, V = logits_PV.shape
    if V % mosaic.WARPGROUP:
        raise MosaicError(f"{V} words are no multiple of 128: take implementation='xla'")
    piece, slots = _cut(V, 0 if dtype is None else jnp.dtype(dtype).itemsize)
    if slots <= V // piece:
        raise MosaicError(
            f"a row of {V} logits does not fit into shared memory: take implementation='xla'"
        )
    programs = min(mosaic.MULTIPROCESSORS, math.ceil(P / _GROUP))
    padded = P + -P % _GROUP
    scalars = {"loss": jnp.float32, "correct": jnp.int32, "lse": jnp.float32}
    out_type = {n: jax.ShapeDtypeStruct((padded,), d) for n, d in scalars.items()}
    scratch: dict[str, Any] = {f"{n}s": plgpu.SMEM((2, _GROUP), d) for n, d in scalars.items()}
    scratch["pieces"] = plgpu.SMEM((slots, 1, piece), jnp.float32)
    scratch["arrived"] = plgpu.Barrier(num_barriers=slots)
    if dtype is not None:
        out_type["gradient"] = jax.ShapeDtypeStruct((P, V), dtype)
        scratch["gradients"] = plgpu.SMEM((2, 1, piece), dtype)

    def kernel(*refs: Ref, **scratch: Ref) -> None:
        named = dict(zip(("logits", "targets", *out_type), refs, strict=True))
        _kernel(named, scratch, mosaic.Rows(1, piece, interpret), z_loss, slots, programs)

    results = mosaic.kernel(
        kernel, out_type=list(out_type.values()), scratch=scratch, grid={"program": programs},
        interpret=interpret, name="softmax_rows",
    )(logits_PV, targets_P)  # fmt: skip
    loss_P, correct_P, lse_P = (scalar[:P] for scalar in results[:3])
    return loss_P, correct_P != 0, lse_P, *results[3:]


def _kernel(
    named: dict[str, Ref],
    scratch: dict[str, Ref],
    of: mosaic.Rows,
    z_loss: float,
    slots: int,
    programs: int,
) -> None:
    P, V = named["logits"].shape
    piece, pieces = of.columns, V // of.columns
    program, gradient_ref = lax.axis_index("program"), named.get("gradient")
    groups = lax.div(-(-P // _GROUP) - program + programs - 1, jnp.int32(programs))
    rows = groups * _GROUP
    lane = of.numbers()

    def row_of(j: Any) -> Any:
        """The j-th row of this program; the last row stands in for those beyond it."""
        first = (program + lax.div(j, jnp.int32(_GROUP)) * programs) * _GROUP
        return jnp.minimum(first + lax.rem(j, jnp.int32(_GROUP)), P - 1)

    def at(ref: Ref, j: Any, c: Any) -> Ref:
        return ref.at[pl.ds(row_of(j), 1), pl.ds(c * piece, piece)]

    def slot_of(j: Any, c: Any) -> Any:
        return lax.rem(j * pieces + c, jnp.int32(slots))

    def fetch(number: Any) -> None:
        """The number-th piece of all of this program's rows, where there is one."""
        j, c = lax.div(number, jnp.int32(pieces)), lax.rem(number, jnp.int32(pieces))

        @pl.when(j < rows)
        def _fetch() -> None:
            slot = slot_of(j, c)
            source = at(named["logits"], j, c)
            mosaic.fetch(source, scratch["pieces"].at[slot], scratch["arrived"].at[slot])

    def ahead(number: Any, carry: Any) -> Any:
        fetch(number)
        return carry

    lax.fori_loop(jnp.int32(0), jnp.int32(slots), ahead, jnp.int32(0))

    def one_row(j: Any, carry: Any) -> Any:
        target = named["targets"][row_of(j)]

        def accumulate(c: Any, state: Any) -> Any:
            # For each lane its largest value, where it stood, and the sum of exponentials below it.
            largest, where, total = state
            slot = slot_of(j, c)
            plgpu.barrier_wait(scratch["arrived"].at[slot])
            x = of.load(scratch["pieces"].at[slot])
            ratio = jnp.exp(-jnp.abs(x - largest))
            grows = x > largest
            total = jnp.where(grows, total * ratio + 1.0, total + ratio)
            return jnp.where(grows, x, largest), jnp.where(grows, c, where), total

        init = of.full(_LEAST), of.full(0, jnp.int32), of.full(0.0)
        largest, where, total = lax.fori_loop(0, pieces, accumulate, init)
        maximum = jnp.max(largest)  # No NaN is larger than anything: it shows in the total alone.
        lse = jnp.log(jnp.sum(total * jnp.exp(largest - maximum))) + maximum
        argmax = jnp.min(jnp.where(largest == maximum, where * piece + lane, V))
        valid = target >= 0
        first = jnp.where(valid, 0, V)  # column with a gradient
        some = jnp.maximum(target, 0)
        slot = slot_of(j, lax.div(some, jnp.int32(piece)))
        of_target = scratch["pieces"][slot, 0, lax.rem(some, jnp.int32(piece))]
        loss = jnp.where(valid, lse - of_target + z_loss * lse * lse, 0.0)
        correct = (valid & (argmax == target) & (lse == lse)).astype(jnp.int32)
        side = lax.rem(lax.div(j, jnp.int32(_GROUP)), jnp.int32(2))
        within = lax.rem(j, jnp.int32(_GROUP))
        for n, value in (("loss", loss), ("correct", correct), ("lse", lse)):
            scratch[f"{n}s"][side, within] = value

        def differentiate(c: Any, carry: Any) -> Any:
            slot = slot_of(j, c)
            if gradient_ref is not None:
                x = of.load(scratch["pieces"].at[slot])
                column = c * piece + lane
                one = jnp.where(column == target, 1.0, 0.0)
                weight = 1.0 + 2.0 * z_loss * lse
                # A vector's condition: Mosaic GPU selects by no single one.
                gradient = jnp.where(column >= first, jnp.exp(x - lse) * weight - one, 0.0)
                passing = scratch["gradients"].at[lax.rem(j * pieces + c, jnp.int32(2))]
                plgpu.wait_smem_to_gmem(1, wait_read_only=True)
                of.put(passing, gradient)
            plgpu.commit_smem()
            if gradient_ref is not None:
                plgpu.copy_smem_to_gmem(passing, at(gradient_ref, j, c))
            fetch(j * pieces + c + slots)
            return carry

        lax.fori_loop(jnp.int32(0), jnp.int32(pieces), differentiate, jnp.int32(0))

        @pl.when(within == _GROUP - 1)
        def _scalars() -> None:
            first = (program + lax.div(j, jnp.int32(_GROUP)) * programs) * _GROUP
            for n in ("loss", "correct", "lse"):
                mosaic.store(scratch[f"{n}s"].at[side], named[n].at[pl.ds(first, _GROUP)])

        plgpu.commit_smem_to_gmem_group()
        # The next row's gradients, or scalars, take the places that these leave.
        plgpu.wait_smem_to_gmem(1, wait_read_only=True)
        return carry

    lax.fori_loop(jnp.int32(0), rows, one_row, jnp.int32(0))
    plgpu.wait_smem_to_gmem(0)
