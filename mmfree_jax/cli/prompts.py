"""Prompts of `mmfree generate`, and the fields that come with them."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmfree_jax.errors import DataError
from mmfree_jax.text_files import parse_json, read_text

# What an answer in JSON has of its own, beside what came with its prompt.
ANSWER_FIELDS = {"index", "sample", "text", "tokens", "finish_reason"}


@dataclass(frozen=True)
class Prompt:
    """A prompt, as text or as token ids.

    Attributes:
      index: its place among all prompts of the call, from 0.
      text: to continue, or None.
      ids: to continue, or None.
      seed: of its own, or None.
      fields: what else its line in a file says; goes into the answer.
      sample: number of the answer to it, from 0.
    """

    index: int
    text: str | None = None
    ids: list[int] | None = None
    seed: int | None = None
    fields: dict[str, Any] = field(default_factory=dict)
    sample: int = 0


def parse_ids(text: str) -> list[int]:
    """The token ids of `--prompt-ids`.

    Raises:
      DataError: they are no whole numbers, or none.
    """
    try:
        ids = [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise DataError(
            f"--prompt-ids is {text!r}: give whole numbers separated by commas"
        ) from None
    if not ids:
        raise DataError("--prompt-ids is empty: give at least one token id")
    return ids


def read_prompts_file(path: Path) -> list[Prompt]:
    """The prompts of a file: .jsonl, or one text a line.

    Raises:
      DataError: the file cannot be read, or a line is no prompt; the message has its number.
    """
    try:
        lines = read_text(path).split("\n")
    except OSError as e:
        raise DataError(f"prompts file {path}: {e.strerror}; give a readable file") from e
    except UnicodeDecodeError as e:
        raise DataError(f"prompts file {path} is not UTF-8 at byte {e.start}: convert it") from e
    lines = [(n, line) for n, line in enumerate(lines, 1) if line.strip()]
    if not lines:
        raise DataError(f"prompts file {path} is empty: give at least one prompt")
    if path.suffix != ".jsonl":
        return [Prompt(n, line) for n, (_, line) in enumerate(lines)]
    return [
        _parse_json_prompt(path, number, line, place) for place, (number, line) in enumerate(lines)
    ]


def _parse_json_prompt(path: Path, number: int, line: str, place: int) -> Prompt:
    try:
        value = parse_json(line)
    except ValueError as e:
        raise DataError(f"{path}, line {number} is not JSON: {e}") from e
    given = dict(value) if isinstance(value, dict) else {}
    text, ids, seed = (given.pop(name, None) for name in ("prompt", "prompt_ids", "seed"))
    whole = isinstance(ids, list) and all(type(i) is int for i in ids)
    if not (isinstance(text, str) if ids is None else whole and ids and text is None):
        raise DataError(
            f'{path}, line {number}: give an object with "prompt" (text) or "prompt_ids" (a list '
            "of whole numbers that is not empty)"
        )
    if seed is not None and (type(seed) is not int or not 0 <= seed < 2**32):
        raise DataError(
            f"{path}, line {number}: seed is {seed!r}: give a whole number from 0 to 2^32 - 1"
        )
    return Prompt(place, text, ids, seed, given)
