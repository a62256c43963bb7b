"""Which token mixer each layer has: one for all, or a pattern that repeats over the depth.

A pattern is one text, so that a YAML file, a flag, a sweep's axis and a notebook write it alike:
mixers by name, joined by commas, with the number of layers behind a colon. "mlgru:3,attention" is
three MLGRUs and an attention layer, again and again. A shell leaves the text as it is, quoted or
not. A mixer of a user's own is MODULE:NAME, and behind a second colon may stand its number of
layers: "mlgru,leaky:LEAKY:2". What it names, `model/mixers.py` finds out.
"""

import functools
import re
from collections.abc import Sequence
from itertools import groupby

from mmfree_jax.errors import ConfigError

BUILT_IN = ("mlgru", "attention", "rwkv4", "mingru", "rglru", "hgrn2")
"""Names of the mixers in `model/`."""

BOUNDED = ("mlgru", "hgrn2")
"""Mixers whose forget gates have lower bounds, which rise from one such layer to the next."""

_OWN = re.compile(r"([A-Za-z_][\w.]*:[A-Za-z_]\w*)\s*(?:(:)(.*))?", re.DOTALL)
"""MODULE:NAME, and what stands behind a further colon."""

_LONGEST = 10_000
"""Layers of a model (`ranges.Layers`)."""


@functools.lru_cache(maxsize=256)
def period_of(text: str) -> tuple[str, ...]:
    """The mixers of the layers that repeat, as few as there can be: one where all are alike.

    Raises:
      ConfigError: the text is no pattern of mixers.
    """
    layers: list[str] = []
    for part in text.split(","):
        name, colon, count = (x.strip() for x in part.partition(":"))
        own = _OWN.fullmatch(part.strip())
        if name not in BUILT_IN and own is not None:
            name, colon, count = own[1], own[2] or "", (own[3] or "").strip()
        elif name not in BUILT_IN:
            raise ConfigError(
                f"model.mixer is {text!r}: choose one of {', '.join(BUILT_IN)}, MODULE:NAME of a "
                "mixer of your own, or a pattern of layers such as mlgru:3,attention"
            )
        if colon and not re.fullmatch("[1-9][0-9]{0,4}", count):
            raise ConfigError(
                f"model.mixer is {text!r}: write a number of layers behind {name}:, as in "
                "mlgru:3,attention"
            )
        layers += [name] * int(count or 1)
        if len(layers) > _LONGEST:
            raise ConfigError(f"model.mixer is {text!r}: set at most {_LONGEST:,} layers")
    return _smallest(tuple(layers))


def is_own(name: str) -> bool:
    """Whether a mixer's name is MODULE:NAME, a user's own."""
    return name not in BUILT_IN


def pattern_text(period: Sequence[str]) -> str:
    """The text of a period, each run of one mixer written once."""
    runs = ((name, len(list(run))) for name, run in groupby(period))
    return ",".join(name if count == 1 else f"{name}:{count}" for name, count in runs)


def _smallest(layers: tuple[str, ...]) -> tuple[str, ...]:
    lengths = (n for n in range(1, len(layers) + 1) if len(layers) % n == 0)
    return next(layers[:n] for n in lengths if layers[:n] * (len(layers) // n) == layers)
