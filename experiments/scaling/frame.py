"""A table of training runs, and the conventions by which their compute is counted.

Columns are numpy arrays of one length; a missing number is NaN, a missing word "". Counts
are raw (parameters, tokens, FLOPs), never millions or billions.
"""

from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np

from mmfree_jax.experiments.scaling.errors import ScalingError

NUMBERS = (
    "params", "params_non_embedding", "params_ternary", "tokens", "flops", "loss", "loss_sd",
    "budget",
)  # fmt: skip
WORDS = ("family", "seed", "run", "provenance")
CONVENTIONS = ("6nd", "6nd-non-embedding", "exact", "bit-operations", "energy")
SIZES = ("total", "non-embedding", "ternary")


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
        family, seed, run, provenance: words; rows of one `run` are resampled together.
        notes: what reading and filtering did, in sentences.
    """

    params: np.ndarray
    params_non_embedding: np.ndarray
    params_ternary: np.ndarray
    tokens: np.ndarray
    flops: np.ndarray
    loss: np.ndarray
    loss_sd: np.ndarray
    budget: np.ndarray
    family: np.ndarray
    seed: np.ndarray
    run: np.ndarray
    provenance: np.ndarray
    notes: tuple[str, ...] = field(default=())

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
    """
    known = {f.name for f in fields(RunFrame)}
    for name in columns:
        if name not in known:
            raise ScalingError(f"column: {name!r} is unknown; known are {', '.join(sorted(known))}")
    if "loss" not in columns:
        raise ScalingError("column: 'loss' is missing; every run needs its final loss")
    loss = np.asarray(columns["loss"], dtype=float)
    out: dict = {"notes": tuple(columns.get("notes", ()))}
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
    return RunFrame(**out, notes=tuple(note for f in frames for note in f.notes))


def _need(frame: RunFrame, name: str, purpose: str) -> np.ndarray:
    """A column without gaps, or an error that says which flag supplies it."""
    column = getattr(frame, name)
    gaps = int(np.count_nonzero(~np.isfinite(column)))
    if gaps:
        missing = (
            "is missing"
            if gaps == len(frame)
            else f"is empty or not finite in {gaps} of {len(frame)} runs"
        )
        flag = name.replace("_", "-")
        raise ScalingError(
            f"column: '{name}' {missing} and {purpose} needs it; name its column with "
            f"--columns.{flag} or choose another convention with --flops"
        )
    if np.any(column <= 0):
        row = int(np.argmin(column))
        raise ScalingError(
            f"column: '{name}' is {column[row]:g} in {_where(frame, row)}; it must be positive"
        )
    return column


def _where(frame: RunFrame, row: int) -> str:
    """A row as its reader would look for it."""
    return str(frame.provenance[row]) or f"run {row + 1}"


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
            f"{_where(frame, row)}: they count several times; remove them unless they are "
            "runs of their own")  # fmt: skip


def sizes(frame: RunFrame, which: str = "total") -> np.ndarray:
    """Model sizes N [n]: `total`, `non-embedding` or `ternary` parameters."""
    if which not in SIZES:
        raise ScalingError(f"size: {which!r} is unknown; choose one of {', '.join(SIZES)}")
    name = {"total": "params", "non-embedding": "params_non_embedding",
            "ternary": "params_ternary"}[which]  # fmt: skip
    return _need(frame, name, f"the size convention {which!r}")


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
    frame: RunFrame, convention: str = "6nd", costs: OperationCosts | None = None
) -> np.ndarray:
    """Training compute C [n] under a stated convention.

    * `6nd`: 6 params tokens; `6nd-non-embedding`: 6 params_non_embedding tokens.
    * `exact`: the `flops` column (this project counts it per component).
    * `bit-operations`: `exact`, but the forward products of ternary weights weigh
      (log2 3 x 8) / (16 x 16) of a bf16 product; backward products weigh 1. In bf16 FLOPs.
    * `energy`: the same with energies per operation, also in bf16-FLOP equivalents.

    The last two need `params_ternary`, and `flops` or (then 6 params_non_embedding tokens
    stands in) `params_non_embedding`.

    Raises:
        ScalingError: the columns that the convention needs are missing.
    """
    costs = costs or OperationCosts()
    purpose = f"the FLOP convention {convention!r}"
    if convention == "6nd":
        return 6.0 * _need(frame, "params", purpose) * _need(frame, "tokens", purpose)
    if convention == "6nd-non-embedding":
        size = _need(frame, "params_non_embedding", purpose)
        return 6.0 * size * _need(frame, "tokens", purpose)
    if convention == "exact":
        return _need(frame, "flops", purpose)
    if convention in ("bit-operations", "energy"):
        if convention == "energy":
            forward = costs.ternary_energy / costs.float_energy
        else:
            forward = costs.ternary_weight_bits * costs.activation_bits / costs.float_bits**2
        ternary = frame.params_ternary
        if np.any(~np.isfinite(ternary)) or np.any(ternary < 0):  # 0 is fine, a gap is not
            ternary = _need(frame, "params_ternary", purpose)
        whole = frame.flops
        if not np.all(np.isfinite(whole)):
            whole = 6.0 * _need(frame, "params_non_embedding", purpose) * frame.tokens
        return whole - 2.0 * (1.0 - forward) * ternary * _need(frame, "tokens", purpose)
    raise ScalingError(f"flops: {convention!r} is unknown; choose one of {', '.join(CONVENTIONS)}")


def inputs(
    frame: RunFrame, names: tuple[str, ...], *, size: str = "total", flops: str = "6nd"
) -> dict[str, np.ndarray]:
    """The inputs that a law needs (`params`, `tokens`, `compute`), checked and in raw counts."""
    out = {}
    for name in names:
        if name == "params":
            out[name] = sizes(frame, size)
        elif name == "tokens":
            out[name] = _need(frame, "tokens", "this law")
        else:
            out[name] = compute(frame, flops)
    return out


def complete(frame: RunFrame) -> RunFrame:
    """Fill what follows from the rest by C = 6 N D, with a note, and drop runs without a loss.

    Raises:
        ScalingError: nothing is left, or a loss is not positive.
    """
    notes = []
    good = np.isfinite(frame.loss)
    if not good.all():
        notes.append(f"{int((~good).sum())} of {len(frame)} runs have no finite loss: left out")
        frame = frame.take(good)
    if not len(frame):
        raise ScalingError("runs: no row has a finite loss; nothing can be fitted")
    if np.any(frame.loss <= 0):
        row = int(np.argmin(frame.loss))
        raise ScalingError(f"column: 'loss' is {frame.loss[row]:g} in {_where(frame, row)}; it "
                           "must be positive (nats a token)")  # fmt: skip
    repeated = _repeated(frame)
    if repeated:
        notes.append(repeated)
    has = {n: np.isfinite(getattr(frame, n)) for n in ("params", "tokens", "flops")}
    derive = ~has["tokens"] & has["params"] & has["flops"]
    if derive.any():
        tokens = np.where(derive, frame.flops / (6 * frame.params), frame.tokens)
        notes.append(f"tokens of {int(derive.sum())} runs derived as FLOPs / (6 params)")
        frame = replace(frame, tokens=tokens)
    derive = ~has["params"] & has["tokens"] & has["flops"]
    if derive.any():
        params = np.where(derive, frame.flops / (6 * frame.tokens), frame.params)
        notes.append(f"params of {int(derive.sum())} runs derived as FLOPs / (6 tokens)")
        frame = replace(frame, params=params)
    with np.errstate(invalid="ignore"):
        if np.any(frame.params < 1e4):
            notes.append("some params are below 10,000: counts must be raw, not in millions")
    return frame.noted(*notes)
