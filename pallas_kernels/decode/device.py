"""What the kernel of whole tokens needs of a device, and how it is cut there."""

import functools
import json
import math
from pathlib import Path

import jax

from ..capability import compute_capability
from .token_plan import Cut

# Programs of that kernel wait for each other, so all must run at once. With fewer
# multiprocessors than this (a slice of a GPU) one kernel after another does better.
FEWEST_MULTIPROCESSORS = 64

# Rows that take less time one after another, each all its tokens in that kernel, than side by side
# in other kernels. Measured on an H100 (2026-11-26), ms a token of all rows, one after another
# against the best other form, at 2, 3 and 4 rows: width 1024 0.48, 0.72, 0.96 against 0.51, 0.60,
# 0.71; width 2048 0.75, 1.12, 1.50 against 0.91, 1.14, 1.35; width 2560 1.30, 1.95, 2.61 against
# 1.79, 2.16, 2.16.
_ROWS_IN_TURN = {1024: 2}
_MOST_ROWS_IN_TURN = 3


def multiprocessors() -> int:
    """Multiprocessors of the first device; 0 where it is not a GPU."""
    if jax.default_backend() != "gpu":
        return 0
    return int(getattr(jax.local_devices()[0], "core_count", 0) or 0)


def prefetches() -> bool:
    """Whether the first device takes requests to bring memory to its L2 cache.

    `cp.async.bulk.prefetch.L2` is there from compute capability 9.0 (PTX ISA, section on bulk
    copies); on older devices the kernel does without.
    """
    return (compute_capability() or 0) >= 9.0


def runs_whole_tokens(state_size: int, glu_size: int) -> bool:
    """Whether the first device has room for the kernel, and the model widths that it takes."""
    enough = multiprocessors() >= FEWEST_MULTIPROCESSORS
    return enough and state_size % 16 == 0 and glu_size % 16 == 0


def rows_in_turn(width: int) -> int:
    """Rows up to which that kernel, a row after another, measured fastest at this hidden size."""
    fewer = [rows for widest, rows in _ROWS_IN_TURN.items() if width <= widest]
    return min(fewer, default=_MOST_ROWS_IN_TURN)


def measured_cut(width: int) -> Cut:
    """How the kernel is cut on the first device, as measured for the hidden size nearest."""
    cuts = _measured_cuts()
    cut = dict(cuts[min(cuts, key=lambda measured: abs(math.log(measured / width)))])
    if not prefetches():
        cut["ahead"] = 0
    return Cut(programs=cut.pop("each") * multiprocessors(), **cut)


@functools.cache
def _measured_cuts() -> dict[int, dict[str, int]]:
    """Hidden size -> the fastest of a few cuts on an H100; "each": programs a multiprocessor."""
    text = Path(__file__).with_name("measured_cuts.json").read_text(encoding="utf-8")
    return {int(width): cut for width, cut in json.loads(text).items()}
