"""Rotary positions in a config.json, which has three spellings for them."""

from pathlib import Path
from typing import Any

from mmfree_jax.errors import ConfigError


def rope_theta(file: Path, raw: dict[str, Any], default: float) -> float:
    """The base of plain rotary positions, from whichever of three spellings a config has.

    Args:
      file: config.json, for messages.
      raw: its fields: `rope_theta`, and inside `rope_parameters` (newer) or `rope_scaling` (older).
      default: where none says it.

    Raises:
      ConfigError: another kind of positions, a base that is no number above 0, or two that differ.
    """
    found: dict[str, Any] = {"rope_theta": raw.get("rope_theta")}
    for name in ("rope_parameters", "rope_scaling"):
        values = raw.get(name)
        if not values:
            continue
        rest = dict(values) if isinstance(values, dict) else {"": values}
        kinds = [k for key in ("rope_type", "type") if (k := rest.pop(key, None)) is not None]
        found[f"{name}.rope_theta"] = rest.pop("rope_theta", None)
        plain = all(k == "default" for k in kinds) and (kinds or name == "rope_parameters")
        if not plain or {k: v for k, v in rest.items() if v is not None} not in (
            {},
            {"partial_rotary_factor": 1.0},
        ):
            raise ConfigError(
                f"{file}: {name} is {values!r}: not supported, only plain rotary positions "
                "(rope_type default)"
            )
    given = {name: value for name, value in found.items() if value is not None}
    for name, value in given.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
            raise ConfigError(f"{file}: {name} is {value!r}: a number above 0 is needed")
    if len(set(given.values())) > 1:
        shown = " and ".join(f"{name} is {value!r}" for name, value in given.items())
        raise ConfigError(f"{file}: {shown}: make them one value")
    return float(next(iter(given.values()), default))
