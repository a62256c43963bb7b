"""Warnings of many fits as few lines: each once, with whom it is about."""

import re
from collections.abc import Iterable, Sequence

_NUMBER = re.compile(r"(?<![\w.+-])-?\d+(?:\.\d+)?(?:e[+-]?\d+)?(?!\.?\w)")
_MOST = 3


def grouped(found: Iterable[tuple[str, ...]], everyone: Sequence[Sequence[str]] = ()) -> list[str]:
    """Lines for warnings, each a message behind the labels of whom it is about.

    Messages that differ in nothing but numbers become one line, with the numbers side by side
    (`spans 11.0 / 17.3 decades`), or the least and the greatest of more than three.

    Args:
        found: (label, ..., message), with as many labels each ("" for none), in order of
            importance.
        everyone: for each place of a label all that there are; a line about all names none.
    """
    lines: dict[tuple[str, ...], list[tuple[str, ...]]] = {}
    for row in dict.fromkeys(found):
        lines.setdefault(tuple(_NUMBER.split(row[-1])), []).append(row)
    return [_line(parts, members, everyone) for parts, members in lines.items()]


def _line(
    parts: tuple[str, ...], members: list[tuple[str, ...]], everyone: Sequence[Sequence[str]]
) -> str:
    labels = [dict.fromkeys(m[k] for m in members if m[k]) for k in range(len(everyone))]
    who = "; ".join(
        ", ".join(some) for some, whole in zip(labels, everyone, strict=True)
        if some and set(some) != set(whole)
    )  # fmt: skip
    numbers = zip(*(_NUMBER.findall(member[-1]) for member in members), strict=True)
    text = parts[0] + "".join(_several(n) + p for n, p in zip(numbers, parts[1:], strict=True))
    return f"{who}: {text}" if who else text


def _several(numbers: tuple[str, ...]) -> str:
    """Numbers that stand in one place of several messages."""
    different = list(dict.fromkeys(numbers))
    if len(different) <= _MOST:
        return " / ".join(different)
    return f"{min(different, key=float)} to {max(different, key=float)}"
