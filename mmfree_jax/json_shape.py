"""Checking what a JSON file holds before it is used: its types, and a digest of itself."""

import json
from typing import Any

from mmfree_jax.files import sha256


def fault(value: Any, wanted: Any, name: str = "it") -> str | None:
    """What is wrong with a value; None: nothing.

    Args:
      value: as `json.loads` gives it.
      wanted: a type or a tuple of types; a list of one: of all elements; a dict: of these fields,
        beside any others.
      name: of the value, for the message.
    """
    if isinstance(wanted, dict):
        if not isinstance(value, dict):
            return f"{name} is not a mapping"
        for key, inner in wanted.items():
            if key not in value:
                return f"{key} is missing"
            if found := fault(value[key], inner, key):
                return found
        return None
    if isinstance(wanted, list):
        if not isinstance(value, list):
            return f"{name} is not a list"
        return next((found for v in value if (found := fault(v, wanted[0], name))), None)
    is_bool = isinstance(value, bool) and wanted is not bool
    return f"{name} is {value!r}"[:100] if is_bool or not isinstance(value, wanted) else None


def digest(values: dict[str, Any]) -> str:
    """SHA-256 of the fields, whatever their order and the white space between them.

    `export/chat.py`, which stands alone, works it out for itself.
    """
    return sha256(json.dumps(values, sort_keys=True).encode())
