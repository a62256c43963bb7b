"""Running the Python code of a page of docs/, as its reader would."""

import importlib
import io
import re
import sys
from collections.abc import Mapping
from contextlib import chdir, redirect_stdout
from pathlib import Path
from typing import Any

from tutorial_pages import DOCS, blocks

_FILE = re.compile(r"# ([\w/]+\.py)\n")


def code_of(page: str) -> tuple[str, dict[str, str]]:
    """What a page runs, in one piece, and the files that it shows: their first line is a name."""
    shown = blocks((DOCS / page).read_text(encoding="utf-8"))
    code = [block.text for block in shown if block.language == "python"]
    files = {name[1]: text for text in code if (name := _FILE.match(text))}
    return "\n".join(text for text in code if not _FILE.match(text)), files


def run_page(
    page: str, folder: Path, shorter: Mapping[str, str] | None = None
) -> tuple[dict[str, Any], list[str]]:
    """What the code of a page names and prints in `folder`, which gets the page's files.

    Args:
      page: its path in docs/.
      folder: to run in; modules are found there meanwhile.
      shorter: parts of the code, all of which must be there, and what takes their place.
    """
    code, files = code_of(page)
    for shown, quicker in (shorter or {}).items():
        assert shown in code, shown
        code = code.replace(shown, quicker)
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    importlib.invalidate_caches()
    modules, names = set(sys.modules), {"__name__": page}
    sys.path.insert(0, str(folder))
    try:
        with chdir(folder), redirect_stdout(io.StringIO()) as printed:
            exec(compile(code, str(DOCS / page), "exec"), names)
    finally:
        sys.path.remove(str(folder))
        for name in set(sys.modules) - modules:
            if str(getattr(sys.modules[name], "__file__", None)).startswith(str(folder)):
                del sys.modules[name]
    return names, printed.getvalue().splitlines()
