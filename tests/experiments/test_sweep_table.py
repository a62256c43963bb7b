"""The results table under several writers, and readable by the scaling library."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from sweep_results import finish

from mmfree_jax.config_io import from_dict
from mmfree_jax.experiments.scaling.read import read_runs
from mmfree_jax.experiments.sweep.config import SweepConfig
from mmfree_jax.experiments.sweep.errors import SweepError
from mmfree_jax.experiments.sweep.plan import main_runs
from mmfree_jax.experiments.sweep.state import snapshot
from mmfree_jax.experiments.sweep.table import COLUMNS, RESULTS, append_result, read_results

ROOT = Path(__file__).parents[2]


def row(name, **values):
    base = {"run": name, "family": "matmulfree", "params": "2000000", "tokens": "30000",
            "params_non_embedding": "1000000", "params_ternary": "900000", "flops": "1.5e11",
            "loss": "3.5", "train_loss": "3.1", "size": "rung-1M", "seed": "0",
            "learning_rate": "0.004", "config_hash": "a"}  # fmt: skip
    return {c: str({**base, **values}.get(c, "")) for c in COLUMNS}


_WRITER = """
import sys
sys.path.insert(0, sys.argv[1] + "/tests/experiments")
from pathlib import Path
from test_sweep_table import row
from mmfree_jax.experiments.sweep.table import append_result
for i in range(25):
    append_result(Path(sys.argv[2]), row(f"{sys.argv[3]}-{i}"))
"""


def test_two_writers_lose_no_row(tmp_path):
    env = {"PYTHONPATH": f"{ROOT}:{ROOT}/tests/support", "PATH": "/usr/bin:/bin"}
    writers = [
        subprocess.Popen([sys.executable, "-c", _WRITER, str(ROOT), str(tmp_path), name], env=env)
        for name in "ab"
    ]
    while any(w.poll() is None for w in writers):
        for there in read_results(tmp_path):  # never half a row
            assert there["loss"] == "3.5"
    assert [w.returncode for w in writers] == [0, 0]
    names = [r["run"] for r in read_results(tmp_path)]
    assert sorted(names) == sorted(f"{w}-{i}" for w in "ab" for i in range(25))
    assert not list(tmp_path.glob("*.tmp"))


def test_a_row_is_written_once(tmp_path):
    append_result(tmp_path, row("x"))
    append_result(tmp_path, row("x", loss="9"))
    assert [r["loss"] for r in read_results(tmp_path)] == ["3.5"]
    with pytest.raises(SweepError, match="with another config"):
        append_result(tmp_path, row("x", config_hash="b"))


def test_damaged_tables_are_refused(tmp_path):
    append_result(tmp_path, row("x"))
    path = tmp_path / RESULTS
    whole = path.read_text()
    path.write_text(whole[:-20])
    with pytest.raises(SweepError, match="line 2 has"):
        append_result(tmp_path, row("y"))
    path.write_text("a,b\n1,2\n")
    with pytest.raises(SweepError, match="other columns"):
        read_results(tmp_path)
    path.write_text(whole + "x" * 200_000)
    with pytest.raises(SweepError, match="is no CSV"):
        read_results(tmp_path)


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        ({"loss": ""}, "line 3: loss is '', not given: restore"),
        ({"loss": "3,5"}, "line 3: loss is '3,5', not a number"),
        ({"loss": "-1"}, "line 3: loss is '-1', below 0"),
        ({"tokens": "1e5"}, "line 3: tokens is '1e5', not a whole number"),
        ({"learning_rate": "nan"}, "line 3: learning_rate is 'nan', not finite"),
        ({"mfu": "fast"}, "line 3: mfu is 'fast', not a number"),
        ({"seed": "x"}, "line 3: seed is 'x', not a whole number"),
        ({"run": ""}, "line 3: run is '', not given"),
        ({"run": "x"}, "line 3 is run 'x' again, as line 2: delete one"),
    ],
)
def test_a_cell_that_somebody_edited_is_told(tmp_path, cells, message):
    rows = [row("x"), {**row("y"), **cells}]
    lines = [",".join(f'"{text}"' for text in r.values()) for r in rows]
    (tmp_path / RESULTS).write_text("\n".join([",".join(COLUMNS), *lines]) + "\n")
    with pytest.raises(SweepError, match=message):
        read_results(tmp_path)


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        (("family", "other"), "has family 'other', where its name says 'matmulfree'"),
        (("size", "9x99"), "has size '9x99', where its name says '1x32'"),
        (("learning_rate", "0.002"), "has learning_rate 0.002, where its plan says 0.001"),
    ],
)
def test_a_row_that_is_not_of_its_run_is_told(tmp_path, cell, message):
    train = {"model": {"vocab_size": 300}, "data": {"paths": ["nowhere"], "seq_len": 64}}
    sweep = from_dict(SweepConfig, {
        "out": str(tmp_path), "families": [{"learning_rates": [0.001]}], "sizes": ["1x32"],
        "tokens": [1e5], "train": train,
    })  # fmt: skip
    finish(sweep, main_runs(sweep), lambda run: 3.0)
    assert len(snapshot(sweep).rows) == 1
    (there,) = read_results(tmp_path)
    (tmp_path / RESULTS).unlink()
    append_result(tmp_path, {**there, cell[0]: cell[1]})
    with pytest.raises(SweepError, match=message):
        snapshot(sweep)


def test_a_run_that_diverged_may_have_no_finite_loss(tmp_path):
    append_result(tmp_path, row("x", loss="nan", train_loss="inf"))
    assert read_results(tmp_path)[0]["loss"] == "nan"


def test_the_fitter_reads_it(tmp_path):
    append_result(tmp_path, row("x"))
    append_result(tmp_path, row("y", loss="3.4", params_non_embedding="1100000"))
    frame = read_runs([tmp_path / RESULTS])
    np.testing.assert_array_equal(frame.params, [2e6, 2e6])
    np.testing.assert_array_equal(frame.params_non_embedding, [1e6, 1.1e6])
    np.testing.assert_array_equal(frame.loss, [3.5, 3.4])
    np.testing.assert_array_equal(frame.flops, [1.5e11, 1.5e11])
    assert list(frame.run) == ["x", "y"]
    assert list(frame.family) == ["matmulfree"] * 2
