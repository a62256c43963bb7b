"""Runs as they were read, made whole: gaps filled or named, repeated rows noted."""

from dataclasses import replace

import numpy as np

from mmfree_jax.experiments.scaling.errors import ScalingError
from mmfree_jax.experiments.scaling.frame import NUMBERS, RunFrame, where


def complete(frame: RunFrame) -> RunFrame:
    """Fill what follows from the rest by C = 6 N D, with a note, and drop runs without a loss.

    Raises:
        ScalingError: nothing is left, or a loss is not positive.
    """
    notes = []
    good = np.isfinite(frame.loss)
    if not good.all():
        first = where(frame, int(np.argmin(good)))
        notes.append(f"{int((~good).sum())} of {len(frame)} runs have no finite loss, the first "
                     f"{first}: left out")  # fmt: skip
        frame = frame.take(good)
    if not len(frame):
        raise ScalingError("runs: no row has a finite loss; nothing can be fitted")
    if np.any(frame.loss <= 0):
        row = int(np.argmin(frame.loss))
        raise ScalingError(f"column: 'loss' is {frame.loss[row]:g} in {where(frame, row)}; it "
                           "must be positive (nats a token)")  # fmt: skip
    repeated = _repeated(frame)
    if repeated:
        notes.append(repeated)
    notes += _gaps(frame)
    for name, other in (("tokens", "params"), ("params", "tokens")):
        for spent in ("flops", "budget"):
            have = [np.isfinite(getattr(frame, n)) for n in (name, other, spent)]
            rows = ~have[0] & have[1] & have[2]
            if rows.any():
                derived = getattr(frame, spent) / (6 * getattr(frame, other))
                frame = replace(frame, **{name: np.where(rows, derived, getattr(frame, name))})
                word = {"flops": "FLOPs", "budget": "budget"}[spent]
                which = "" if rows.all() else f", the first {where(frame, int(np.argmax(rows)))}"
                notes.append(f"{name} of {int(rows.sum())} runs derived as {word} / (6 {other})"
                             + which)  # fmt: skip
    return frame.noted(*notes)


def _repeated(frame: RunFrame) -> str | None:
    """A note on rows that repeat another in every number, which count several times."""
    columns = [np.nan_to_num(getattr(frame, n), nan=-1.0) for n in NUMBERS]
    words = [np.unique(getattr(frame, n), return_inverse=True)[1] for n in ("family", "seed")]
    table = np.stack([*columns, *words], axis=1)
    _, first, count = np.unique(table, axis=0, return_index=True, return_counts=True)
    if not np.any(count > 1):
        return None
    row = int(first[count > 1].min())
    return (f"{int((count - 1).sum())} rows repeat another in every number, the first "
            f"{where(frame, row)}: they count several times; remove them unless they are "
            "runs of their own")  # fmt: skip


def _gaps(frame: RunFrame) -> list[str]:
    """Columns that decide what N and C are but have a gap, so that another one decides."""
    out = []
    for name, instead in (("flops", "C is not read from it"), ("params_non_embedding", "N is not "
                          "read from it"), ("budget", "it is not used as C")):  # fmt: skip
        gap = ~np.isfinite(getattr(frame, name))
        if gap.any() and not gap.all():
            out.append(f"column {frame.sources.get(name, name)!r} is empty in {int(gap.sum())} of "
                       f"{len(frame)} runs, the first {where(frame, int(np.argmax(gap)))}, so "
                       f"{instead}")  # fmt: skip
    return out
