"""Where a run's own steps begin: at nothing, or at a checkpoint of another run."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from mmfree_jax.json_shape import fault


@dataclass(frozen=True)
class Origin:
    """What a run took over from the one that it branched from; as it stands, nothing.

    Steps and tokens are counted on from the parent's. It travels in every checkpoint, so that a
    branch needs its parent no more once it has one of its own.

    Attributes:
      step: of the parent's checkpoint.
      tokens: trained on by then.
      flops: of training by then.
      row: of the shuffled order, with which the run's own steps begin.
      parent: the parent's folder, absolute, or its URL; None: the run began from nothing.
      checkpoint: SHA-256 of the manifest of the parent's checkpoint.
      config: the parent's resolved config, as plain values.
      account: the branch in one line.
    """

    step: int = 0
    tokens: int = 0
    flops: float = 0.0
    row: int = 0
    parent: str | None = None
    checkpoint: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    account: str = ""

    def tokens_at(self, step: int, per_step: int) -> int:
        """Tokens trained on after `step` steps, of which the run's own have `per_step` each."""
        return self.tokens + (step - self.step) * per_step

    def row_at(self, step: int, batch_size: int) -> int:
        """Row of the shuffled order that comes next after `step` steps."""
        return self.row + (step - self.step) * batch_size

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return dataclasses.asdict(self)


FROM_NOTHING = Origin()

_TYPES: dict[str, Any] = {
    "step": int,
    "tokens": int,
    "flops": (int, float),
    "row": int,
    "parent": str,
    "checkpoint": str,
    "config": dict,
    "account": str,
}


def origin_fault(values: Any) -> str | None:
    """What is wrong with an origin as JSON; None: nothing."""
    return fault(values, _TYPES, "origin")


def origin_from_json(values: dict[str, Any]) -> Origin:
    """The origin in plain values without a fault."""
    return Origin(**{name: values[name] for name in _TYPES})
