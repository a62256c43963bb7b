"""Files of the repository outside of docs/: those that the site shows, and links to the others."""

import json
import os
import re
import shutil
from pathlib import Path

DOCS = Path(__file__).resolve().parents[1]
ROOT = DOCS.parent
COPIES = DOCS / "generated"

SHOWN = (
    "ARCHITECTURE.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "pallas_kernels/README.md",
    "experiments/results/backward8/README.md",
    "experiments/results/exchange/README.md",
    "experiments/results/recipes/README.md",
    "experiments/results/models/61M/README.md",
    *(
        path.relative_to(ROOT).as_posix()
        for path in sorted((ROOT / "experiments" / "notebooks").glob("*.ipynb"))
    ),
)
"""Pages of the site, each below `generated/` under its own path."""

_LINK = re.compile(r"(!?\[[^\]]*\]\()(?!\w+:|#)([^)#\s]+)(#[^)\s]*)?\)")
_BLOCK = re.compile(r"^(```|~~~).*?^\1", re.M | re.S)


def copy_all() -> None:
    """Copies the files that the site shows to where Sphinx finds them; no others stay there."""
    for copy in COPIES.rglob("*"):
        if copy.is_file() and copy.relative_to(COPIES).as_posix() not in SHOWN:
            copy.unlink()
    for name in SHOWN:
        copy = COPIES / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        if not copy.exists() or copy.read_bytes() != (ROOT / name).read_bytes():
            shutil.copyfile(ROOT / name, copy)


def with_links(text: str, page: Path, repository: str) -> str:
    """`text` with its relative links leading to pages of the site, or else to the repository.

    Args:
      text: Markdown; links in its code blocks are left.
      page: the file that it is of, or the copy of one.
      repository: its address; "": none, and what is no page of the site is offered as a file.
    """
    original = ROOT / page.relative_to(COPIES) if page.is_relative_to(COPIES) else page

    def replace(link: re.Match[str]) -> str:
        start, target, anchor = link[1], link[2], link[3] or ""
        file = Path(os.path.normpath(original.parent / target))
        if not file.is_relative_to(ROOT):
            return link[0]
        if file.is_dir() and (file / "README.md").is_file():
            file /= "README.md"
        name = file.relative_to(ROOT).as_posix()
        if name == "README.md":
            file = DOCS / "index.md"
        elif name in SHOWN:
            file = COPIES / name
        elif not file.is_relative_to(DOCS) and repository:
            return f"{start}{repository}/blob/HEAD/{name}{anchor})"
        elif file.is_dir():
            return start.removeprefix("[").removesuffix("](")
        return f"{start}{os.path.relpath(file, page.parent)}{anchor})"

    parts, at = [], 0
    for block in _BLOCK.finditer(text):
        parts += [_LINK.sub(replace, text[at : block.start()]), block[0]]
        at = block.end()
    return "".join([*parts, _LINK.sub(replace, text[at:])])


def notebook(text: str, page: Path, repository: str) -> str:
    """A notebook's JSON with the links of its Markdown cells as `with_links` makes them."""
    document = json.loads(text)
    for cell in document["cells"]:
        if cell["cell_type"] == "markdown":
            cell["source"] = with_links("".join(cell["source"]), page, repository)
    return json.dumps(document)
