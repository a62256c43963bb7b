"""The paper's tables, measured on this machine: every case in a process of its own.

A folder is gone on with: cases that it has are kept, those that failed are measured again.
"""

import dataclasses
import datetime
import itertools
import math
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from mmfree_jax.cli.parse import Counts, Names
from mmfree_jax.errors import ConfigError
from mmfree_jax.experiments.bench import paper_peers, paper_report
from mmfree_jax.experiments.bench.paper_values import PARTS
from mmfree_jax.experiments.bench.records import (
    DOES_NOT_FIT,
    Row,
    Say,
    Study,
    measure_alone,
    one_of,
    say,
)
from mmfree_jax.places import Place
from mmfree_jax.presets import preset
from mmfree_jax.ranges import AboveZero, Count, NotNegative

STUDY = Study("paper", paper_report.describe, paper_report.table, paper_report.draw)

_OWN = [sys.executable, "-m", "mmfree_jax.experiments.bench.paper_process"]
_LAYER_VOCABULARY = 256  # of the embedding and head around a single layer


@dataclasses.dataclass(frozen=True)
class Plan:
    """Measure what the paper's tables of speed, memory and energy show, and put both together."""

    out: Path
    """Folder that receives paper.json, paper.md (tables) and paper.png. Cases that it has already
    are kept, so that the same command goes on where an earlier one ended."""
    parts: Names = tuple(PARTS)
    """Which tables, separated by commas: training, inference, layer, lengths."""
    train_size: str = "1.3B"
    """Preset of the training steps."""
    train_batches: Counts = (1, 2, 4, 8, 16, 32, 64, 128, 256)
    """Rows of a training step, separated by commas; after one that does not fit, no larger ones."""
    train_tokens: Count = 1024
    """Length of these rows (tokens)."""
    sizes: Names = ("370M", "1.3B", "2.7B", "7B", "13B")
    """Presets of the parts inference and layer, separated by commas."""
    tokens: Count = 2048
    """Tokens that are read in these parts, and behind which is generated."""
    lengths_size: str = "370M"
    """Preset of the part lengths."""
    lengths: Counts = (500, 1000, 4000, 8000, 16000)
    """Tokens of the part lengths, separated by commas."""
    steps: Count = 64
    """Tokens of one timed loop of generation."""
    train_steps: Count = 4
    """Training steps that are timed together."""
    repeats: Count = 3
    """Timed loops, prompts or groups of training steps; the median counts."""
    energy_seconds: NotNegative = 8.0
    """Shortest time over which the energy of the part lengths is read (seconds); 0: do not."""
    peer: Place = ""
    """Checkout of the authors' package, measured beside; empty: it is left out."""
    peer_python: Place = ""
    """Python interpreter with torch and transformers, for the authors' package and for HF Llama;
    empty: this one."""
    timeout: AboveZero = 240.0
    """Longest time for one case (seconds)."""
    budget: NotNegative = 0.0
    """Longest time for the command (seconds); a case that it cuts short is left to the next
    command. 0: none."""


def check(plan: Plan) -> None:
    """Refuses a plan that cannot run.

    Raises:
      ConfigError: an unknown part or size, an empty list, or a peer that is no such checkout.
    """
    one_of(plan, PARTS, "parts")
    for name in ("parts", "train_batches", "sizes", "lengths"):
        if not getattr(plan, name):
            raise ConfigError(f"--{name.replace('_', '-')} is empty: give at least one")
    for size in (plan.train_size, *plan.sizes, plan.lengths_size):
        preset(size)
        preset(f"{size}-transformer")
    paper_peers.check_checkout(plan.peer)


def cases(plan: Plan, peers: Sequence[str] = ()) -> list[Row]:
    """The cases of a plan, in the order in which they are measured.

    What is compared is measured in turn: all forms of a batch, a size or a length.

    Args:
      plan: the plan.
      peers: forms of `paper_peers.PEERS` that can be measured.
    """
    out: list[Row] = []
    if "lengths" in plan.parts:
        for length, work in itertools.product(sorted(plan.lengths), ("prefill", "decode")):
            for form in _inference_forms(peers):
                case = _inference(plan, "lengths", work, plan.lengths_size, form, length)
                out.append(case | {"energy_s": plan.energy_seconds})
    if "inference" in plan.parts:
        for size, work in itertools.product(plan.sizes, ("prefill", "decode")):
            for form in _inference_forms(peers):
                out.append(_inference(plan, "inference", work, size, form, plan.tokens))
    if "layer" in plan.parts:
        for size, form in itertools.product(plan.sizes, _inference_forms(peers)):
            case = _inference(plan, "layer", "prefill", size, form, plan.tokens)
            out.append(case | {"layers": 1, "vocab_size": _LAYER_VOCABULARY})
    if "training" in plan.parts:
        for batch in sorted(plan.train_batches):
            for form in ("fused", "plain", "transformer", *peers):
                out.append(
                    {"part": "training", "work": "train", "size": plan.train_size, "form": form,
                     "batch": batch, "tokens": plan.train_tokens, "steps": plan.train_steps,
                     "repeats": plan.repeats}
                )  # fmt: skip
    return out


def _inference_forms(peers: Sequence[str]) -> list[str]:
    return ["packed", "transformer-bf16", *(name for name in peers if name != "authors-plain")]


def _inference(plan: Plan, part: str, work: str, size: str, form: str, tokens: int) -> Row:
    case: Row = {
        "part": part, "work": work, "size": size, "form": form, "batch": 1,
        "repeats": plan.repeats,
    }  # fmt: skip
    if work == "decode":
        return case | {"context": tokens, "steps": plan.steps}
    return case | {"tokens": tokens}


def measure(plan: Plan, command: str, say: Say = say) -> list[Row]:
    """Measures the cases of a plan that its folder lacks, and keeps them there.

    Raises:
      ConfigError: the plan cannot run, or the folder has no readable record of an earlier run.
    """
    check(plan)
    STUDY.check(plan.out)
    commands, rows = [], []
    if STUDY.files(plan.out)[0].exists():
        commands, rows = STUDY.read(plan.out, "--out")
    peers = paper_peers.find(plan.peer, plan.peer_python or sys.executable)
    for line in peers.reasons:
        say(line)
    kept = [row for row in rows if row.get("failed", DOES_NOT_FIT) == DOES_NOT_FIT]
    about = {"commands": [*commands, command], "peers": list(peers.reasons)}
    return STUDY.collect(about, _rows(plan, kept, peers, say), plan.out, say, kept)


def _rows(plan: Plan, kept: Sequence[Row], peers: paper_peers.Peers, say: Say) -> Iterator[Row]:
    end = time.monotonic() + (plan.budget or math.inf)
    too_large = {_series(row) for row in kept if "failed" in row}
    todo = [c for c in cases(plan, peers.forms) if not any(_is_of(row, c) for row in kept)]
    for number, case in enumerate(todo):
        if _series(case) in too_large:
            continue
        limit = min(plan.timeout, end - time.monotonic())
        row = _run(case, peers, limit) if limit > 0 else {"failed": "not begun"}
        if "failed" in row and limit < plan.timeout and time.monotonic() >= end:
            say(f"--budget {plan.budget:g} is spent: {len(todo) - number} cases are left for the "
                "same command to go on with")  # fmt: skip
            return
        if row.get("failed") == DOES_NOT_FIT:
            too_large.add(_series(case))
        yield row


def _run(case: Row, peers: paper_peers.Peers, limit_s: float) -> Row:
    date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    if case["form"] in paper_peers.PEERS:
        return peers.measure(case, limit_s) | {"date": date}
    return measure_alone(_OWN, case, limit_s) | {"date": date}


def _is_of(row: Row, case: Row) -> bool:
    """Whether a row is the measurement of a case."""
    return all(row.get(name) == value for name, value in case.items())


def _series(case: Row) -> tuple[str, ...]:
    """What cases that differ by their batch alone have in common."""
    length = str(case.get("tokens", case.get("context")))
    return case["part"], case["work"], case["size"], case["form"], length
