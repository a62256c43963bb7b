"""The tutorials do what they say: their blocks are run as they stand, in order, in one folder.

They are long in the reader's minutes, not in ours: what is changed of them is in SHORTER alone.
`make tutorials` runs these tests, which are no part of the others. What PyTorch does on the last
page is in tests/interop_torch.
"""

import json
import re
import shutil
import socket
from pathlib import Path

import pytest
from tutorial_pages import FIRST, PACKED, SHORTER, TUNED, run_steps, steps

from mmfree_jax.train.metric_series import read_metrics

pytestmark = pytest.mark.tutorial


@pytest.fixture(scope="module")
def first(tmp_path_factory) -> Path:
    """The folder in which the first tutorial was followed."""
    folder = tmp_path_factory.mktemp("tutorial")
    run_steps(FIRST, steps(FIRST, SHORTER[FIRST]), folder)
    return folder


@pytest.fixture
def after_first(first, tmp_path) -> Path:
    """A copy of that folder, to go on in."""
    return Path(shutil.copytree(first, tmp_path / "tutorial"))


def held_out(run: Path) -> list[tuple[int, float]]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [(line["step"], line["loss"]) for line in lines if line["kind"] == "eval"]


def test_a_first_model(first):
    assert [step for step, _ in held_out(first / "runs/first")] == [10, 24]
    assert held_out(first / "runs/first")[-1][1] < 7.3  # knowing nothing is log 2048 = 7.6
    assert (first / "curves.png").stat().st_size > 1000
    assert not (first / "data/one/index.json").exists()
    listed = read_metrics(first / "runs/first").logged
    assert {"loss", "grad_norm"} <= set(listed)


def test_fine_tune_and_serve(after_first):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shown = steps(TUNED, SHORTER[TUNED] | {"8000": str(port)})
    printed = run_steps(TUNED, shown, after_first)

    def of(part: str) -> str:
        """What the block with this part printed."""
        return next(p.out for b, p in zip(shown, printed, strict=True) if part in b.text)

    by_curl = json.loads(of("completions -H"))["choices"][0]["text"]
    whole, rest = of("import openai").removeprefix("whole: ").split("\nstream: ")
    stream = rest.split("\ntokens: ")[0]
    assert by_curl == whole == stream
    before, after = (held_out(after_first / "runs" / name)[-1] for name in ("first", "tuned"))
    assert (before[0], after[0]) == (24, 20)  # steps begin anew
    assert not (after_first / "runs/wrong/checkpoints").exists()


def test_pack_and_export(after_first):
    shown = steps(PACKED, SHORTER[PACKED], without="from transformers")
    printed = run_steps(PACKED, shown, after_first)
    generated, chatted = (
        streams for block, streams in zip(shown, printed, strict=True) if "--prompt" in block.text
    )
    assert re.search(r"^20 tokens in ", generated.err, re.M)
    assert re.search(r"^\[\d+ tokens read", chatted.err, re.M)
    assert generated.out == chatted.out
