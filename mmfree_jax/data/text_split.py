"""Cutting text into documents: at separators, and where a document is too long."""

import re
from collections.abc import Iterator
from typing import Literal, NamedTuple


class Piece(NamedTuple):
    """A document, or a part of one that is too long."""

    text: bytes
    """UTF-8."""
    end: Literal["separator", "cut", "file"]
    """What it ends at."""


def compile_separator(separator: str) -> tuple[re.Pattern[bytes], int]:
    r"""A pattern that finds `separator` as UTF-8, and the length of its longest match (bytes).

    A line end in it stands for that of Windows too, "\r\n".
    """
    lines = separator.replace("\r\n", "\n").encode().split(b"\n")
    pattern = re.compile(rb"\r?\n".join(map(re.escape, lines)))
    return pattern, sum(map(len, lines)) + 2 * (len(lines) - 1)


def split_text(blocks: Iterator[bytes], separator: str | None, max_bytes: int) -> Iterator[Piece]:
    """Documents of a text: cut at `separator`, and where one is longer than `max_bytes`.

    A document that is too long is cut after a line end, else between characters. No part of
    a separator is in any document, wherever blocks end.
    """
    pattern, longest = compile_separator(separator) if separator else (None, 1)
    held = b""
    for block in blocks:
        # What is held already has no whole separator, and may end in a part of one.
        searched = max(0, len(held) - longest + 1)
        held += block
        start = 0
        for match in pattern.finditer(held, searched) if pattern else ():
            yield from _pieces(held[start : match.start()], max_bytes, "separator")
            start = match.end()
        held = held[start:]
        while len(held) >= max_bytes + longest:
            head = next(cut_document(held, max_bytes))
            yield Piece(head, "cut")
            held = held[len(head) :]
    if held:
        yield from _pieces(held, max_bytes, "file")


def _pieces(text: bytes, max_bytes: int, end: Literal["separator", "file"]) -> Iterator[Piece]:
    *parts, last = cut_document(text, max_bytes)
    for part in parts:
        yield Piece(part, "cut")
    yield Piece(last, end)


def cut_document(text: bytes, max_bytes: int) -> Iterator[bytes]:
    """`text` (UTF-8) in pieces of at most `max_bytes`, cut after line ends where possible."""
    start = 0
    while len(text) - start > max_bytes:
        stop = text.rfind(b"\n", start, start + max_bytes) + 1
        if stop <= start:
            stop = start + max_bytes
            # Not inside a character: its later bytes are 0b10xxxxxx, at most three.
            for _ in range(3):
                if stop - 1 > start and text[stop] & 0xC0 == 0x80:
                    stop -= 1
        yield text[start:stop]
        start = stop
    yield text[start:]
