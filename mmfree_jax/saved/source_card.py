"""What a model's folder says of itself, carried along where another is made of it.

A card (README.md) names licences and gives credit; so do LICENSE and NOTICE beside it. What is made
of the model has them with it, the card under another name: it speaks of the folder that it lay in.
A training run has records in place of a card.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmfree_jax.config_io import parse_yaml
from mmfree_jax.errors import ConfigError, DataError
from mmfree_jax.files import write_bytes
from mmfree_jax.saved.kinds import Kind
from mmfree_jax.text_files import decode_text, read_bytes

CARD = "README.md"
SOURCE_CARD = "SOURCE_README.md"
LEGAL_TEXTS = tuple(
    name + suffix
    for name in ("LICENSE", "LICENCE", "COPYING", "NOTICE")
    for suffix in ("", ".txt", ".md")
)
_LARGEST = 2**22  # bytes of a card, or of a legal text
_TOLD = re.compile(r"licen[cs]|attribution|copyright|credit", re.IGNORECASE)
_HEADING = re.compile(r"(#{1,6})\s+(.*)")
_FENCE = re.compile(r"\s{0,3}(```|~~~)")
_FRONT = re.compile(r"---\n(.*?)\n---(?:\n|$)", re.DOTALL)
_FIELDS = ("license", "license_name", "license_link")


@dataclass(frozen=True)
class SourceCard:
    """A card that is carried along.

    Attributes:
      license: what its front matter says of the licence, as the Hub reads it; links to files that
        are not carried along are left out.
      sections: of its text, those whose heading names licences, attribution, copyright or credits.
    """

    license: dict[str, str]
    sections: tuple[str, ...]


def read_source_card(folder: Path, kind: Kind) -> SourceCard | None:
    """The card of a model's folder; None where it has none.

    Raises:
      DataError: it is there and cannot be read.
    """
    path = _card(folder, kind)
    if path is None:
        return None
    try:
        text = decode_text(_read(path)).replace("\r\n", "\n")
    except UnicodeDecodeError as e:
        raise DataError(f"{path} cannot be read ({e}): repair or remove it") from e
    front = _FRONT.match(text)
    stated = {} if front is None else _stated(front[1], f"the front matter of {path}")
    link = stated.get("license_link", "")
    if not link.startswith("https://") and not (link in LEGAL_TEXTS and (folder / link).is_file()):
        stated.pop("license_link", None)
    body = text[front.end() :] if front else text
    return SourceCard(stated, tuple(_sections(body)))


def copy_source_card(source: Path, kind: Kind, folder: Path) -> None:
    """Puts a model's card, and the legal texts beside it, into the folder of what is made of it.

    Raises:
      DataError: one is there and cannot be read.
      OutputError: it cannot be written.
    """
    if (card := _card(source, kind)) is not None:
        write_bytes(folder / SOURCE_CARD, _read(card))
    if kind != "run":
        for name in LEGAL_TEXTS:
            if (source / name).is_file():
                write_bytes(folder / name, _read(source / name))


def _card(folder: Path, kind: Kind) -> Path | None:
    """The folder's own card, or that of the model which it was made of."""
    if kind == "run":
        return None
    found = (folder / name for name in (CARD, SOURCE_CARD))
    return next((path for path in found if path.is_file()), None)


def _read(path: Path) -> bytes:
    try:
        return read_bytes(path, _LARGEST)
    except OSError as e:
        raise DataError(f"{path} cannot be read ({e}): repair or remove it") from e


def _stated(front: str, source: str) -> dict[str, str]:
    try:
        values: Any = parse_yaml(front, source)
    except (ConfigError, DataError):
        return {}
    if not isinstance(values, dict) or not isinstance(values.get("license"), str):
        return {}
    return {name: values[name] for name in _FIELDS if isinstance(values.get(name), str)}


def _sections(text: str) -> list[str]:
    """The sections that tell of licences, each to the next heading of its level or above."""
    found: list[list[str]] = []
    level, fence = 0, ""
    for line in text.split("\n"):
        if mark := _FENCE.match(line):
            fence = "" if fence == mark[1] else fence or mark[1]
        heading = None if fence else _HEADING.fullmatch(line)
        if heading and len(heading[1]) <= (level or 6):
            level = len(heading[1]) if _TOLD.search(heading[2]) else 0
            if level:
                found.append([])
        if level:
            found[-1].append(line)
    return ["\n".join(lines).strip() for lines in found]
