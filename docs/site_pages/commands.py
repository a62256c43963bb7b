"""The reference of the command line, from the commands themselves."""

import contextlib
import io
import os
from unittest import mock

from mmfree_jax.cli import main
from mmfree_jax.launch.render import PLATFORMS


def names() -> list[str]:
    """Every command with a help of its own."""
    return sorted([*main.commands(), *(f"launch render {platform}" for platform in PLATFORMS)])


def help_text(name: str) -> str:
    """What `mmfree NAME --help` prints."""
    out = io.StringIO()
    width = {"COLUMNS": "96", "TERM": "dumb"}
    with mock.patch.dict(os.environ, width), contextlib.redirect_stdout(out):
        code = main.main([*name.split(), "--help"])
    if code != 0:
        raise RuntimeError(f"mmfree {name} --help ended with {code}")
    return out.getvalue()


def markdown() -> str:
    """A heading for each command, and its help."""
    return "\n\n".join(
        f"## mmfree {name}\n\n```text\n{help_text(name).strip()}\n```" for name in names()
    )
