"""What stands in the head of a page for search engines and for those who share its address."""

from html import escape
from typing import Any
from urllib.parse import urlsplit

from docutils import nodes

MISSING = "404"
"""The page that a host shows for every address that it does not have."""
LONGEST = 200


def add(app: Any, name: str, template: str, context: dict[str, Any], doctree: Any) -> None:
    """Adds a description and OpenGraph's names to the page `name`."""
    if doctree is None:
        return  # a list that Sphinx makes
    title = next(doctree.findall(nodes.title), None)
    told = {"og:title": title.astext() if title else app.config.project}
    told |= {"og:type": "article", "og:site_name": app.config.project}
    tags = ""
    if text := description(doctree):
        tags += f'<meta name="description" content="{escape(text)}" />\n'
        told["og:description"] = text
    if context.get("pageurl"):
        told["og:url"] = context["pageurl"]
    for key, value in told.items():
        tags += f'<meta property="{key}" content="{escape(value)}" />\n'
    if name == MISSING:  # also below folders that are not there
        root = urlsplit(app.config.html_baseurl).path.rstrip("/")
        tags += f'<base href="{escape(root)}/" />\n'
    context["metatags"] = context.get("metatags", "") + tags


def description(doctree: Any) -> str:
    """The beginning of the first paragraph, whole words."""
    for paragraph in doctree.findall(nodes.paragraph):
        text = " ".join(paragraph.astext().split())
        if len(text) <= LONGEST:
            return text
        return text[:LONGEST].rpartition(" ")[0].rstrip(",;:") + " ..."
    return ""
