"""How rotary angles are stretched for rows longer than those that a model was first trained on."""

from dataclasses import dataclass
from typing import Literal

from mmfree_jax.errors import ConfigError
from mmfree_jax.ranges import AboveZero, Count, check_numbers


@dataclass(frozen=True)
class RopeScaling:
    """Scaling of the rotary frequencies, as of Llama 3.1 or linear."""

    kind: Literal["none", "linear", "llama3"] = "none"
    """linear: all frequencies are divided by factor. llama3: those with fewer than low_freq_factor
    turns within original_length are, those with more than high_freq_factor are left, and what lies
    between is interpolated."""
    factor: AboveZero = 1.0
    """Divides frequencies."""
    low_freq_factor: AboveZero = 1.0
    """llama3: turns within original_length up to which a frequency is divided."""
    high_freq_factor: AboveZero = 4.0
    """llama3: turns within original_length from which a frequency is left as it is."""
    original_length: Count = 8192
    """llama3: length of the rows that the model was first trained on (tokens)."""

    def __post_init__(self) -> None:
        check_numbers(self, "model.rope_scaling.")
        if self.kind == "none" and self.factor != 1:
            raise ConfigError(
                f"model.rope_scaling.factor is {self.factor!r} but kind is 'none': set "
                "--model.rope-scaling.kind linear or llama3"
            )
        if not self.low_freq_factor < self.high_freq_factor:
            raise ConfigError(
                f"model.rope_scaling.high_freq_factor is {self.high_freq_factor!r}: set "
                "--model.rope-scaling.high-freq-factor above low_freq_factor "
                f"({self.low_freq_factor!r})"
            )


UNSCALED = RopeScaling()
