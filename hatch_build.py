"""What the page of a package index shows: project addresses, and a README whose links lead there.

The repository's own address stands in pyproject.toml, `tool.hatch.metadata.hooks.custom`. While it
is empty, nothing is known to link to: the README stays as it is and no address is made up.
"""

import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

PAPER = "https://arxiv.org/abs/2406.02528"
_LINK = re.compile(r"(!?)\[([^\]]*)\]\((?!https?:|#)([^)\s]+)\)")


class IndexPage(MetadataHookInterface):
    """Hatch finds it by being the only hook here."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Fills in `readme` and `urls`."""
        address = self.config["repository"]
        tag = f"v{metadata['version']}"
        text = Path(self.root, "README.md").read_text(encoding="utf-8")
        metadata["urls"] = {"Paper": PAPER} | (addresses(address, tag) if address else {})
        metadata["readme"] = {
            "content-type": "text/markdown",
            "text": absolute_links(text, address, tag) if address else text,
        }


def addresses(address: str, tag: str) -> dict[str, str]:
    """The project's pages, as GitHub and those who follow it name them.

    Raises:
      ValueError: the address is not like https://HOST/OWNER/NAME.
    """
    if not re.fullmatch(r"https://[\w.-]+/[\w.-]+/[\w.-]+", address):
        raise ValueError(f"repository is {address!r}: give an address like https://HOST/OWNER/NAME")
    return {
        "Repository": address,
        "Documentation": f"{address}/tree/{tag}/docs",
        "Changelog": f"{address}/blob/{tag}/CHANGELOG.md",
        "Issues": f"{address}/issues",
    }


def absolute_links(text: str, address: str, tag: str) -> str:
    """Markdown whose relative links lead to the repository at `tag`; pictures, to the file."""

    def replace(link: re.Match[str]) -> str:
        picture, label, target = link.groups()
        return f"{picture}[{label}]({address}/{'raw' if picture else 'blob'}/{tag}/{target})"

    return _LINK.sub(replace, text)
