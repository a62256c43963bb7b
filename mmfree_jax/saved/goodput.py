"""Goodput: the share of a run's wall time that went into steps which count.

The time of all attempts of a run (starts and restarts) is split by what it went into; the parts
add up to the whole. What an attempt that died leaves behind is known from its records and from
the checkpoint that the next one goes on from: what it did beyond that step was lost.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mmfree_jax.json_shape import fault
from mmfree_jax.readable import format_seconds
from mmfree_jax.saved.history import Record

_WORK = ("step", "data", "eval", "checkpoint")
KINDS = (*_WORK, "compile", "restore", "other", "lost")
RECORD = "goodput"


@dataclass(frozen=True)
class Goodput:
    """Seconds of a run so far, by what they went into.

    Attributes:
      step: steps that count, with the host's work beside them.
      data: waiting for batches while no step ran.
      eval: held-out losses, samples, shares of ternary weights.
      checkpoint: what saving kept the loop waiting for.
      compile: the training step.
      restore: reading checkpoints.
      other: opening the data, building the model, logging.
      lost: all of that work, done after the checkpoint that a later attempt went on from.
      down: from the last sign of one attempt to the start of the next; not among the shares.
      attempts: how often the run was started.
    """

    step: float = 0.0
    data: float = 0.0
    eval: float = 0.0
    checkpoint: float = 0.0
    compile: float = 0.0
    restore: float = 0.0
    other: float = 0.0
    lost: float = 0.0
    down: float = 0.0
    attempts: int = 0

    @property
    def total(self) -> float:
        """Seconds in which the run was running."""
        return sum(getattr(self, kind) for kind in KINDS)

    @property
    def shares(self) -> dict[str, float]:
        """Of the total, by kind; they add up to 1."""
        total = self.total
        return {kind: getattr(self, kind) / total if total else 0.0 for kind in KINDS}

    def plus(self, taken: dict[str, float]) -> "Goodput":
        """With the seconds of a stopwatch's sections added."""
        return dataclasses.replace(
            self, **{kind: getattr(self, kind) + taken[kind] for kind in KINDS if kind in taken}
        )

    def to_json(self) -> dict[str, Any]:
        """As plain values: what a checkpoint's manifest keeps."""
        return dataclasses.asdict(self)

    def to_record(self) -> Record:
        """The fields of a record."""
        return {
            **{f"{kind}_s": getattr(self, kind) for kind in (*KINDS, "total", "down")},
            **{f"{kind}_share": share for kind, share in self.shares.items()},
            "attempts": self.attempts,
        }

    def __str__(self) -> str:
        parts = [f"{kind} {share:.1%}" for kind, share in self.shares.items() if share >= 5e-4]
        attempts = "1 attempt" if self.attempts == 1 else f"{self.attempts} attempts"
        down = f", {format_seconds(self.down)} between them" if self.down >= 1 else ""
        total = format_seconds(self.total)
        return f"goodput {self.shares['step']:.1%} of {total} in {attempts}{down}: " + (
            ", ".join(parts)
        )


NO_TIME = Goodput()
_FIELDS: dict[str, Any] = {field.name: (int, float) for field in dataclasses.fields(Goodput)}
_RECORDED: dict[str, Any] = {
    **{f"{kind}_s": (int, float) for kind in (*KINDS, "down")},
    **dict.fromkeys(("attempts", "unix_time", "time_s"), (int, float)),
}


def goodput_fault(values: Any) -> str | None:
    """What is wrong with the goodput in a manifest; None: nothing."""
    return fault(values, _FIELDS, RECORD)


def goodput_from_json(values: dict[str, Any]) -> Goodput:
    """The goodput in plain values without a fault."""
    return Goodput(**{name: values[name] for name in _FIELDS})


def up_to_now(
    history: Sequence[Record], restored_step: int, saved: Goodput, unix_time: float
) -> Goodput:
    """What is known of the attempts before the one that starts now.

    Args:
      history: the run's records, those beyond the restored step too.
      restored_step: that this attempt goes on from.
      saved: what the checkpoint of that step knew.
      unix_time: at which this attempt started (s).
    """
    found = [r for r in history if r.get("kind") == RECORD and fault(r, _RECORDED) is None]
    if not found:
        return dataclasses.replace(saved, attempts=saved.attempts + 1)
    newest = found[-1]
    known = Goodput(
        **{kind: newest[f"{kind}_s"] for kind in (*KINDS, "down")}, attempts=newest["attempts"]
    )
    # An attempt's later records tell how long it lived on at least.
    after = max(0.0, (history[-1].get("time_s") or 0.0) - newest["time_s"])
    changes: dict[str, Any] = {
        "attempts": known.attempts + 1,
        "down": known.down + max(0.0, unix_time - newest["unix_time"] - after),
    }
    if any((r.get("step") or 0) > restored_step for r in history):
        kept = {kind: getattr(saved, kind) for kind in _WORK}
        undone = sum(getattr(known, kind) - seconds for kind, seconds in kept.items())
        changes |= kept | {"lost": known.lost + undone + after}
    else:
        changes["other"] = known.other + after
    return dataclasses.replace(known, **changes)
