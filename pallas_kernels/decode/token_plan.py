"""What is static in the kernel that runs a whole token (`token_gpu.py`)."""

import dataclasses
from typing import NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp

from ..packed_matmul.words import plane_columns
from .model import Arithmetic, Model

LANES = 32  # of a warp


@dataclasses.dataclass(frozen=True)
class Cut:
    """How the kernel is cut.

    Attributes:
      programs: at most as many as run at the same time on the device.
      warps: of a program.
      tile: words of weights in a tile, for each thread.
      depth: tiles that are on their way to registers while one is worked on.
      ahead: tiles that are on their way to the L2 cache before those.
      copies: of the board. Readers are spread over them, since a cache line serves one at a time.
    """

    programs: int = 528
    warps: int = 1
    tile: int = 24
    depth: int = 1
    ahead: int = 0
    copies: int = 1


class Step(NamedTuple):
    """One of the five products.

    Attributes:
      name: and that of its weights in the model.
      inputs: values on the board that it reads.
      norm: name of the norm in front whose weights are not in the input yet.
      columns: K.
      rows: outputs, each from one row of each stream.
      streams: (matrix, first row) of the rows that are read side by side.
    """

    name: str
    inputs: tuple[str, ...]
    norm: str | None
    columns: int
    rows: int
    streams: tuple[tuple[int, int], ...]


class Plan(NamedTuple):
    """The model's shape, the board's layout and the cut.

    Attributes:
      steps: by name.
      layers: L.
      bytes: of an element of each value on the board; 2 where it is a bfloat16 anyway.
      slots: word at which each value begins on the board of one layer.
      board: words of one layer.
      eps: of the BitLinears' norms.
      outer_eps: of the other norms.
      dtype: of the products' outputs.
      residual_dtype: of the stream.
      boards: 2 where one token follows another in the same kernel: while one board fills, each
        value on the other is taken off.
      cut: how the work is divided.
      emulate: run as a JAX program, without the GPU's instructions.
    """

    steps: dict[str, Step]
    layers: int
    bytes: dict[str, int]
    slots: dict[str, int]
    board: int
    eps: float
    outer_eps: float
    dtype: jnp.dtype
    residual_dtype: jnp.dtype
    boards: int
    cut: Cut
    emulate: bool


def make_plan(
    model: Model, arithmetic: Arithmetic, *, boards: int, cut: Cut, emulate: bool
) -> Plan:
    """The plan of a model."""
    layers, inner = model.lower_bound.shape
    vocabulary, width = model.head.words[0].shape[1], model.embedding.shape[1]
    glu = model.glu_in.words[0].shape[1] // 2
    dtype, residual_dtype = arithmetic.dtype, arithmetic.residual_dtype
    steps = (
        Step("mixer_in", ("x",), "mixer_norm", width, inner, ((0, 0), (1, 0), (2, 0))),
        Step("mixer_out", ("g", "u"), None, inner, width, ((0, 0),)),
        Step("glu_in", ("middle",), "glu_norm", width, glu, ((0, 0), (0, glu))),
        Step("glu_out", ("z",), None, glu, width, ((0, 0),)),
        Step("head", ("x",), "final_norm", width, vocabulary, ((0, 0),)),
    )
    columns = {"g": inner, "u": inner, "middle": width, "z": glu, "out": width}
    dtypes = {"g": dtype, "u": jnp.float32, "middle": residual_dtype, "z": dtype}
    dtypes["out"] = residual_dtype
    # One thread writes, but all have a place.
    columns["best"], dtypes["best"] = 2 * cut.programs + LANES * cut.warps, jnp.float32
    sizes, slots, end = {}, {}, 0
    for value, count in columns.items():
        half = jnp.dtype(dtypes[value]) == jnp.bfloat16 and not emulate
        sizes[value] = 2 if half else 4
        slots[value] = end
        # Whole groups of four words: they are read together.
        end += 4 * pl.cdiv(4 * plane_columns(count) * sizes[value], 16)
    return Plan(
        {step.name: step for step in steps}, layers, sizes, slots, end, float(arithmetic.eps),
        float(arithmetic.outer_eps), jnp.dtype(dtype), jnp.dtype(residual_dtype), boards, cut,
        emulate,
    )  # fmt: skip


def places(plan: Plan) -> jax.Array:
    """The number of each thread, [warps, 32] int32."""
    warps = plan.cut.warps
    return LANES * jnp.arange(warps)[:, None] + jnp.arange(LANES)[None, :]


def groups(plan: Plan, columns: int) -> int:
    """Groups of warps that each hold a whole row; each takes its own rows of a tile.

    A power of two: where a row has fewer words than a program has threads.
    """
    words, count = plane_columns(columns) // 4, 1
    while words * 2 * count <= LANES * plan.cut.warps and 2 * count <= plan.cut.warps:
        count *= 2
    return count


def word_numbers(plan: Plan, columns: int) -> list[tuple[jax.Array, jax.Array | None]]:
    """Words of a row that each thread holds: their numbers, and which exist (None: all).

    Where one does not exist its number is that of the last.
    """
    words = plane_columns(columns) // 4
    threads = LANES * plan.cut.warps // groups(plan, columns)
    out = []
    for first in range(0, words, threads):
        word = first + places(plan) % threads
        if first + threads <= words:
            out.append((word, None))
        else:
            out.append((jnp.minimum(word, words - 1), word < words))
    return out


class Tiling(NamedTuple):
    """How a program's share of a step's rows is cut.

    Attributes:
      tiles: of a share.
      rows: of a tile; 32 at most, so that a warp can finish them.
      each: of those, for each group of warps.
    """

    tiles: int
    rows: int
    each: int


def tiling(plan: Plan, step: Step) -> Tiling:
    """The tiles of a step."""
    share = pl.cdiv(step.rows, plan.cut.programs)
    count = groups(plan, step.columns)
    pieces = len(word_numbers(plan, step.columns))
    rows = count * max(1, plan.cut.tile // (pieces * len(step.streams)))
    tiles = pl.cdiv(share, min(rows, LANES, share))
    each = pl.cdiv(pl.cdiv(share, tiles), count)
    return Tiling(pl.cdiv(share, count * each), count * each, each)
