"""Damaged files: every kind of file that the product reads, and the commands that read it.

What counts as silent: a command that ends with 0 on a damaged file, says something else than of
the whole one, and warns of nothing. Files that carry a digest (`SIGNED`) must never give that: the
damage is told, or the answer is the same. Of a file that a person writes (a config, a prompt, a
text, a task, a table), and of a Hugging Face folder, which has no digests, another value is
another input: there a command need only end well.
"""

import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from fuzz.case import Case, Outcome
from fuzz.damage import damage


@dataclass(frozen=True)
class FileKind:
    """Files of one kind in the workplace.

    Attributes:
      files: glob patterns of the files to damage.
      commands: that read them.
      may_leave: new files that a refused command may leave.
      signed: a digest guards every byte.
    """

    files: tuple[str, ...]
    commands: tuple[str, ...]
    may_leave: str = ""
    signed: bool = False


_SAY = "--temperature 0 --max-new-tokens 3 --quiet --json --prompt-ids 119,101"
_NEW = "--bootstrap 0 --no-plot --out new.json"
_PREPARE = "data prepare --workers 1 --heldout-fraction 0 --out new"
# What is kept of texts that were read before the damage: the next call goes on there.
_PREPARED = r"^new/"

KINDS: dict[str, FileKind] = {
    "training config": FileKind(
        ("train.yaml",),
        (
            "info --config train.yaml --json",
            "launch render slurm --name a --nodes 1 -- --config train.yaml",
            "hardware report --config train.yaml --json",
        ),
    ),
    "sweep": FileKind(
        ("plan.yaml", "sweeps/results.csv", "sweeps/failures/*.json"),
        (
            "sweep plan plan.yaml --device H100 --out sweeps",
            "sweep status plan.yaml --out sweeps",
            "sweep report plan.yaml --out sweeps",
        ),
    ),
    "job values": FileKind(
        ("slurm.yaml",), ("launch render slurm --values slurm.yaml -- --preset tiny",)
    ),
    "run": FileKind(
        ("run/config.yaml", "run/metrics.jsonl", "run/summary.json", "run/tokenizer/*"),
        (
            f"generate --model run {_SAY}",
            "plot run --x flops --output new.png",
            "info --run run --json",
            f"fit run curve {_NEW} --law line",
        ),
    ),
    "checkpoint": FileKind(
        ("run/checkpoints/300/**/*",), (f"generate --model run {_SAY}",), signed=True
    ),
    "packed model": FileKind(
        ("packed/packed.safetensors",), (f"generate --model packed {_SAY}",), signed=True
    ),
    "session": FileKind(
        ("new-session.safetensors",),
        (f"generate --model run --load-state new-session.safetensors {_SAY}",),
        signed=True,
    ),
    "prepared data": FileKind(
        ("data/index.json", "data/*.tokens", "data/*.documents"),
        ("data inspect data --verify",),
        signed=True,
    ),
    "texts": FileKind(("texts/*",), (f"{_PREPARE} --input texts",), _PREPARED),
    "saved texts": FileKind(("saved/*",), (f"{_PREPARE} --input saved",), _PREPARED),
    "data card": FileKind(("card/README.md",), (f"{_PREPARE} --input card",), _PREPARED),
    "tokenizer": FileKind(
        ("tokenizer/*", "sentencepiece/*"),
        (
            f"{_PREPARE} --input text/b.jsonl --tokenizer tokenizer",
            f"{_PREPARE} --input text/b.jsonl --tokenizer sentencepiece",
        ),
        _PREPARED,
    ),
    "Hugging Face folder": FileKind(
        ("hf/*",),
        (
            "import-hf hf new",
            f"generate --model hf {_SAY}",
            "generate --model hf --prompt We --temperature 0 --max-new-tokens 2 --quiet",
        ),
    ),
    "index of shards": FileKind(("shards/*",), ("import-hf shards new",)),
    "model folder": FileKind(
        ("folder/*", "folder/tokenizer/*"), (f"generate --model folder {_SAY}",)
    ),
    "ONNX export": FileKind(
        ("onnx/export.json", "onnx/*.onnx", "onnx/*.data", "onnx/tokenizer.json"),
        ("export compare --model run --export onnx --data data --windows 1 --length 4",),
        signed=True,
    ),
    "hardware program": FileKind(
        ("program/*",), ("hardware run --program program --tokens 1,2",), signed=True
    ),
    "assembly": FileKind(("code.asm",), ("hardware run --program code.asm",)),
    "table of runs": FileKind(
        ("runs.csv", "runs.parquet"),
        (
            f"fit runs.csv {_NEW} --law line",
            f"fit runs.parquet {_NEW} --law line",
            f"crossing runs.csv runs.parquet {_NEW} --laws line",
            f"isoflop runs.csv {_NEW}",
        ),
    ),
    "fit of a law": FileKind(
        ("fit.json",),
        ("predict fit.json --params 1e9 --tokens 2e10 --out new.json",
         "predict fit.json --flops 1e21"),
    ),
    "prompts": FileKind(
        ("prompts.jsonl", "prompts.txt"),
        tuple(
            f"generate --model run --prompts-file prompts.{kind} --max-new-tokens 2 --json --quiet"
            for kind in ("jsonl", "txt")
        ),
    ),
    "tasks": FileKind(
        ("tasks/*",),
        ("eval --model run --tasks tiny_choice,arc_easy --tasks-dir tasks --no-progress "
         "--output new",),
    ),
    "device scaling": FileKind(("scaling/*",), ("bench scaling --report scaling",)),
}  # fmt: skip


def draw(seed: int, count: int, workplace: Path) -> Iterator[Case]:
    """Each command once on whole files, then on damaged ones; see `case.Source`.

    Of few cases only the commands that have an answer to compare are run on whole files.
    """
    said: dict[str, str] = {}
    kinds = {name: kind for name, kind in KINDS.items() if _files(kind, workplace)}
    tried = set()
    for number in range(count):
        rng = random.Random(f"{seed}/{number}")
        name = list(kinds)[number % len(kinds)]
        kind, command = kinds[name], rng.choice(kinds[name].commands)
        argv = tuple(command.split())
        if command not in tried and (kind.signed or count >= 10 * len(kinds)):
            tried.add(command)
            yield Case(argv, "whole files", judge=_remember(said, command))
            continue
        file = rng.choice([f for f in _files(kind, workplace) if _is_read(f, command)])
        yield Case(
            argv,
            f"{name}: {file} damaged",
            prepare=_damage(file, f"{seed}/{number}"),
            judge=_compare(said, command, signed=kind.signed),
            may_leave=kind.may_leave,
        )


def _files(kind: FileKind, folder: Path) -> list[str]:
    paths = (path for pattern in kind.files for path in sorted(folder.glob(pattern)))
    return [path.relative_to(folder).as_posix() for path in paths if path.is_file()]


def _is_read(file: str, command: str) -> bool:
    """Whether a command names the file or its folder."""
    return file.split("/")[0] in command.split()


def _damage(file: str, seed: str) -> Callable[[Path], None]:
    def prepare(folder: Path) -> None:
        damage(folder / file, random.Random(seed))

    return prepare


def _remember(said: dict[str, str], command: str) -> Callable[[Outcome, Path], str | None]:
    def judge(outcome: Outcome, folder: Path) -> str | None:
        said[command] = _answer(outcome)
        return None if outcome.code == 0 else "refused on whole files"

    return judge


def _compare(
    said: dict[str, str], command: str, *, signed: bool
) -> Callable[[Outcome, Path], str | None]:
    def judge(outcome: Outcome, folder: Path) -> str | None:
        if not signed or outcome.code != 0 or "Warning" in outcome.err or command not in said:
            return None
        return None if _answer(outcome) == said[command] else "another answer, and no word"

    return judge


def _answer(outcome: Outcome) -> str:
    """What a command says, but how long it took."""
    return re.sub(r"[\d.]+ ?m?s\b", "", outcome.out)
