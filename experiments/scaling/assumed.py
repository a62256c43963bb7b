"""Laws that are assumed before runs are made: from a fit's JSON document, or written out."""

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mmfree_jax.experiments.scaling.errors import ScalingError
from mmfree_jax.experiments.scaling.fitted_law import read_fits
from mmfree_jax.experiments.scaling.information import AssumedLaws
from mmfree_jax.experiments.scaling.laws import get_law
from mmfree_jax.storage import is_url

_NAMES = get_law("chinchilla").parameters
EXAMPLE = "E=1.8,A=480,B=2100,alpha=0.35,beta=0.37"


def read_assumed(
    texts: Sequence[str], families: Sequence[str], *, shares_floor: bool
) -> tuple[AssumedLaws, str | None]:
    """The laws that families are taken to follow.

    Args:
        texts: `[FAMILY:]SOURCE` each; a source is the .json of `mmfree fit` with the law
            chinchilla, or `E=..,A=..,B=..,alpha=..,beta=..`. Without a family it is every
            family's, or as a joint fit says.
        families: that there are.
        shares_floor: whether they will be fitted with one E; where those assumed differ it is
            their mean.

    Returns:
        The laws, of the families that have one, and the parameters that N counts in the fits
        ("total", ...), None where none says.

    Raises:
        ScalingError: a text is malformed, or the fits count N differently.
    """
    found: dict[str, list[float]] = {}
    counts: set[str] = set()
    for text in texts:
        family, source = _split(text, families)
        for name, values, count in _read(source, [family] if family else families):
            if name in found:
                raise ScalingError(f"assume: {name} has two laws; give it one")
            found[name] = values
            counts |= {count} if count else set()
    if not found:
        raise ScalingError(f"assume: no law of {' or '.join(families)}; give a fit.json, or "
                           f"such as {EXAMPLE}")  # fmt: skip
    if len(counts) > 1:
        raise ScalingError(f"assume: N counts {' and '.join(sorted(counts))} parameters in these "
                           "fits; fit both with one --size")  # fmt: skip
    named = tuple(family for family in families if family in found)
    values = np.array([found[family] for family in named])
    if shares_floor:
        values[:, 0] = values[:, 0].mean()
    return AssumedLaws(named, values, shares_floor), next(iter(counts), None)


def _split(text: str, families: Sequence[str]) -> tuple[str | None, str]:
    """The family and the source of a text."""
    name, colon, source = text.partition(":")
    if not colon or is_url(text) or Path(text).is_file():
        return None, text
    if name not in families:
        raise ScalingError(f"assume: {name!r} is no family of the sweep; choose "
                           f"{' or '.join(families)}")  # fmt: skip
    return name, source


def _read(source: str, families: Sequence[str]) -> list[tuple[str, list[float], str | None]]:
    """(family, parameters, what N counts) of a source."""
    if source.endswith(".json"):
        return _from_fit(source, families)
    given = dict(re.findall(r"(\w+)=([^,]+)", source))
    try:
        values = [float(given.pop(name)) for name in _NAMES]
    except (KeyError, ValueError):
        given = {"": ""}
    if given:
        raise ScalingError(f"assume: {source!r} is no law; give a fit.json, or such as {EXAMPLE}")
    return [(family, values, None) for family in families]


def _from_fit(path: str, families: Sequence[str]) -> list[tuple[str, list[float], str | None]]:
    fits = read_fits(path)
    for fit in fits:
        if fit.law.name != "chinchilla":
            raise ScalingError(f"assume: {path} is a fit of {fit.law.name}; write one of "
                               "chinchilla by `mmfree fit --law chinchilla`")  # fmt: skip
    joint = {fit.family: fit for fit in fits}
    parts = {family: joint[family] for family in families if family in joint}
    return [
        (family, [float(v) for v in fit.parameters], fit.conventions["params"])
        for family, fit in (parts or dict.fromkeys(families, fits[0])).items()
    ]
