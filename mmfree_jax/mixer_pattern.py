"""Which token mixer each layer has: one for all, or a pattern that repeats over the depth.

A pattern is one text, so that a YAML file, a flag, a sweep's axis and a notebook write it alike:
mixers by name, joined by commas, with the number of layers behind a colon. "mlgru:3,attention" is
three MLGRUs and an attention layer, again and again. A shell leaves the text as it is, quoted or
not.
"""

import functools
import re
from collections.abc import Sequence
from itertools import groupby
from typing import Literal, cast, get_args

from mmfree_jax.errors import ConfigError

MixerName = Literal["mlgru", "attention", "rwkv4", "mingru", "rglru", "hgrn2"]

BOUNDED: tuple[MixerName, ...] = ("mlgru", "hgrn2")
"""Mixers whose forget gates have lower bounds, which rise from one such layer to the next."""

_LONGEST = 10_000
"""Layers of a model (`ranges.Layers`)."""


@functools.lru_cache(maxsize=256)
def period_of(text: str) -> tuple[MixerName, ...]:
    """The mixers of the layers that repeat, as few as there can be: one where all are alike.

    Raises:
      ConfigError: the text is no pattern of mixers.
    """
    layers: list[str] = []
    for part in text.split(","):
        name, colon, count = (x.strip() for x in part.partition(":"))
        if name not in get_args(MixerName):
            raise ConfigError(
                f"model.mixer is {text!r}: choose one of {', '.join(get_args(MixerName))}, or a "
                "pattern of layers such as mlgru:3,attention"
            )
        if colon and not re.fullmatch("[1-9][0-9]{0,4}", count):
            raise ConfigError(
                f"model.mixer is {text!r}: write a number of layers behind {name}:, as in "
                "mlgru:3,attention"
            )
        layers += [name] * int(count or 1)
        if len(layers) > _LONGEST:
            raise ConfigError(f"model.mixer is {text!r}: set at most {_LONGEST:,} layers")
    return _smallest(cast(tuple[MixerName, ...], tuple(layers)))


def pattern_text(period: Sequence[MixerName]) -> str:
    """The text of a period, each run of one mixer written once."""
    runs = ((name, len(list(run))) for name, run in groupby(period))
    return ",".join(name if count == 1 else f"{name}:{count}" for name, count in runs)


def _smallest(layers: tuple[MixerName, ...]) -> tuple[MixerName, ...]:
    lengths = (n for n in range(1, len(layers) + 1) if len(layers) % n == 0)
    return next(layers[:n] for n in lengths if layers[:n] * (len(layers) // n) == layers)
