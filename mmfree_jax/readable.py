"""Numbers, values and texts for people."""

import math
import unicodedata
from typing import Any


def brief(value: Any, longest: int = 100) -> str:
    """A value as Python writes it, cut where it is longer than a message may be."""
    text = repr(value)
    return text if len(text) <= longest else f"{text[:longest]}..."


def perplexity(loss: float) -> float:
    """exp(loss), infinite where a float cannot hold it, NaN of NaN."""
    return math.exp(loss) if not loss >= 700 else math.inf


def bits_per_byte(loss: float, bytes_per_token: float) -> float | None:
    """Nats a token to bits a byte of text; None when the data set's text size is unknown."""
    return loss / math.log(2) / bytes_per_token if bytes_per_token else None


def format_count(value: float) -> str:
    """A number with a unit: 12_345 -> 12.3k."""
    for limit, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit:
            return f"{value / limit:.1f}{unit}"
    return f"{value:.0f}"


def format_seconds(seconds: float) -> str:
    """A duration: 3_725 -> 1h02m."""
    total = round(max(0.0, seconds))
    minutes, s = divmod(total, 60)
    hours, m = divmod(minutes, 60)
    if hours >= 48:
        return f"{hours // 24}d{hours % 24:02d}h"
    if hours:
        return f"{hours}h{m:02d}m"
    return f"{m}m{s:02d}s" if m else f"{s}s"


def printable(text: str) -> str:
    """A text that moves no cursor and turns no line: what could is written as Python escapes it.

    Line ends and tabs stay, and so do the joiners inside of emoji and of some scripts.
    """
    return "".join(
        c if c in "\n\t\u200c\u200d" or unicodedata.category(c) not in _HARMFUL else _escaped(c)
        for c in text.replace("\r\n", "\n")
    )


_HARMFUL = ("Cc", "Cf", "Cs", "Zl", "Zp")  # controls, directions, halves of pairs, line ends


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode()


def indented(text: str) -> str:
    """A text under a heading: made `printable`, each line behind two spaces."""
    return "\n".join(f"  {line}".rstrip() for line in printable(text).split("\n"))
