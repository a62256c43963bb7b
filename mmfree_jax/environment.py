"""What environment variables say that more than one room asks for."""

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path

from mmfree_jax.errors import ConfigError

LONGEST = 3600
"""Seconds, at most."""


def seconds_of(variable: str) -> float:
    """The seconds that an environment variable holds, 60 if it is not set.

    Raises:
      ConfigError: it holds no number of seconds from 0.1 to `LONGEST`.
    """
    text = os.environ.get(variable, "60")
    with contextlib.suppress(ValueError):
        if 0.1 <= float(text) <= LONGEST:
            return float(text)
    raise ConfigError(f"{variable} is {text!r}: set a number of seconds from 0.1 to {LONGEST}")


def own_cache(environ: Mapping[str, str] = os.environ) -> Path | None:
    """Our folder among the user's caches: `mmfree_jax` in `$XDG_CACHE_HOME`, else in `~/.cache`.

    Returns:
      None where there is none: without a home, or if the variable holds no absolute path.
    """
    try:
        found = Path(environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:
        return None
    return found / "mmfree_jax" if found.is_absolute() else None
