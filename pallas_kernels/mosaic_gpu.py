"""Pallas Mosaic GPU, by the names of `jax.experimental.pallas.mosaic_gpu`.

It is imported when a kernel first asks for a name of it: that takes about as long as Flax
does, and only a process that compiles for a GPU has use for it.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jax.experimental.pallas.mosaic_gpu import *  # noqa: F403  # pyright: ignore[reportWildcardImportFromLibrary]
else:

    def __getattr__(name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(importlib.import_module("jax.experimental.pallas.mosaic_gpu"), name)
