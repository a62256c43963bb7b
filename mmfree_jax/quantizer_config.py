"""When the layers that are to be ternary become so: which form of them each step trains.

  float    weights and activations are not rounded at all
  blended  x + strength (Q(x) - x) in place of each, the strength going from 0 to 1
  ternary  both are rounded: the model itself, which all but training's first steps have

The steps of a form lie together, in this order, and every form has a program of its own.
"""

from dataclasses import dataclass
from typing import Any, Literal

from mmfree_jax.ranges import ShareBelowOne, check_numbers, require

Form = Literal["float", "blended", "ternary"]


@dataclass(frozen=True)
class QuantizerConfig:
    """How training comes to the ternary form, which is what is evaluated, packed and exported."""

    float_fraction: ShareBelowOne = 0.0
    """Share of all steps that come first with float weights and activations; the norms stay, and
    optimiser and schedule go on as if nothing had changed (docs/recipes.md)."""
    warmup_fraction: ShareBelowOne = 0.0
    """Share of all steps, behind those, over which the quantisers set in: x + strength (Q(x) - x)
    for weights and activations, the strength rising from 0 to 1."""

    def __post_init__(self) -> None:
        check_numbers(self, "quantizer.")
        require(
            self.float_fraction + self.warmup_fraction < 1,
            "quantizer.warmup_fraction",
            self.warmup_fraction,
            f"set --quantizer.warmup-fraction below {1 - self.float_fraction:.4g}: some steps must "
            f"be left to the ternary form (quantizer.float_fraction is {self.float_fraction:g})",
        )

    @property
    def is_immediate(self) -> bool:
        """Whether all steps train the ternary form."""
        return not (self.float_fraction or self.warmup_fraction)

    def float_steps(self, steps: int) -> int:
        """How many of a run's `steps` are of the float form."""
        return round(self.float_fraction * steps)

    def ternary_from(self, steps: int) -> int:
        """How many of a run's `steps` come before the first of the ternary form."""
        return round((self.float_fraction + self.warmup_fraction) * steps)

    def form_at(self, done: int, steps: int) -> Form:
        """What the step behind `done` others trains, in a run of `steps`."""
        if done < self.float_steps(steps):
            return "float"
        return "blended" if done < self.ternary_from(steps) else "ternary"

    def strength(self, done: int, steps: int) -> float:
        """Strength of the quantisers in the step behind `done` others; see `strength_at`."""
        return float(strength_at(done, self.float_steps(steps), self.ternary_from(steps)))

    def forms(self, start: int, end: int, steps: int) -> tuple[Form, ...]:
        """The forms that the steps behind `start` and up to `end` train, in their order."""
        edges = (0, self.float_steps(steps), self.ternary_from(steps))
        firsts = [done for done in edges if start < done < end]
        return tuple(dict.fromkeys(self.form_at(done, steps) for done in (start, *firsts)))


AT_ONCE = QuantizerConfig()
"""All steps train the ternary form."""


def strength_at(done: Any, float_steps: Any, ternary_from: Any) -> Any:
    """Strength of the quantisers in the step behind `done` others, numbers or arrays.

    Rises linearly from 0 in the first step that is not of the float form to 1 in the first that is
    of the ternary one.
    """
    stretch = ternary_from - float_steps
    rising = (done - float_steps) / (stretch + (stretch == 0))
    return (done >= ternary_from) + (done < ternary_from) * (done >= float_steps) * rising
