"""`mmfree bench infer`: every measurement in its own process, failures as rows."""

import json
from pathlib import Path

import pytest

from mmfree_jax.cli.main import main
from mmfree_jax.experiments.bench import infer, infer_process
from mmfree_jax.experiments.bench.records import reason
from mmfree_jax.experiments.cli.bench_infer import bench_infer


@pytest.mark.slow
def test_the_command_writes_records_table_and_figure(tmp_path, capsys):
    argv = ["--out", str(tmp_path), "--sizes", "tiny", "--steps", "2", "--repeats", "1",
            "--forms", "packed,transformer-bf16", "--timeout", "120"]  # fmt: skip
    assert bench_infer(argv) == 0
    record = json.loads((tmp_path / "infer.json").read_text())
    assert record["command"] == "mmfree bench infer " + " ".join(argv)
    assert [row["form"] for row in record["rows"]] == ["packed", "transformer-bf16"]
    for row in record["rows"]:
        assert row["device"]
        assert row["versions"]["jax"]
        assert row["ms_per_token"]["min"] <= row["ms_per_token"]["median"]
        assert row["tokens_per_s"] > 0
        assert row["weights_gb"] > 0
    assert "| tiny |" in (tmp_path / "infer.md").read_text()
    assert (tmp_path / "infer.png").stat().st_size > 1000
    assert "decode tiny packed batch 1" in capsys.readouterr().out


def test_a_measurement_that_fails_is_a_row_with_the_reason(tmp_path, monkeypatch):
    plan = _plan(("370M",), ("packed",), out=tmp_path)
    monkeypatch.setattr(infer.sys, "executable", "/bin/false")
    said = []
    (row,) = infer.measure(plan, "x", said.append)
    assert row["failed"] == "exit code 1: no message"
    assert "exit code 1" in (tmp_path / "infer.md").read_text()
    assert "exit code 1" in said[0]
    assert reason(1, "jax.errors: RESOURCE_EXHAUSTED: Out of memory") == (
        "does not fit in the device's memory"
    )


def test_runs_can_be_joined(tmp_path, capsys):
    row = {"work": "decode", "form": "packed", "batch": 1, "failed": "x"}
    for name, size in (("a", "tiny"), ("b", "370M")):
        (tmp_path / name).mkdir()
        record = {"command": f"mmfree bench infer {name}", "rows": [row | {"size": size}]}
        (tmp_path / name / "infer.json").write_text(json.dumps(record))
    both = f"{tmp_path / 'a'},{tmp_path / 'b'}"
    assert bench_infer(["--out", str(tmp_path / "c"), "--join", both]) == 0
    # What was joined can be joined again.
    again = f"{tmp_path / 'c'},{tmp_path / 'a'}"
    assert bench_infer(["--out", str(tmp_path / "d"), "--join", again]) == 0
    record = json.loads((tmp_path / "d" / "infer.json").read_text())
    assert record["commands"] == [f"mmfree bench infer {name}" for name in "aba"]
    assert [row["size"] for row in record["rows"]] == ["tiny", "370M", "tiny"]
    assert "| 370M |" in (tmp_path / "d" / "infer.md").read_text()
    assert main(["bench", "infer", "--out", str(tmp_path / "e"), "--join", str(tmp_path)]) == 2
    assert "infer.json" in capsys.readouterr().err
    for damage in ("[]", '"x"', "{}", "{"):
        (tmp_path / "a" / "infer.json").write_text(damage)
        assert main(["bench", "infer", "--out", str(tmp_path / "e"), "--join", both]) == 2
        assert "has no readable infer.json" in capsys.readouterr().err


def _plan(sizes, forms, **changes):
    options = {"out": Path("none"), "steps": 2, "repeats": 1, "timeout": 60.0}
    return infer.Plan(sizes=sizes, forms=forms, **options | changes)


def test_the_plan_measures_what_was_asked_for():
    plan = _plan(
        ("370M", "1.3B"), ("packed", "transformer-bf16"), batch_sizes=(1, 128), energy=True,
        prefill=16, prefill_sizes=("1.3B",), agreement="370M",
    )  # fmt: skip
    found = [(t["work"], t["size"], t.get("form"), t["batch"]) for t in infer.tasks(plan)]
    assert found.count(("decode", "370M", "packed", 1)) == 1  # timed with its energy
    assert ("decode", "1.3B", "packed", 128) in found
    assert ("decode", "1.3B", "transformer-bf16", 128) not in found
    assert ("decode", "370M", "packed", 64) in found
    assert ("prefill", "1.3B", "packed", 1) in found
    assert ("prefill", "370M", "packed", 1) not in found
    assert found.count(("agreement", "370M", None, 1)) == 1
    assert found[0] == ("decode", "370M", "packed", 1)  # the energy first


@pytest.mark.parametrize(
    ("flag", "value", "match"),
    [
        ("--sizes", "371M", "371M"),
        ("--forms", "fp8", "fp8"),
        ("--batch-sizes", "one", "whole numbers"),
        ("--batch-sizes", "0", "--batch-sizes is (0,)"),
        ("--steps", "0", "--steps"),
    ],
)
def test_bad_options_are_named(flag, value, match, tmp_path, capsys):
    assert main(["bench", "infer", "--out", str(tmp_path), flag, value]) == 2
    assert match in capsys.readouterr().err


def test_random_weights_are_packed_trits():
    config = infer_process.model_config("tiny", "packed")
    packed = infer_process.random_weights(config, "packed")
    words = packed.glu.down_proj.matrix
    codes = [(words >> (2 * i)) & 3 for i in range(16)]
    counts = [sum(int((c == code).sum()) for c in codes) for code in range(4)]
    total = sum(counts)
    assert counts[3] == 0
    assert abs(counts[1] / total - 0.5) < 0.02
    assert abs(counts[0] / total - 0.25) < 0.02
