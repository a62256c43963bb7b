"""Looks at the built site: every page is reached, named and found, nothing comes from elsewhere.

    python docs/site_pages/check.py FOLDER

Prints a line for each fault and ends with their number, at most 100. Standard library alone.
"""

import json
import os
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag

START = "index.html"
MADE = ("_modules/", "genindex.html", "search.html")
"""Beginnings of the pages that Sphinx makes: sources and lists, with headings of its own."""


class Page(HTMLParser):
    """What of one page is checked."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.anchors: set[str] = set()
        self.title = ""
        self.description = ""
        self._in_title = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Takes links, anchors and what the browser loads."""
        values = {name: value or "" for name, value in attrs}
        if "id" in values:
            self.anchors.add(values["id"])
        if tag == "a" and "href" in values:
            self.links.append(values["href"])
        is_sheet = tag == "link" and "stylesheet" in values.get("rel", "")
        if is_sheet or tag in ("script", "img", "iframe"):
            self.loaded += [values[name] for name in ("src", "href") if name in values]
        if tag == "meta" and values.get("name") == "description":
            self.description = values.get("content", "")
        self._in_title = tag == "title" and not self.title

    def handle_data(self, data: str) -> None:
        """Takes the title."""
        if self._in_title:
            self.title += data.strip()
            self._in_title = False


def is_elsewhere(target: str) -> bool:
    """Whether an address is not of this site."""
    return target.startswith(("http:", "https:", "//", "mailto:"))


def faults(folder: Path) -> list[str]:
    """A line for each thing that is wrong with the site in `folder`."""
    files = [file for file in sorted(folder.rglob("*.html")) if "_static" not in file.parts]
    pages = {
        file.relative_to(folder).as_posix(): Page(file.read_text(encoding="utf-8"))
        for file in files
    }
    found: list[str] = []
    reached, ahead = {START}, [START]
    while ahead:
        name = ahead.pop()
        for target in pages[name].links:
            path, anchor = urldefrag(unquote(target))
            if is_elsewhere(target) or not (path or anchor):
                continue
            file = (folder / name).parent / path if path else folder / name
            other = os.path.relpath(file, folder)
            if other not in pages:
                if not file.exists():
                    found.append(f"{name}: {target} leads nowhere")
                continue
            # The way back from a source names one module for all names in it.
            if anchor and not name.startswith(MADE) and anchor not in pages[other].anchors:
                found.append(f"{name}: {target} has no such place")
            if other not in reached:
                reached.add(other)
                ahead.append(other)
    own = [name for name in pages if not name.startswith(MADE)]
    found += [f"{name}: no link leads here" for name in own if name not in {*reached, "404.html"}]
    found += _heads({name: pages[name] for name in own})
    for name, page in pages.items():
        found += [f"{name}: loads {source}" for source in page.loaded if is_elsewhere(source)]
    return found + _search(folder, own)


def _heads(pages: dict[str, Page]) -> list[str]:
    """Pages without a title or a description, and those of one title."""
    found, titles = [], {}
    for name, page in pages.items():
        if not page.title or not page.description:
            found.append(f"{name}: no title, or no description")
        if (first := titles.setdefault(page.title, name)) != name:
            found.append(f"{name}: the title {page.title!r} is also that of {first}")
    return found


def _search(folder: Path, names: list[str]) -> list[str]:
    """Pages that the search of the site does not know."""
    text = (folder / "searchindex.js").read_text(encoding="utf-8")
    index = json.loads(text[text.index("(") + 1 : text.rindex(")")])
    known = {f"{name}.html" for name in index["docnames"]}
    return [f"{name}: not in the search" for name in names if name not in known]


if __name__ == "__main__":
    lines = faults(Path(sys.argv[1]))
    print("\n".join(lines) or f"{sys.argv[1]}: every page is reached, named and found")
    sys.exit(min(len(lines), 100))
