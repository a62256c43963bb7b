"""What was read of each input, and what was left out and why."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from mmfree_jax.config_io import to_dict
from mmfree_jax.errors import DataError

_NAMES = 3
"""Files that are named of those that were passed over."""


@dataclass
class Tally:
    """Documents of an input, and what was left out of it."""

    documents: int = 0
    empty: int = 0
    """Documents without text."""
    cut: int = 0
    """Cuts in documents that are too long."""
    bad_records: int = 0
    """Malformed records that were left out."""
    unknown_tokens: int = 0
    lost_characters: int = 0
    """Characters that the tokenizer has no token for, not even an unknown one."""
    separators: int = 0
    """Separators that ended a document."""
    reasons: dict[str, int] = field(default_factory=dict)
    """Malformed records by what is wrong with them."""

    def add(self, other: "Tally") -> None:
        """Adds what `other` counts."""
        for name, value in vars(other).items():
            if name != "reasons":
                setattr(self, name, getattr(self, name) + value)
        for reason, count in other.reasons.items():
            self.reasons[reason] = self.reasons.get(reason, 0) + count

    def leave_out(self, reason: str) -> None:
        """Counts a malformed record."""
        self.bad_records += 1
        self.reasons[reason] = self.reasons.get(reason, 0) + 1

    def counts(self) -> dict[str, int]:
        """The counts that `index.json` holds of a whole data set."""
        names = ("documents", "empty", "cut", "bad_records", "unknown_tokens")
        return {name: getattr(self, name) for name in names}

    def left_out(self) -> str:
        """What was left out, in words; empty if nothing was."""
        why = ", ".join(f"{count:,} {reason}" for reason, count in sorted(self.reasons.items()))
        parts = []
        if self.bad_records:
            parts.append(f"{_count(self.bad_records, 'malformed record')} ({why})")
        if self.empty:
            parts.append(_count(self.empty, "empty document"))
        if self.lost_characters:
            lost = _count(self.lost_characters, "character")
            parts.append(f"{lost} that the tokenizer has no token for")
        return " and ".join(parts)


@dataclass(frozen=True)
class Skipped:
    """Files under an input that were not read, for one reason."""

    why: str
    files: int
    first: tuple[str, ...]
    """Names of the first few."""


def skip(why: str, names: Sequence[str]) -> Skipped:
    """Notes files that are not read."""
    return Skipped(why, len(names), tuple(names[:_NAMES]))


@dataclass(frozen=True)
class InputReading:
    """An input: what is read of it, and what is not."""

    input: str
    """As it was given."""
    files: int
    """That are read."""
    txt_files: int
    """Those of them that are plain text."""
    splits: tuple[str, ...]
    """That are read, where the input has splits."""
    skipped: tuple[Skipped, ...]
    tally: Tally

    def to_json(self) -> dict[str, Any]:
        """As `index.json` holds it."""
        return to_dict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "InputReading":
        """Back from `index.json`."""
        skipped = tuple(Skipped(s["why"], s["files"], tuple(s["first"])) for s in values["skipped"])
        rest = {"splits": tuple(values["splits"]), "tally": Tally(**values["tally"])}
        return cls(**{**values, **rest, "skipped": skipped})


def reading_lines(readings: Sequence[InputReading], separator: str | None) -> list[str]:
    """What was read and what was not, a line each."""
    lines = []
    if separator and not any(reading.txt_files for reading in readings):
        lines.append(f"note       --txt-separator {separator!r} cut nothing: no file is plain text")
    for reading in readings:
        of_splits = f" of split {', '.join(reading.splits)}" if reading.splits else ""
        tally = reading.tally
        lines.append(
            f"read       {reading.input}: {_count(tally.documents, 'document')} in "
            f"{_count(reading.files, 'file')}{of_splits}"
        )
        if left_out := tally.left_out():
            lines.append(f"left out   {reading.input}: {left_out}")
        for skipped in reading.skipped:
            names = ", ".join(skipped.first) + (", ..." * (skipped.files > len(skipped.first)))
            files = _count(skipped.files, "file")
            lines.append(f"not read   {reading.input}: {files} ({names}): {skipped.why}")
        if separator and reading.txt_files and not tally.separators:
            meant = "; line ends are typed as $'\\n' in a shell" if "\\n" in separator else ""
            lines.append(
                f"note       {reading.input}: the separator {separator!r} occurs nowhere in "
                f"{_count(reading.txt_files, 'file')} of text{meant}"
            )
    return lines


def check_something_left(readings: Sequence[InputReading]) -> None:
    """Refuses an input of which no document is left.

    Raises:
      DataError: there is one; the message says what was left out of it and why.
    """
    for reading in readings:
        if reading.files and not reading.tally.documents:
            raise DataError(
                f"nothing is left of input {reading.input}: {reading.tally.left_out() or 'no text'}"
                "; name the field of its text as PATH:FIELD, repair it, or leave it out"
            )


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"
