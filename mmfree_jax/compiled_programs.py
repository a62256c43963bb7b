"""Where JAX keeps compiled programs from one start to the next.

`mmfree` turns JAX's persistent cache on, in `~/.cache/mmfree_jax/compiled` (or below
`$XDG_CACHE_HOME`). Whoever sets `$JAX_COMPILATION_CACHE_DIR` chooses another folder, and
`JAX_ENABLE_COMPILATION_CACHE=false` keeps nothing. Programs for CPUs are compiled for the very
processor, which JAX's names of them do not tell: processors have folders of their own, since hosts
may share a home. Nothing here imports JAX, which reads its variables when it is imported.
"""

import hashlib
import os
import platform
import re
import time
from collections.abc import Mapping, MutableMapping
from pathlib import Path

from mmfree_jax.environment import own_cache

_FOLDER = "JAX_COMPILATION_CACHE_DIR"
_MOST = "JAX_COMPILATION_CACHE_MAX_SIZE"
_MOST_BYTES = 4 * 2**30
"""What was used least recently goes beyond it."""
_LEAST = "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"
_LEAST_SECONDS = 0.1
"""JAX's own is a second, and most of a small model's programs take less."""
_began: float | None = None


def default_folder(environ: Mapping[str, str]) -> Path | None:
    """The folder of compiled programs where nobody names one; None without a home."""
    cache = own_cache(environ)
    return None if cache is None else cache / "compiled" / processor()


def begin_command() -> None:
    """Notes that this process is the `mmfree` command, whose code is that on disk from now on."""
    global _began
    _began = time.time()


def command_began() -> float | None:
    """Unix time at which the command began; None: this process is another's."""
    return _began


def keep_programs(environ: MutableMapping[str, str]) -> None:
    """Makes a JAX that is imported from now on keep its programs, where that is possible.

    Args:
      environ: of the process.
    """
    if {_FOLDER, "JAX_ENABLE_COMPILATION_CACHE"} & environ.keys():
        return
    folder = default_folder(environ)
    if folder is not None and _can_be_written(folder):
        environ[_FOLDER] = str(folder)
        environ.setdefault(_MOST, str(_MOST_BYTES))
        environ.setdefault(_LEAST, str(_LEAST_SECONDS))


def is_chosen(environ: Mapping[str, str]) -> bool:
    """Whether the user has named a folder of compiled programs."""
    return environ.get(_FOLDER) not in (None, str(default_folder(environ)))


def _can_be_written(folder: Path) -> bool:
    there = next(path for path in (folder, *folder.parents) if path.exists())
    return there.is_dir() and os.access(there, os.W_OK | os.X_OK)


def processor() -> str:
    """A name for what programs of this host may use: model and extensions of its processor."""
    try:
        told = Path("/proc/cpuinfo").read_text(errors="replace")
    except OSError:
        told = platform.processor()
    lines = re.findall(r"^(?:model name|flags|Features|CPU part)\s*:.*$", told, re.MULTILINE)
    digest = hashlib.sha256("\n".join(sorted(set(lines)) or [told]).encode())
    return f"{platform.machine()}-{digest.hexdigest()[:12]}"
