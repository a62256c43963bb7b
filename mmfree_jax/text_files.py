"""Reading text that somebody else wrote: byte-order marks, and names given twice.

Editors and shells on Windows put a byte-order mark before UTF-8 or write UTF-16. Both are
decoded here, so that no reader sees the mark. Nothing here imports JAX.
"""

import codecs
import json
import os
from pathlib import Path
from typing import Any

# The mark of UTF-32 begins with that of UTF-16: longer ones first.
_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
LONGEST_MARK = 4
"""Bytes of the longest byte-order mark."""


def find_encoding(start: bytes) -> tuple[str, int]:
    """The encoding that the first bytes of a text say, and the length of their mark (bytes)."""
    for mark, encoding in _MARKS:
        if start.startswith(mark):
            return encoding, len(mark)
    return "utf-8", 0


def decode_text(data: bytes) -> str:
    """Text of bytes without their byte-order mark: UTF-8, or what the mark says.

    Raises:
      UnicodeDecodeError: they are not of that encoding.
    """
    encoding, mark = find_encoding(data[:LONGEST_MARK])
    return data[mark:].decode(encoding)


def read_text(path: str | os.PathLike[str]) -> str:
    r"""The text of a file: UTF-8 or what its byte-order mark says, with "\n" for every line end.

    Raises:
      OSError: it cannot be read.
      UnicodeDecodeError: it is not of its encoding.
    """
    return decode_text(Path(path).read_bytes()).replace("\r\n", "\n").replace("\r", "\n")


def parse_json(text: str) -> Any:
    """What a JSON text holds; a key that occurs twice in an object is an error.

    Raises:
      ValueError: it is not JSON, or a key occurs twice; the message names it.
    """
    return json.loads(text, object_pairs_hook=_object)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"key {twice!r} occurs twice in one object: keep one")
    return values
