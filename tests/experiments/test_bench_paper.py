"""`mmfree bench paper`: cases, what is kept of an earlier run, and the paper's values beside."""

import dataclasses
import json
import os
import time
import types

import pytest

from mmfree_jax.cli.main import main
from mmfree_jax.experiments.bench import paper, paper_peers, paper_process, paper_report
from mmfree_jax.experiments.bench.energy import measure_energy
from mmfree_jax.experiments.bench.paper_values import PUBLISHED, published
from mmfree_jax.experiments.bench.records import DOES_NOT_FIT
from mmfree_jax.experiments.cli.bench_paper import bench_paper

NO_PEERS = paper_peers.Peers("python", "", (), ("none",))


def _plan(out, **changes):
    return paper.Plan(out, **changes)


def _measured(case):
    time = {"ms_per_token" if case["work"] == "decode" else "ms": {"median": 2.0}}
    return case | time | {"device": "H100", "tokens_per_s": 500.0, "peak_gb": 1.5}


@pytest.fixture
def pretended(monkeypatch):
    """Cases that were run; what a case gives can be changed."""
    ran = []
    results = {"failed": lambda case: None}

    def measure(command, task, timeout_s=None):
        ran.append((task["form"], task.get("batch"), timeout_s))
        why = results["failed"](task)
        return task | {"failed": why} if why else _measured(task)

    undrawn = dataclasses.replace(paper.STUDY, draw=lambda record, path: None)
    monkeypatch.setattr(paper, "STUDY", undrawn)
    monkeypatch.setattr(paper, "measure_alone", measure)
    monkeypatch.setattr(paper_peers, "find", lambda checkout, python: NO_PEERS)
    return ran, results


def test_one_layer_is_measured_by_both_families_and_kept(tmp_path, capsys):
    argv = ["--out", str(tmp_path), "--parts", "layer", "--sizes", "tiny", "--tokens", "4",
            "--repeats", "1"]  # fmt: skip
    assert bench_paper(argv) == 0
    first = json.loads((tmp_path / "paper.json").read_text())
    assert [row["form"] for row in first["rows"]] == ["packed", "transformer-bf16"]
    for row in first["rows"]:
        assert (row["layers"], row["vocab_size"], row["tokens"]) == (1, 256, 4)
        assert row["ms"]["median"] > 0
        assert row["device"]
        assert row["versions"]["jax"]
        assert row["date"].startswith("20")
        # One layer and 256 words: far less than the preset's two layers.
        assert 0 < row["weights_gb"] < 4e-4
    text = (tmp_path / "paper.md").read_text()
    assert "| 3.79 ms, 0.12 GB |" in text
    assert "HF Llama was not run" in capsys.readouterr().out
    assert bench_paper(argv) == 0
    second = json.loads((tmp_path / "paper.json").read_text())
    assert second["rows"] == first["rows"]
    assert second["commands"] == ["mmfree bench paper " + " ".join(argv)]  # nothing was added


def test_a_training_step_takes_one_device_and_its_form():
    task = {"work": "train", "size": "tiny", "form": "plain", "batch": 1, "tokens": 8, "steps": 1,
            "repeats": 1}  # fmt: skip
    row = paper_process.measure_training(task)  # one row divides over one device alone
    assert row["tokens_per_s"] == pytest.approx(8e3 / row["ms"]["median"], rel=0.01)
    model = paper_process.train_config(task | {"size": "1.3B"}).model
    assert (model.bitlinear, model.backward, model.remat) == ("plain", "bf16", "none")
    fused = paper_process.train_config(task | {"size": "1.3B", "form": "fused"})
    assert (fused.model.bitlinear, fused.model.family) == ("fused", "matmulfree")
    twin = paper_process.train_config(task | {"form": "transformer"})
    assert (twin.model.family, twin.batch_size, twin.data.seq_len) == ("transformer", 1, 8)


@pytest.mark.parametrize(
    ("size", "batch", "gib", "remat"),
    [
        ("370M", 16, 80, "none"),
        ("1.3B", 16, 80, "none"),
        ("1.3B", 16, 45, "projections"),
        ("1.3B", 16, 30, "stream"),
        ("1.3B", 256, 80, "full"),  # fits no way: the preset's own
    ],
)
def test_the_twin_makes_again_what_memory_asks_for(size, batch, gib, remat):
    task = {"size": size, "form": "transformer", "batch": batch, "tokens": 1024}
    found = paper_process.for_memory(paper_process.train_config(task), gib * 2**30)
    assert found.model.remat == remat


def test_after_a_batch_that_does_not_fit_no_larger_one_is_tried(tmp_path, pretended):
    ran, results = pretended
    results["failed"] = lambda case: (
        DOES_NOT_FIT if case["form"] == "plain" and case["batch"] >= 4 else None
    )
    plan = _plan(tmp_path, parts=("training",), train_batches=(2, 4, 8))
    paper.measure(plan, "x", lambda line: None)
    assert [batch for form, batch, _ in ran if form == "plain"] == [2, 4]
    assert [batch for form, batch, _ in ran if form == "fused"] == [2, 4, 8]
    ran.clear()
    paper.measure(plan, "x", lambda line: None)
    assert ran == []  # and that it does not fit is known from then on


def test_cases_that_failed_otherwise_are_measured_again(tmp_path, pretended):
    ran, results = pretended
    results["failed"] = lambda case: "no result" if case["form"] == "packed" else None
    plan = _plan(tmp_path, parts=("layer",), sizes=("tiny",))
    paper.measure(plan, "x", lambda line: None)
    results["failed"] = lambda case: None
    ran.clear()
    rows = paper.measure(plan, "y", lambda line: None)
    assert [form for form, _, _ in ran] == ["packed"]
    assert [row["form"] for row in rows] == ["transformer-bf16", "packed"]
    assert not any("failed" in row for row in rows)


def test_a_budget_leaves_cases_to_the_next_command(tmp_path, pretended, monkeypatch):
    ran, _ = pretended
    clock = iter([0.0, 10.0, 95.0, 130.0, 130.0])
    monkeypatch.setattr(paper, "time", types.SimpleNamespace(monotonic=lambda: next(clock)))
    said = []
    plan = _plan(tmp_path, parts=("layer",), sizes=("tiny", "small"), budget=100.0, timeout=50.0)
    rows = paper.measure(plan, "x", said.append)
    assert [limit for _, _, limit in ran] == [50.0, 5.0]
    assert len(rows) == 2
    assert said[-1].startswith("--budget 100 is spent: 2 cases are left")


def test_the_papers_values_stand_beside_their_cases(tmp_path, pretended):
    plan = _plan(tmp_path, parts=("lengths",), lengths=(500, 16000))
    paper.measure(plan, "x", lambda line: None)
    lines = (tmp_path / "paper.md").read_text().splitlines()
    wanted = {
        ("read", "packed", 16000): "84,600 tokens/s, 0.9 mJ | H100 | v7, tables 3 and 6 |",
        ("generate", "packed", 500): "13.4 tokens/s, 10,100 mJ | H100 | v7, tables 3 and 6 |",
        ("generate", "transformer-bf16", 16000): "20.9 tokens/s, 8,200 mJ | H100 |",
    }
    for (work, form, length), text in wanted.items():
        begin = f"| 370M | {paper_report.FORMS[form]} | {work} | {length} |"
        (line,) = [line for line in lines if line.startswith(begin)]
        assert text in line
        assert " 500 " in line  # what was measured, beside it
    # Lengths that were not measured have a row with the paper's value alone.
    begin = f"| 370M | {paper_report.FORMS['packed']} | read | 4000 |  |  |  |  | 30,600 tokens/s"
    assert any(line.startswith(begin) for line in lines)
    assert len(PUBLISHED) == len({(v.part, v.work, v.size, v.form, v.at) for v in PUBLISHED})
    assert published("training", "train", "1.3B", "fused", 256).seconds == 1.21
    assert published("training", "train", "1.3B", "fused", 128) is None


def test_energy_that_cannot_be_read_says_why(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    found = measure_energy(lambda: None, seconds=0.01, tokens=1, device=0)
    assert found["energy"].startswith("not measured: ")
    assert "nvidia-smi" in found["energy"]


def test_energy_by_samples_is_mean_power_times_time(tmp_path, monkeypatch):
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 100.0; echo '[N/A]'; echo 300.0; exec sleep 60\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    # A call that takes no time would be made so often that a token's energy is rounded to nothing.
    found = measure_energy(lambda: time.sleep(0.02), seconds=0.5, tokens=10, device=0)["energy"]
    assert found["watts"] == 200.0
    assert found["counter"] == "nvidia-smi power.draw"
    joules = found["mj_per_token"] * found["tokens"] / 1e3
    assert joules == pytest.approx(200.0 * found["seconds"], rel=0.2)


@pytest.mark.parametrize(("visible", "board"), [("", 1), ("2,3", 3), ("0, GPU-7c1e", "GPU-7c1e")])
def test_the_meter_is_that_of_the_gpu_in_use(visible, board, tmp_path, monkeypatch):
    tool = tmp_path / "nvidia-smi"
    tool.write_text(f'#!/bin/sh\necho "$1" > {tmp_path}/asked\necho 50.0; exec sleep 60\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert measure_energy(lambda: None, seconds=0.3, tokens=1, device=1)["energy"]["watts"] == 50.0
    assert (tmp_path / "asked").read_text() == f"--id={board}\n"


@pytest.mark.parametrize(
    ("flag", "value", "match"),
    [
        ("--parts", "figures", "figures"),
        ("--sizes", "371M", "371M"),
        ("--train-batches", "0", "--train-batches"),
        ("--peer", "nowhere", "--peer is 'nowhere'"),
        ("--budget", "-1", "--budget"),
    ],
)
def test_bad_options_are_named(flag, value, match, tmp_path, capsys):
    assert main(["bench", "paper", "--out", str(tmp_path / "new"), flag, value]) == 2
    assert match in capsys.readouterr().err


def test_what_no_such_run_made_is_left(tmp_path, capsys):
    (tmp_path / "paper.json").write_text('{"command": 1}')
    assert main(["bench", "paper", "--out", str(tmp_path)]) == 2
    assert "has no readable paper.json" in capsys.readouterr().err
    assert (tmp_path / "paper.json").read_text() == '{"command": 1}'


def test_peers_that_are_not_here_are_named(tmp_path):
    found = paper_peers.find("", str(tmp_path / "python"))
    assert found.forms == ()
    assert [reason.partition(":")[0] for reason in found.reasons] == [
        "the authors' package was not run",
        "HF Llama was not run",
    ]
