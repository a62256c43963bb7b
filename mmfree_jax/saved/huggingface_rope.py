"""Rotary positions in a config.json, which has three spellings for them."""

import math
from pathlib import Path
from typing import Any

from mmfree_jax.errors import ConfigError
from mmfree_jax.rope_scaling import UNSCALED, RopeScaling

# Kind of scaling -> its numbers there, and our fields. All of a kind's must be given.
_NUMBERS: dict[str, dict[str, str]] = {
    "none": {},
    "linear": {"factor": "factor"},
    "llama3": {
        "factor": "factor",
        "low_freq_factor": "low_freq_factor",
        "high_freq_factor": "high_freq_factor",
        "original_max_position_embeddings": "original_length",
    },
}


def read_rope(file: Path, raw: dict[str, Any], default: float) -> tuple[float, RopeScaling]:
    """The base and the scaling of rotary positions, from whichever spellings a config has.

    Args:
      file: config.json, for messages.
      raw: its fields: `rope_theta`, and `rope_parameters` (newer) or `rope_scaling` (older).
      default: base where none says it.

    Raises:
      ConfigError: another kind of positions, a number that is none above 0, or spellings that
        differ.
    """
    bases: dict[str, Any] = {"rope_theta": raw.get("rope_theta")}
    scalings: dict[str, RopeScaling] = {}
    for name in ("rope_parameters", "rope_scaling"):
        values = raw.get(name)
        if not values:
            continue
        rest = dict(values) if isinstance(values, dict) else {"": values}
        bases[f"{name}.rope_theta"] = rest.pop("rope_theta", None)
        scaling = _scaling(rest, may_be_untyped=name == "rope_parameters")
        if scaling is None:
            raise ConfigError(
                f"{file}: {name} is {values!r}: not supported, only rope_type default, linear "
                "(with factor) and llama3 (with "
                f"{', '.join(_NUMBERS['llama3'])}), whose numbers are above 0"
            )
        scalings[name] = scaling
    given = {name: value for name, value in bases.items() if value is not None}
    for name, value in given.items():
        if not _is_above_zero(value):
            raise ConfigError(f"{file}: {name} is {value!r}: a number above 0 is needed")
    if len(set(given.values())) > 1:
        shown = " and ".join(f"{name} is {value!r}" for name, value in given.items())
        raise ConfigError(f"{file}: {shown}: make them one value")
    if len(set(scalings.values())) > 1:
        shown = " and ".join(f"{name} is {raw[name]!r}" for name in scalings)
        raise ConfigError(f"{file}: {shown}: make them one value")
    theta = float(next(iter(given.values()), default))
    return theta, next(iter(scalings.values()), UNSCALED)


def _scaling(values: dict[str, Any], *, may_be_untyped: bool) -> RopeScaling | None:
    """The scaling that a mapping asks for; None: one that is not known, or not whole."""
    rest = {k: v for k, v in values.items() if v is not None}
    kinds = [rest.pop(key) for key in ("rope_type", "type") if key in rest]
    if rest.get("partial_rotary_factor") == 1:
        del rest["partial_rotary_factor"]
    if not kinds and may_be_untyped:
        kinds = ["default"]
    if not kinds or kinds.count(kinds[0]) != len(kinds) or not isinstance(kinds[0], str):
        return None
    kind = "none" if kinds[0] == "default" else kinds[0]
    names = _NUMBERS.get(kind)
    if names is None or rest.keys() != names.keys() or not all(map(_is_above_zero, rest.values())):
        return None
    numbers: dict[str, Any] = {ours: float(rest[theirs]) for theirs, ours in names.items()}
    if "original_length" in numbers:
        numbers["original_length"] = int(numbers["original_length"])
    return RopeScaling(kind, **numbers)  # type: ignore[arg-type]


def _is_above_zero(value: Any) -> bool:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and 0 < value < math.inf


def write_scaling(scaling: RopeScaling) -> dict[str, Any] | None:
    """The value of `rope_scaling`; None without scaling."""
    if scaling.kind == "none":
        return None
    numbers = {theirs: getattr(scaling, ours) for theirs, ours in _NUMBERS[scaling.kind].items()}
    return {"rope_type": scaling.kind} | numbers
