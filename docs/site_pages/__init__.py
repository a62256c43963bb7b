"""Sphinx extension: what the site has beside the Markdown files of docs/.

A comment `<!-- site: NAME ARGUMENTS -->` in a page, which the forge does not show, is replaced by
what `MADE` makes of it. A page of `SECTIONS` gets a table of contents of the pages in its lists.
Links to files outside of docs/ lead to their copies here (`repository_files.py`).
"""

import functools
import os
import re
import sys
from pathlib import Path
from typing import Any

from site_pages import api, commands, repository_files, settings

DOCS = Path(__file__).resolve().parents[1]
SECTIONS = ("index", "tutorials", "how-to", "explanations", "reference", "api/index")
MADE = {
    "api": api.markdown,
    "commands": commands.markdown,
    "kernels": api.kernels,
    "settings": settings.markdown,
}

_COMMENT = re.compile(r"^<!-- site: (\w+)(?: (.*?))? -->$", re.M)
_LISTED = re.compile(r"^- \[[^\]]*\]\(([^)#\s]+\.(?:md|ipynb))\)", re.M)


def _read(app: Any, name: str, source: list[str]) -> None:
    """Completes the text of the page `name`."""
    page = DOCS / f"{name}.md"
    if not page.is_file():
        notebook = page.with_suffix(".ipynb")
        source[0] = repository_files.notebook(source[0], notebook, app.config.repository)
        return
    text = repository_files.with_links(source[0], page, app.config.repository)
    if name in SECTIONS:
        text += contents(text)
    source[0] = _COMMENT.sub(lambda found: MADE[found[1]](*(found[2] or "").split()), text)


def _plain(app: Any, what: str, name: str, value: Any, options: Any, lines: list[str]) -> None:
    """Makes of a docstring's lines what reStructuredText and napoleon take for the same text.

    A product, a norm or `*args` is no markup; an indented paragraph is set as it is; a colon in
    the text under a field does not end a type. Examples are left as they are.
    """
    shown = _examples(lines)
    for i, line in enumerate(lines):
        if i in shown:
            continue
        parts = line.split("`")  # every other one is in backticks
        parts[::2] = [re.sub(r"(?<!^)([*|])", r"\\\1", part) for part in parts[::2]]
        lines[i] = "`".join(parts)
    for i in range(len(lines) - 1, 1, -1):
        before = next((line for line in lines[i - 1 :: -1] if line), " ")
        if (
            i not in shown
            and lines[i].startswith(" ")
            and not lines[i - 1]
            and not before.startswith(" ")
        ):
            lines[i:i] = ["::", ""]
    if what in ("attribute", "property", "data"):
        lines[:0] = ["..", ""]  # an empty comment, which napoleon takes for all before the colon


def _as_documented() -> None:
    """Gives types of jax the names that its own reference has, not those of where they are made."""
    import jax

    jax.Array.__qualname__ = "Array"
    jax.sharding.Mesh.__module__ = "jax.sharding"


def _examples(lines: list[str]) -> set[int]:
    """Numbers of the lines of a docstring that are an interpreter's, with what it prints."""
    found, inside = set(), False
    for i, line in enumerate(lines):
        inside = line.lstrip().startswith(">>>") or (inside and bool(line.strip()))
        found |= {i} if inside else set()
    return found


def _for_notebooks() -> None:
    """Has them take the kernel and the commands of the environment that builds.

    What a command prints comes in pieces of a hundred bytes, which cut lines and colours in two:
    they are put together again.
    """
    from myst_nb.core.execute import direct

    whole = functools.partial(direct.single_nb_execution, coalesce_streams=True)
    direct.single_nb_execution = whole
    os.environ["JUPYTER_PREFER_ENV_PATH"] = "1"
    os.environ["PATH"] = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))


def contents(text: str) -> str:
    """A hidden table of contents of the pages that lists in `text` begin with."""
    pages = "\n".join(re.sub(r"\.\w+$", "", page) for page in _LISTED.findall(text))
    return f"\n\n```{{toctree}}\n:hidden:\n:maxdepth: 2\n\n{pages}\n```\n"


def setup(app: Any) -> dict[str, bool]:
    """Called by Sphinx."""
    from site_pages import head  # needs docutils, which only Sphinx's environment has

    _as_documented()
    _for_notebooks()
    app.add_config_value("repository", "", "env")
    app.connect("config-inited", lambda *_: repository_files.copy_all())
    app.connect("source-read", _read)
    app.connect("html-page-context", head.add)
    app.connect("autodoc-process-docstring", _plain, priority=400)  # before napoleon
    return {"parallel_read_safe": True}
