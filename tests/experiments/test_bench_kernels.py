"""`mmfree bench kernels`: rows, limits, the chart and the table of choices."""

import json
import math

import jax
import pytest

from mmfree_jax.errors import ConfigError
from mmfree_jax.experiments.bench.kernels import write_choices
from mmfree_jax.experiments.bench.roofline import plot, with_limits, work_of
from mmfree_jax.experiments.cli.bench_kernels import kernels
from mmfree_jax.pallas_kernels import dispatch as choices
from mmfree_jax.train.flops import find_device

_H100 = find_device("NVIDIA H100 80GB HBM3")


def test_the_command_writes_rows_and_choices_for_this_device(tmp_path, capsys):
    table = tmp_path / "choices.json"
    table.write_text(json.dumps({"other": {"norm_quant": {}}}))
    argv = ["--ops", "norm_quant", "--sizes", "tiny", "--tokens", "8", "--seq-len", "4"]
    assert kernels([*argv, "--out", str(tmp_path), "--choices", str(table)]) == 0
    record = json.loads((tmp_path / "kernels.json").read_text())
    assert record["command"].startswith("mmfree bench kernels --ops norm_quant")
    assert record["versions"]["jax"] == jax.__version__
    assert {row["form"] for row in record["rows"]} == {"outer", "times_silu", "gated"}
    assert all(row["ms"] > 0 and row["bytes"] > 0 for row in record["rows"])
    written = json.loads(table.read_text())
    assert written["other"] == {"norm_quant": {}}
    mine = written[jax.devices()[0].device_kind]["norm_quant"]["bfloat16"]
    assert mine["64"]["implementation"] == "xla"
    assert "norm_quant" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["{", "[]", '{"name": "mine"}'])
def test_what_is_no_table_of_choices_stays(tmp_path, text):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(ConfigError, match="which is no table of choices"):
        write_choices([], tmp_path / "x.json", command="")
    assert (tmp_path / "x.json").read_text() == text


def test_bad_arguments_name_the_way_out(tmp_path):
    with pytest.raises(ConfigError, match="ops is 'nope': choose from recurrence"):
        kernels(["--ops", "nope"])
    with pytest.raises(ConfigError, match="multiple of seq_len"):
        kernels(["--tokens", "100", "--seq-len", "64"])
    with pytest.raises(ConfigError, match="its folder does not exist"):
        kernels(["--choices", str(tmp_path / "none" / "choices.json")])


def test_limits_are_the_longer_of_bytes_and_products():
    small = {"op": "ternary_matmul", "m": 16384, "n": 1024, "k": 1024, "variant": "x", "ms": 0.1}
    work = work_of(small)
    assert work.operations == 2 * 16384 * 1024 * 1024
    assert work.bytes == 16384 * 1024 + 1024 * 1024 + 2 * 16384 * 1024
    row = with_limits(small, _H100)
    assert row["limit_ms"] == pytest.approx(1e3 * work.operations / 1978.8e12, rel=1e-3)
    assert row["of_limit"] == pytest.approx(row["limit_ms"] / 0.1, abs=1e-3)
    peer = with_limits({**small, "variant": "bf16 (peer)"}, _H100)
    assert peer["limit_ms"] == pytest.approx(2 * row["limit_ms"], rel=1e-3)
    scan = with_limits(
        {"op": "recurrence forward", "shape": (8, 2048, 2048), "variant": "xla", "ms": 0.3}, _H100
    )
    assert scan["limit_ms"] == pytest.approx(1e3 * 6 * 8 * 2048 * 2048 / 3.35e12, rel=1e-3)


def test_the_chart_is_drawn(tmp_path):
    rows = [
        with_limits(
            {"op": "recurrence forward", "shape": (8, 64, 64), "variant": v, "ms": 1}, _H100
        )
        for v in ("xla", "pallas_gpu")
    ]
    plot(rows, _H100, tmp_path / "roofline.png")
    assert (tmp_path / "roofline.png").stat().st_size > 10_000


def _row(variant, key, ms, **more):
    return {"op": "norm_quant forward", "variant": variant, "key": key, "ms": ms,
            "dtype": "bfloat16", "candidate": True, **more}  # fmt: skip


def test_the_winner_has_the_least_sum_and_ran_everywhere():
    rows = [
        _row("xla", (64,), 1.0),
        _row("xla", (64,), 1.0, op="norm_quant backward"),
        _row("kernel", (64,), 1.5),
        _row("kernel", (64,), 0.1, op="norm_quant backward"),
        _row("broken", (64,), 0.1),
        {**_row("broken", (64,), 0.1), "ms": None, "error": "lost"},
        _row("peer", (64,), 0.01, candidate=False),
        _row("wrong", (64,), 0.1, differ=math.nan),
        _row("wrong", (64,), 0.1, op="norm_quant backward", differ=0.0),
        _row("lost", (64,), 0.1),
        _row("lost", (64,), 0.1, op="norm_quant backward", differ=math.inf),
    ]
    del rows[5]["ms"]
    table = choices.choose(rows)
    assert table["norm_quant"]["bfloat16"]["64"]["implementation"] == "kernel"
    assert set(table["norm_quant"]["bfloat16"]["64"]["ms"]) == {"xla", "kernel"}


def test_the_nearest_measured_shape_decides(tmp_path, monkeypatch):
    entry = {"8 x 64": {"implementation": "xla"}, "4096 x 64": {"implementation": "kernel"}}
    half = {"8 x 64": {"implementation": "kernel"}}
    mine = {"bfloat16": {"1 x 1": {"implementation": "mine"}}}
    table = {
        "a": {"op": {"bfloat16": entry, "float16": half}},
        "b": {"same_as": "a", "other": mine},
    }
    path = tmp_path / "choices.json"
    path.write_text(json.dumps(table))
    monkeypatch.setattr(choices, "TABLE", path)
    choices._rows.cache_clear()
    best = choices.measured_best
    assert best("op", (16, 64), device_kind="a") == "xla"
    assert best("op", (2048, 64), device_kind="a") == "kernel"
    assert best("op", (2048, 64), device_kind="b") == "kernel"
    assert best("op", (2048, 64), device_kind="unknown") is None
    assert best("op", (8, 64), device_kind="a", dtype="float16") == "kernel"  # its own winner
    assert best("op", (8, 64), device_kind="a", dtype="float32") == "xla"  # bfloat16's
    assert best("other", (8, 64), device_kind="a") is None
    assert best("other", (8, 64), device_kind="b") == "mine"
    choices._rows.cache_clear()
