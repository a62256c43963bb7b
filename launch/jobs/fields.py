"""Checks of the values that job files are made of."""

import dataclasses
import re
from typing import Any

from mmfree_jax.errors import ConfigError
from mmfree_jax.ranges import check_numbers


def require(values: Any, platform: str, *names: str) -> None:
    """Refuses values of which the named are missing, or any is out of range or of several lines.

    Raises:
      ConfigError: names them.
    """
    if missing := [name for name in names if getattr(values, name) in (None, "")]:
        flags = ", ".join("--" + name.replace("_", "-") for name in missing)
        raise ConfigError(
            f"{platform} needs {', '.join(missing)}: give {flags}, or a --values file"
        )
    check_numbers(values)
    for field in dataclasses.fields(values):
        value = getattr(values, field.name)
        if isinstance(value, str) and re.search(r"[\0-\x08\x0a-\x1f\x7f\x85\u2028\u2029]", value):
            raise ConfigError(
                f"{field.name} is {value!r}: give one line, without control characters"
            )


def plain(name: str, value: str, pattern: str = r"[A-Za-z0-9_.+-]+", form: str = "") -> str:
    """A value that stands where nothing can be quoted.

    Args:
      name: the field's.
      value: the value.
      pattern: what it must match.
      form: what that is, in words; default: for the default pattern.

    Raises:
      ConfigError: it has another form.
    """
    if not re.fullmatch(pattern, value):
        form = form or "use A to Z, a to z, digits and . _ + - only"
        raise ConfigError(f"{name} is {value!r}: {form}")
    return value
