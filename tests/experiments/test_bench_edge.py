"""`mmfree bench edge`: exports against llama.cpp, every measurement in its own process."""

import dataclasses
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from mmfree_jax.cli.main import main
from mmfree_jax.experiments.bench import edge, edge_models, edge_process, edge_report
from mmfree_jax.experiments.cli.bench_edge import bench_edge

PEER = os.environ.get("MMFREE_PEER_PYTHON", "")
needs_peer = pytest.mark.skipif(
    not PEER, reason="MMFREE_PEER_PYTHON names no interpreter with llama-cpp-python and gguf"
)


def _plan(**changes):
    plan = edge.Plan(
        out=Path("none"), sizes=("tiny",), forms=("onnx-fast",), contexts=(4,),
        context_forms=("onnx-fast",), threads=1, steps=2, repeats=2, prefill=6, quiet=64.0,
        timeout=120.0,
    )  # fmt: skip
    return dataclasses.replace(plan, **changes)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The command on the preset `tiny`: its folder, its models and what it returned."""
    pytest.importorskip("onnxruntime", reason="onnxruntime (the extra `edge`) is not installed")
    folder = tmp_path_factory.mktemp("edge")
    argv = ["--out", str(folder / "out"), "--models", str(folder / "models"), "--sizes", "tiny",
            "--forms", "onnx-fast,onnx-f32,llama-q4_0", "--contexts", "4,9", "--threads", "1",
            "--context-forms", "onnx-fast", "--steps", "2", "--repeats", "2",
            "--prefill", "6"]  # fmt: skip
    return SimpleNamespace(
        code=bench_edge(argv), argv=argv, out=folder / "out", models=folder / "models"
    )


def test_the_command_writes_records_table_and_figure(run):
    assert run.code == 0
    record = json.loads((run.out / "edge.json").read_text())
    assert record["command"] == "mmfree bench edge " + " ".join(run.argv)
    assert record["machine"]["threads"] == 1
    found = [(row["work"], row["form"], "failed" in row) for row in record["rows"]]
    assert found == [
        ("decode", "onnx-fast", False),
        ("prefill", "onnx-fast", False),
        ("decode", "onnx-f32", False),
        ("prefill", "onnx-f32", False),
        ("decode", "llama-q4_0", True),
        ("prefill", "llama-q4_0", True),
        ("decode", "onnx-fast", False),
    ]
    for row in record["rows"]:
        if "failed" in row:
            assert "--peer-python" in row["failed"]
            continue
        speed = row["tokens_per_s"]
        assert 0 < speed["min"] <= speed["median"] <= speed["max"]
        assert row["versions"]["onnxruntime"]
        assert row["peak_mb"] >= row["rss_loaded_mb"] > row["rss_before_mb"] > 0
        assert row["file_mb"] > 0
        assert 0 <= row["cores_of_others"] <= os.cpu_count()
        assert str(run.models) not in json.dumps(row)
    table = (run.out / "edge.md").read_text()
    assert "| tiny | MatMul-free, ONNX fast (2 bits) | " in table
    assert "no --peer-python" in table
    assert (run.out / "edge.png").stat().st_size > 1000


def test_a_measurement_imports_no_jax(run):
    code = f"import sys, runpy; runpy.run_path({edge_process.__file__!r}, run_name='__main__');"
    task = _task(run, "onnx-fast") | {"work": "decode", "context": 4}
    done = edge_models.subprocess.run(
        [sys.executable, "-I", "-c", code + "print('jax' in sys.modules)"],
        input=json.dumps(task) + "\n", capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.split()[-1] == "False"


def _task(run, form):
    path = edge_models.place(run.models, "tiny", form)
    return {"runtime": "onnx", "path": str(path), "threads": 1, "steps": 2, "repeats": 2,
            "vocab_size": 264, "piece": 64}  # fmt: skip


def test_the_float32_graph_computes_the_fast_one_without_quantised_activations(run):
    logits = {}
    for form in ("onnx-fast", "onnx-f32"):
        import onnxruntime

        folder = edge_models.place(run.models, "tiny", form)
        session = onnxruntime.InferenceSession(folder / "model.onnx")
        state = np.zeros([2, 1, 64], np.float32)
        tokens = np.array([edge_process.prompt(20, 264)])
        logits[form], _ = session.run(None, {"tokens": tokens, "state": state})
    fast, wide = logits["onnx-fast"], logits["onnx-f32"]
    assert np.linalg.norm(fast - wide) < 0.1 * np.linalg.norm(wide)
    assert not np.array_equal(fast, wide)


def test_a_saved_context_continues_as_the_prompt_read_at_once(run, tmp_path):
    task = _task(run, "onnx-fast")
    engine = edge_process.open_onnx(task)
    row = edge_process.save_context(engine, task | {"context": 700, "state": tmp_path / "a.state"})
    assert row["state_mb"] >= 0
    assert not (tmp_path / "a.state.tmp").exists()
    expected = engine.generate(0, 5)
    other = edge_process.open_onnx(task)
    other.restore(tmp_path / "a.state")
    other.mark()
    assert other.generate(0, 5) == expected
    other.rewind()
    assert other.generate(0, 5) == expected


def test_prompts_are_read_in_pieces():
    assert [len(piece) for piece in edge_process.pieces(range(1100), 512)] == [512, 512, 76]
    assert max(edge_process.prompt(5000, 264)) < 264


def _engine(tokens):
    """An engine whose loop gives what is left of `tokens`."""
    left = iter(tokens)

    def nothing(*_):
        return 0

    def generate(_, steps):
        return [next(left) for _ in range(steps)]

    return edge_process.Engine(
        nothing, generate, nothing, nothing, nothing, nothing, nothing, versions={}
    )


def test_a_loop_that_gives_other_tokens_is_refused():
    task = {"context": 3, "vocab_size": 9, "steps": 2, "repeats": 2}
    row = edge_process.measure_decode(_engine([1, 2, 1, 2, 1, 2]), task)
    assert row["tokens_per_s"]["median"] > 0
    with pytest.raises(RuntimeError, match="other tokens"):
        edge_process.measure_decode(_engine([1, 2, 1, 2, 1, 3]), task)


def test_a_measurement_that_fails_is_a_row_with_the_reason(tmp_path, monkeypatch):
    monkeypatch.setattr(edge_models, "prepare", lambda *_: None)
    monkeypatch.setattr(edge_models, "weight_files", lambda _: [])
    monkeypatch.setattr(edge.sys, "executable", "/bin/false")
    said = []
    rows = edge.measure(_plan(prefill=0, out=tmp_path), "x", said.append)
    assert [row["failed"] for row in rows] == ["exit code 1: no message"]
    assert "exit code 1" in (tmp_path / "edge.md").read_text()
    assert "exit code 1" in said[0]


def test_a_disturbed_measurement_is_taken_again(monkeypatch):
    shares = iter([0.9, 0.4, 0.1, 0.9, 0.7, 0.8])
    monkeypatch.setattr(edge, "_run", lambda *_: {"cores_of_others": next(shares)})
    task = {"runtime": "onnx"}
    assert edge._run_quietly(_plan(quiet=0.2), task) == {"cores_of_others": 0.1, "attempts": 3}
    assert edge._run_quietly(_plan(quiet=0.2), task) == {"cores_of_others": 0.7, "attempts": 3}
    monkeypatch.setattr(edge, "_run", lambda *_: {"failed": "why"})
    assert edge._run_quietly(_plan(quiet=0.2), task) == {"failed": "why", "attempts": 1}


def test_files_that_cannot_be_made_are_rows_with_the_reason(tmp_path, monkeypatch):
    monkeypatch.setattr(edge.sys, "executable", "/bin/false")
    monkeypatch.setattr(edge_models, "_make_packed", lambda path, _: None)
    plan = _plan(models=tmp_path / "models", prepare_only=True)
    rows = edge.measure(plan, "x", lambda _: None)
    assert {row["failed"] for row in rows} == {"mmfree export onnx: exit code 1: no message"}
    assert not (tmp_path / "models" / "tiny" / "onnx-fast").exists()


def test_the_plan_measures_what_was_asked_for(tmp_path):
    plan = _plan(
        sizes=("370M", "1.3B"), forms=("onnx-fast", "llama-q4_0", "jax-cpu"),
        contexts=(32, 512, 16384), context_forms=("onnx-fast", "llama-q4_0"), prefill=0,
    )  # fmt: skip
    found = [(t["size"], t["form"], t["context"]) for t in edge.tasks(plan, tmp_path)]
    assert len(found) == len(set(found)) == 2 * 3 + 2 * 2 * 2
    assert found[:2] == [("370M", "onnx-fast", 32), ("370M", "llama-q4_0", 32)]
    assert ("1.3B", "llama-q4_0", 16384) in found
    assert ("1.3B", "jax-cpu", 512) not in found
    for task in edge.tasks(plan, tmp_path):
        assert task["places"] >= task["context"] + plan.steps
        assert ("state" in task) == (task["context"] > 32)


@pytest.mark.parametrize(
    ("flag", "value", "match"),
    [
        ("--sizes", "371M", "371M"),
        ("--sizes", "", "--sizes is empty"),
        ("--forms", "onnx-fp8", "onnx-fp8"),
        ("--context-forms", "x", "--context-forms has 'x'"),
        ("--contexts", "many", "whole numbers"),
        ("--contexts", "0", "--contexts is (0,)"),
        ("--contexts", "100000", "--contexts has 100000"),
        ("--threads", "0", "--threads"),
        ("--threads", "4096", "may use"),
        ("--repeats", "0", "--repeats"),
        ("--prefill", "-1", "--prefill"),
        ("--quiet", "-1", "--quiet"),
        ("--peer-python", "/no/python", "No such file"),
        ("--peer-python", sys.executable, "llama-cpp-python and gguf"),
    ],
)
def test_bad_options_are_named(flag, value, match, tmp_path, capsys):
    assert main(["bench", "edge", "--out", str(tmp_path), flag, value]) == 2
    assert match in capsys.readouterr().err


def test_a_place_that_takes_no_folder_is_named(capsys):
    assert main(["bench", "edge", "--out", "/proc/self/mem", "--sizes", "tiny"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("mmfree: error: /proc/self/mem cannot be written (No such file")
    assert error.count("\n") == 1


def test_the_peer_has_the_size_of_the_preset():
    dims = edge_models.peer_dims("370M")
    assert (dims["layers"], dims["width"], dims["glu"], dims["heads"]) == (24, 1024, 2816, 16)


def _row(form, context, speed, peak, size="370M"):
    return {
        "work": "decode", "size": size, "form": form, "context": context, "file_mb": 100.0,
        "tokens_per_s": {"median": speed, "min": speed - 1, "max": speed + 1}, "load_s": 0.5,
        "rss_loaded_mb": peak - 1, "peak_mb": peak, "cores_of_others": 0.25,
    }  # fmt: skip


def test_the_verdict_compares_the_fast_grade_with_the_peer(tmp_path):
    rows = [
        _row("onnx-fast", 32, 150.0, 200.0),
        _row("llama-q4_0", 32, 80.0, 500.0) | {"cores_of_others": 0.5},
        _row("onnx-fast", 16384, 150.0, 200.0),
        _row("llama-q4_0", 16384, 15.0, 2100.0),
        {"work": "decode", "size": "370M", "form": "jax-cpu", "context": 32, "failed": "why"},
    ]
    text = edge_report.table(rows)
    assert "at 32 tokens: MatMul-free, ONNX fast (2 bits) has 1.88 times" in text
    assert "0.40 times its peak memory; target 2 and below 1: **not reached**." in text
    assert "at 16,384 tokens: MatMul-free, ONNX fast (2 bits) has 10.00 times" in text
    assert "below 1: reached." in text
    assert "| 370M | Transformer++, llama.cpp Q4_0 | 80.0 tokens/s, 500 MB | 15.0 tokens/s" in text
    assert "| why |" in text
    assert "0.25 cores during the median measurement and 0.50 at most (decode 370M" in text
    record = {"machine": {"threads": 2, "cpu": "some CPU"}, "rows": rows}
    edge_report.draw(record, tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 1000
    # More memory than the peer's: a miss, however fast.
    slow = edge_report.verdicts([_row("onnx-fast", 32, 300, 501), _row("llama-q4_0", 32, 80, 500)])
    assert "**not reached**" in slow


@needs_peer
def test_the_peer_is_quantised_and_measured(tmp_path):
    path = edge_models.prepare(tmp_path, "tiny", "llama-q4_0", PEER, 1, lambda _: None)
    plan = _plan(
        sizes=("tiny",), forms=("llama-q4_0",), contexts=(32, 3000), peer_python=PEER,
        context_forms=("llama-q4_0",), models=tmp_path, out=tmp_path / "out",
    )  # fmt: skip
    rows = edge.measure(plan, "x", lambda _: None)
    assert [row.get("failed") for row in rows] == [None] * 3
    assert rows[0]["file_mb"] == pytest.approx(path.stat().st_size / 1e6, abs=0.1)
    assert rows[2]["peak_mb"] > rows[0]["peak_mb"]  # the cache of 3,000 tokens
