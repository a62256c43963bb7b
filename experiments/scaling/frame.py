"""A table of training runs, and the conventions by which their compute is counted.

Columns are numpy arrays of one length; a missing number is NaN, a missing word "". Counts
are raw (parameters, tokens, FLOPs), never millions or billions.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np

from mmfree_jax.experiments.scaling.errors import ScalingError

NUMBERS = (
    "params", "params_non_embedding", "params_ternary", "tokens", "flops", "loss", "loss_sd",
    "budget", "bits", "unique_tokens", "accuracy", "chance",
)  # fmt: skip
WORDS = ("family", "seed", "run", "provenance")
CONVENTIONS = ("6nd", "6nd-non-embedding", "exact", "budget", "bit-operations", "energy")
SIZES = {"total": "params", "non-embedding": "params_non_embedding", "ternary": "params_ternary"}
"""Size conventions, and the column of each."""


@dataclass(frozen=True)
class RunFrame:
    """One row a measurement: a finished run, or a point on a run's curve.

    Attributes:
        params: parameters in all, embedding included.
        params_non_embedding: without token embedding and head; params_ternary: ternary ones.
        tokens: training tokens seen.
        flops: FLOPs spent, as counted by whoever made the file ("exact").
        loss: nats a token; loss_sd: standard error of the loss, where known.
        budget: FLOP budget that the run belongs to (isoFLOP designs).
        bits: of a weight during training; unique_tokens: tokens of the data, each counted once.
        accuracy, chance: share of a task's questions answered right, by the model and by guessing.
        family, seed, run, provenance: words; rows of one `run` are resampled together.
        notes: what reading and filtering did, in sentences.
        sources: column of the frame -> column of the file, where they differ.
    """

    params: np.ndarray
    params_non_embedding: np.ndarray
    params_ternary: np.ndarray
    tokens: np.ndarray
    flops: np.ndarray
    loss: np.ndarray
    loss_sd: np.ndarray
    budget: np.ndarray
    bits: np.ndarray
    unique_tokens: np.ndarray
    accuracy: np.ndarray
    chance: np.ndarray
    family: np.ndarray
    seed: np.ndarray
    run: np.ndarray
    provenance: np.ndarray
    notes: tuple[str, ...] = field(default=())
    sources: Mapping[str, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.loss)

    def take(self, rows: np.ndarray) -> "RunFrame":
        """The rows chosen by a boolean mask or an index array."""
        return replace(self, **{n: getattr(self, n)[rows] for n in (*NUMBERS, *WORDS)})

    def noted(self, *notes: str) -> "RunFrame":
        """The same rows with further notes."""
        return replace(self, notes=(*self.notes, *notes))


def make_frame(**columns: Any) -> RunFrame:
    """Build a frame from any of its columns; the others are missing.

    Raises:
        ScalingError: an unknown column, columns of different lengths, or no `loss`.

    Example:
      >>> import numpy as np
      >>> from mmfree_jax.experiments.scaling import make_frame
      >>> size, tokens = (x.ravel() for x in np.meshgrid([1e6, 3e6, 1e7, 3e7], [1e8, 3e8, 1e9]))
      >>> loss = 1.7 + 400 * size**-0.34 + 410 * tokens**-0.28
      >>> frame = make_frame(params=size, tokens=tokens, loss=loss)
      >>> len(frame)
      12
    """
    known = {f.name for f in fields(RunFrame)}
    for name in columns:
        if name not in known:
            raise ScalingError(f"column: {name!r} is unknown; known are {', '.join(sorted(known))}")
    if "loss" not in columns:
        raise ScalingError("column: 'loss' is missing; every run needs its final loss")
    loss = np.asarray(columns["loss"], dtype=float)
    out: dict = {"notes": tuple(columns.get("notes", ())), "sources": columns.get("sources", {})}
    for name in NUMBERS:
        value = np.asarray(columns.get(name, np.full(len(loss), np.nan)), dtype=float)
        out[name] = np.broadcast_to(value, loss.shape).copy() if value.ndim == 0 else value
    for name in WORDS:
        value = np.asarray(columns.get(name, np.full(len(loss), "")), dtype=str)
        out[name] = np.broadcast_to(value, loss.shape).copy() if value.ndim == 0 else value
    for name in (*NUMBERS, *WORDS):
        if out[name].shape != loss.shape:
            raise ScalingError(
                f"column: {name!r} has {len(out[name])} rows but 'loss' has {len(loss)}"
            )
    return RunFrame(**out)


def join(frames: list[RunFrame]) -> RunFrame:
    """Stack frames; notes are kept in order."""
    if len(frames) == 1:
        return frames[0]
    out = {n: np.concatenate([getattr(f, n) for f in frames]) for n in (*NUMBERS, *WORDS)}
    notes = tuple(note for f in frames for note in f.notes)
    sources = {name: source for f in frames for name, source in f.sources.items()}
    return RunFrame(**out, notes=notes, sources=sources)


def _need(frame: RunFrame, name: str, purpose: str, way_out: str = "") -> np.ndarray:
    """A column of positive numbers, or an error that names the first row without one."""
    column = getattr(frame, name)
    gaps = np.flatnonzero(~np.isfinite(column))
    if len(gaps):
        missing = (
            "is missing"
            if len(gaps) == len(frame)
            else f"is empty or not finite in {len(gaps)} of {len(frame)} runs, the first "
            f"{where(frame, gaps[0])},"
        )
        raise ScalingError(
            f"column: '{name}' {missing} and {purpose} needs it; name its column with "
            f"--columns.{name.replace('_', '-')}, leave the rows out with --where"
            + (way_out or " or choose another convention with --flops or --size")
        )
    if np.any(column <= 0):
        row = int(np.argmin(column))
        raise ScalingError(
            f"column: '{name}' is {column[row]:g} in {where(frame, row)}; it must be positive: "
            "correct it or leave the row out with --where"
        )
    return column


def where(frame: RunFrame, row: int) -> str:
    """A row as its reader would look for it."""
    return str(frame.provenance[row]) or f"run {row + 1}"


def whole(frame: RunFrame, name: str) -> bool:
    """Whether every run has a number in a column."""
    return bool(np.isfinite(getattr(frame, name)).all())


def resolve(
    frames: Sequence[RunFrame], size: str = "auto", flops: str = "auto", *, budgets: bool = False
) -> tuple[str, str]:
    """The size and FLOP conventions that `auto` stands for, the same for all frames.

    N is without embedding and head where every run says so, else what the column of parameters
    counts. C is what the file says where it says so for every run: the budget with `budgets`
    (isoFLOP designs), else the run's FLOPs; only then 6 N D.
    """
    if size == "auto":
        size = "non-embedding" if _all_have(frames, "params_non_embedding") else "total"
    if flops == "auto" and budgets and _all_have(frames, "budget"):
        flops = "budget"
    elif flops == "auto" and _all_have(frames, "flops"):
        flops = "exact"
    elif flops == "auto":
        flops = "6nd" if size == "total" else "6nd-non-embedding"
    return size, flops


def _all_have(frames: Sequence[RunFrame], name: str) -> bool:
    return all(whole(frame, name) for frame in frames)


def definitions(frame: RunFrame, size: str, flops: str) -> dict[str, str]:
    """What N and C are in a result, in words, by resolved conventions: keys `N` and `C`."""
    n = {
        "total": f"the parameters that {_source(frame, 'params')} counts",
        "non-embedding": f"parameters without embedding and head ({_source(frame, SIZES[size])})",
        "ternary": f"ternary parameters ({_source(frame, 'params_ternary')})",
    }[size]
    c = {
        "6nd": f"6 N D, N from {_source(frame, 'params')}",
        "6nd-non-embedding": "6 N D, N without embedding and head",
        "exact": f"FLOPs as counted for each run ({_source(frame, 'flops')})",
        "budget": f"the budget given for each run ({_source(frame, 'budget')})",
        "bit-operations": "FLOPs with ternary products weighed by their bits",
        "energy": "FLOPs with ternary products weighed by their energy",
    }[flops]
    return {"N": n, "C": c}


def _source(frame: RunFrame, name: str) -> str:
    return f"column {frame.sources.get(name, name)!r}"


def sizes(frame: RunFrame, which: str = "auto") -> np.ndarray:
    """Model sizes N [n]: `total`, `non-embedding` or `ternary` parameters; `auto`: `resolve`."""
    which = resolve([frame], which)[0]
    if which not in SIZES:
        raise ScalingError(f"size: {which!r} is unknown; choose one of auto, {', '.join(SIZES)}")
    return _need(frame, SIZES[which], f"the size convention {which!r}")


@dataclass(frozen=True)
class OperationCosts:
    """What one multiply-accumulate costs, for the ternary axes.

    A training step has three products a weight: forward (ternary weight by 8-bit activation)
    and two backward (bf16 by bf16, as this project trains). Bits: a ternary weight carries
    log2(3). Energies in pJ at 45 nm from Horowitz, ISSCC 2014: a ternary product is one
    32-bit integer addition, a 16-bit float product one multiplication and one addition.
    """

    ternary_weight_bits: float = float(np.log2(3.0))
    activation_bits: float = 8.0
    float_bits: float = 16.0
    ternary_energy: float = 0.1
    float_energy: float = 1.1 + 0.4


def compute(
    frame: RunFrame, convention: str = "auto", costs: OperationCosts | None = None
) -> np.ndarray:
    """Training compute C [n] under a stated convention.

    * `auto`: see `resolve`.
    * `6nd`: 6 params tokens; `6nd-non-embedding`: 6 params_non_embedding tokens.
    * `exact`: the `flops` column (this project counts it per component).
    * `budget`: the `budget` column.
    * `bit-operations`: `exact`, but the forward products of ternary weights weigh
      (log2 3 x 8) / (16 x 16) of a bf16 product; backward products weigh 1. In bf16 FLOPs.
    * `energy`: the same with energies per operation, also in bf16-FLOP equivalents.

    The last two need `params_ternary`, and `flops` or (then 6 params_non_embedding tokens
    stands in) `params_non_embedding`.

    Raises:
        ScalingError: the columns that the convention needs are missing.

    Example:
      >>> import numpy as np
      >>> from mmfree_jax.experiments.scaling import compute, make_frame
      >>> size, tokens = (x.ravel() for x in np.meshgrid([1e6, 3e6, 1e7, 3e7], [1e8, 3e8, 1e9]))
      >>> loss = 1.7 + 400 * size**-0.34 + 410 * tokens**-0.28
      >>> frame = make_frame(params=size, tokens=tokens, loss=loss)
      >>> float(compute(frame, "6nd")[0])
      600000000000000.0
    """
    costs = costs or OperationCosts()
    convention = resolve([frame], flops=convention)[1]
    purpose = f"the FLOP convention {convention!r}"
    if convention == "6nd":
        return 6.0 * _need(frame, "params", purpose) * _need(frame, "tokens", purpose)
    if convention == "6nd-non-embedding":
        size = _need(frame, "params_non_embedding", purpose)
        return 6.0 * size * _need(frame, "tokens", purpose)
    if convention == "exact":
        return _need(frame, "flops", purpose)
    if convention == "budget":
        return _need(frame, "budget", purpose)
    if convention in ("bit-operations", "energy"):
        if convention == "energy":
            forward = costs.ternary_energy / costs.float_energy
        else:
            forward = costs.ternary_weight_bits * costs.activation_bits / costs.float_bits**2
        ternary = frame.params_ternary
        if np.any(~np.isfinite(ternary)) or np.any(ternary < 0):  # 0 is fine, a gap is not
            ternary = _need(frame, "params_ternary", purpose)
        spent = frame.flops
        if not np.all(np.isfinite(spent)):
            spent = 6.0 * _need(frame, "params_non_embedding", purpose) * frame.tokens
        return spent - 2.0 * (1.0 - forward) * ternary * _need(frame, "tokens", purpose)
    raise ScalingError(
        f"flops: {convention!r} is unknown; choose one of auto, {', '.join(CONVENTIONS)}"
    )


def inputs(
    frame: RunFrame, names: tuple[str, ...], *, size: str = "auto", flops: str = "auto"
) -> dict[str, np.ndarray]:
    """The inputs that a law needs (`params`, `compute`, columns), checked and in raw counts."""
    out = {}
    for name in names:
        if name == "params":
            out[name] = sizes(frame, size)
        elif name == "compute":
            out[name] = compute(frame, flops)
        elif name == "chance":
            out[name] = _shares(frame, name, " or give one for all with --chance")
        else:
            out[name] = _need(frame, name, "this law", " or choose another with --law")
    return out


def targets(frame: RunFrame, name: str) -> np.ndarray:
    """What a law is fitted to [n]: the column `loss`, or `accuracy` (0 is taken as 1e-9)."""
    if name == "loss":
        return _need(frame, name, "every law")
    return np.maximum(_shares(frame, name, " or choose another with --law"), 1e-9)


def refuse_constant(name: str, log_values: np.ndarray, whose: str = "runs") -> None:
    """Refuses a target that is the same in all runs [n]: any parameters that make one number fit.

    Raises:
        ScalingError: it is.
    """
    if len(log_values) > 1 and np.ptp(log_values) == 0:
        raise ScalingError(
            f"column: '{name}' is {np.exp(log_values[0]):g} in all {len(log_values)} {whose}, "
            "which no law can be told from; give runs that differ in it"
        )


def _shares(frame: RunFrame, name: str, way_out: str) -> np.ndarray:
    """A column of shares of 1, or an error that names the first row that has none."""
    column = getattr(frame, name)
    wrong = np.flatnonzero(~((column >= 0) & (column <= 1)))
    if np.isnan(column).all():
        raise ScalingError(f"column: '{name}' is missing and this law needs it; name its column "
                           f"with --columns.{name}{way_out}")  # fmt: skip
    if len(wrong):
        raise ScalingError(f"column: '{name}' is {column[wrong[0]]:g} in {where(frame, wrong[0])}; "
                           "write a share from 0 to 1, not a percentage")  # fmt: skip
    return column
