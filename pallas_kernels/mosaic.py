"""What the kernels in Pallas Mosaic GPU share: rows in registers and a ring of tiles on the way.

One form of each call serves jax 0.10 to 0.12: bulk copies promise to stay in bounds, because the
tensor maps that check bounds take no more than 256 columns, and whatever goes to memory passes
through shared memory, because jax 0.12 refuses to write rows' scalars from registers.

With `interpret` the kernels run on a CPU under JAX's interpreter of Mosaic GPU, which simulates
the copies and their barriers; it knows no layouts of registers, so that none are given.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax import lax

from . import mosaic_gpu as plgpu
from .capability import compute_capability
from .errors import MosaicError
from .keep_nan import from_magnitude, magnitude
from .refs import Ref
from .rounding import ROUNDER_BITS

WARPGROUP = 128  # threads
MULTIPROCESSORS = 132  # of an H100 and an H200, the only cards that these kernels were cut for
SHARED_BYTES = 233472  # of a multiprocessor
_BLOCK_BYTES = 3328  # of each block: reserved by CUDA, the scratch of reductions, and barriers
_HOPPER = 9  # The first generation that copies in bulk; for the next these do not compile yet.


def kernel(
    body: Callable[..., None],
    *,
    out_type: Sequence[Any],
    scratch: Mapping[str, Any],
    grid: Mapping[str, int],
    interpret: bool,
    name: str,
) -> Callable[..., Any]:
    """`plgpu.kernel` of one warpgroup a program, which sets its barriers itself.

    Lowering one takes tenths of a second to seconds. Functions that make kernels are therefore
    jitted: JAX then traces and lowers a kernel once for all calls of the same shapes and options,
    and writes it into the program once, where every layer would have a copy. XLA puts it back
    into each place before it does anything else.

    Raises:
      MosaicError: the first device is a GPU that is no Hopper.
    """
    capability = compute_capability()
    if capability is not None and int(capability) != _HOPPER:
        raise MosaicError(
            f"the kernels need an NVIDIA GPU of compute capability {_HOPPER}.0, which "
            f"{jax.devices()[0].device_kind} is not: take implementation='xla'"
        )
    options = {"interpret": _interpreter()} if interpret else {}
    return plgpu.kernel(
        body,
        out_type=tuple(out_type),
        scratch_types=dict(scratch),
        grid=tuple(grid.values()),
        grid_names=tuple(grid),
        kernel_name=name,
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Warpgroup,
            unsafe_no_auto_barriers=True,
            approx_math=True,  # exp by the hardware's exp2, as Triton has it
        ),
        **options,
    )


def _interpreter() -> Any:
    # Public from jax 0.11 on.
    from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams

    return InterpretGPUParams()


def fits(shared_bytes: int) -> bool:
    """Whether a multiprocessor holds one block of so much shared memory."""
    return shared_bytes + _BLOCK_BYTES <= SHARED_BYTES


def blocks_that_fit(shared_bytes: int, most: int) -> int:
    """Blocks of so much shared memory that a multiprocessor holds at a time.

    Raises:
      MosaicError: not even one fits.
    """
    if not fits(shared_bytes):
        raise MosaicError(
            f"a program's {shared_bytes} bytes do not fit into {SHARED_BYTES} of shared memory: "
            "take implementation='xla', or rows that are not so wide"
        )
    return max(1, min(most, SHARED_BYTES // (shared_bytes + _BLOCK_BYTES)))


def fetch(source: Ref, target: Ref, barrier: Ref) -> None:
    """Starts a copy of a piece of an array into shared memory; the barrier tells of its end."""
    plgpu.copy_gmem_to_smem(source, target, barrier, oob_mode=plgpu.OOBFillMode.PROMISE_IN_BOUNDS)


def store(source: Ref, target: Ref) -> None:
    """Starts a copy out of shared memory, in the group that `ring` closes."""
    plgpu.copy_smem_to_gmem(source, target, commit_group=False)


def load(ref: Ref, layout: Any) -> jax.Array:
    """Reads shared memory into registers laid out so; None, under the interpreter, in no way."""
    if layout is None:
        return ref[...]
    if jax.__version_info__ < (0, 11):
        value = plgpu.load(ref, (), optimized=False)
    else:
        value = plgpu.load(ref, optimized=False)  # pyright: ignore[reportCallIssue]
    return plgpu.layout_cast(value, layout)


@dataclasses.dataclass(frozen=True)
class Rows:
    """[rows, columns] float32 in a warpgroup's registers, each row spread over all threads.

    A thread holds the same columns of every row, so that what is summed over rows stays with it.
    One row alone is a vector [columns], and its row scalars are numbers: Mosaic GPU has no layout
    of one row.
    """

    rows: int
    columns: int
    interpret: bool = False

    def __post_init__(self) -> None:
        if self.columns % WARPGROUP:
            raise MosaicError(
                f"{self.columns} columns are no multiple of {WARPGROUP}: take implementation='xla'"
            )

    def _layout(self, reduced: int | None = None) -> Any:
        """Of the whole, or without one of its axes."""
        if self.interpret:
            return None
        vector = self._vector
        columns = (WARPGROUP * vector,), (32 * vector,), (vector,)
        if self.rows > 1:
            columns = ((self.rows, WARPGROUP * vector), *columns[1:])
        layout = plgpu.Layout.TILED(
            plgpu.Tiling(columns), warp_dims=(-3,), lane_dims=(-2,), vector_dim=-1
        )
        return layout if reduced is None or self.rows == 1 else layout.reduce(reduced)

    @property
    def _vector(self) -> int:
        """Neighbouring columns of a thread: no more than 16 bytes of float32."""
        return next(v for v in (4, 2, 1) if self.columns % (WARPGROUP * v) == 0)

    def load(self, ref: Ref) -> jax.Array:
        """A tile [rows, columns] of any float type."""
        return load(ref if self.rows > 1 else ref.at[0], self._layout()).astype(jnp.float32)

    def put(self, ref: Ref, value: jax.Array) -> None:
        """Writes a tile in its own type."""
        ref[... if self.rows > 1 else 0] = value.astype(ref.dtype)

    def put_low_bytes(self, ref: Ref, bits: jax.Array) -> None:
        """Writes what `rounding.rounded` made, as int8."""
        if self._vector == 1:
            # A lone byte goes to memory straight from the register of the sum, which ptxas takes
            # for a float and converts: all bytes were 255 on an H100. An operation on integers
            # that no compiler can leave out keeps them bits.
            bits = jnp.maximum(bits, ROUNDER_BITS - 128)
        self.put(ref, bits)

    def vector(self, ref: Ref) -> jax.Array:
        """[columns] float32, to be laid under each row."""
        return self.wide(load(ref, self._layout(reduced=0)))

    def scalars(self, ref: Ref) -> jax.Array:
        """[rows], one number for each row."""
        return load(ref, self._layout(reduced=1)) if self.rows > 1 else ref[0]

    def put_scalars(self, ref: Ref, value: jax.Array) -> None:
        """Writes [rows]."""
        ref[... if self.rows > 1 else 0] = value

    def wide(self, vector: jax.Array) -> jax.Array:
        """A vector [columns] under each row."""
        if self.rows == 1:
            return vector
        return lax.broadcast_in_dim(vector, (self.rows, self.columns), (1,))

    def long(self, scalars: jax.Array) -> jax.Array:
        """Scalars [rows] along their rows."""
        if self.rows == 1:
            return scalars
        return lax.broadcast_in_dim(scalars, (self.rows, self.columns), (0,))

    def total(self, value: jax.Array) -> jax.Array:
        """The sum of each row."""
        return jnp.sum(value, axis=-1)

    def absmax(self, value: jax.Array) -> jax.Array:
        """The largest magnitude of each row; NaN where one is."""
        if self.rows == 1 and not self.interpret:
            # A number's bits cannot be taken for another type; this maximum keeps NaN.
            return jnp.max(jnp.abs(value))
        # By one instruction for a warp, and under the interpreter with NaN too.
        return from_magnitude(jnp.max(magnitude(value), axis=-1))

    def over_rows(self, value: jax.Array) -> jax.Array:
        """The sums over rows, [columns]."""
        return value if self.rows == 1 else jnp.sum(value, axis=0)

    def full(self, value: float, dtype: jax.typing.DTypeLike = jnp.float32) -> jax.Array:
        """[columns] of one value."""
        vector, layout = jnp.full((self.columns,), value, dtype), self._layout(reduced=0)
        return vector if layout is None else plgpu.layout_cast(vector, layout)

    def numbers(self) -> jax.Array:
        """[columns] int32, from zero up."""
        layout = self._layout(reduced=0)
        if layout is None:
            return jnp.arange(self.columns, dtype=jnp.int32)
        return plgpu.broadcasted_iota(jnp.int32, (self.columns,), 0, layout=layout)


def ring(
    steps: Any,
    stages: int,
    barriers: Ref,
    fetch: Callable[[Any, Any], None],
    body: Callable[[Any, Any, Any], Any],
    store: Callable[[Any, Any], None],
    init: Any,
) -> Any:
    """Folds `body(step, slot, carry)` over tiles that pass through `stages` slots.

    A tile is fetched `stages - 1` steps ahead into the slot of the one before the present, whose
    stores have read it by then: outputs may stand where inputs stood. A slot that only `body`
    writes is free again after `stages` steps as well.

    Args:
      steps: how many tiles, at least one; traced or not.
      stages: slots, at least two.
      barriers: one a slot, on which all copies of a tile's `fetch` arrive.
      fetch: starts the copies of a step into a slot.
      body: works on the tile in a slot; returns the carry.
      store: starts the copies of what `body` left in a slot.
      init: the carry of the first step.

    Returns:
      The last carry; all stores have been made.
    """

    def start(step: Any, slot: Any) -> None:
        @pl.when(step < steps)
        def _fetch() -> None:
            fetch(step, slot)

    for i in range(stages - 1):
        start(jnp.int32(i), jnp.int32(i))

    def one(step: jax.Array, carry: Any) -> Any:
        slot = lax.rem(step, jnp.int32(stages))
        plgpu.barrier_wait(barriers.at[slot])
        carry = body(step, slot, carry)
        plgpu.commit_smem()
        store(step, slot)
        plgpu.commit_smem_to_gmem_group()
        plgpu.wait_smem_to_gmem(1, wait_read_only=True)
        ahead = step + (stages - 1)
        start(ahead, lax.rem(ahead, jnp.int32(stages)))
        return carry

    carry = lax.fori_loop(0, steps, one, init)
    plgpu.wait_smem_to_gmem(0)
    return carry
