"""HF Llama as a peer of `mmfree bench paper`, in an interpreter that has torch."""

import sys

import pytest

pytest.importorskip("torch", reason="torch is not installed: run make torch")

from mmfree_jax.experiments.bench import paper, paper_peers, paper_report


@pytest.mark.parametrize("work", ["prefill", "decode", "train"])
def test_hf_llama_is_measured_in_a_process_of_its_own(work, tmp_path):
    peers = paper_peers.find("", sys.executable)
    assert peers.forms == ("hf-llama",)
    assert "the authors' package was not run" in peers.reasons[0]
    plan = paper.Plan(
        tmp_path, parts=("lengths", "training"), lengths_size="tiny", lengths=(4,), steps=2,
        repeats=1, train_size="tiny", train_batches=(2,), train_tokens=8, train_steps=1,
        energy_seconds=0.0,
    )  # fmt: skip
    (case,) = [
        c for c in paper.cases(plan, peers.forms) if (c["form"], c["work"]) == ("hf-llama", work)
    ]
    row = peers.measure(case, 300.0)
    assert "failed" not in row
    assert row["versions"]["torch"]
    assert not {"dims", "checkout"} & row.keys()
    at = 2 if work == "train" else 4
    assert paper_report.describe(row).partition(":")[2].split(" at ")[1].startswith(f"{at}:")
