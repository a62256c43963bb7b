"""Columns in other units are refused where C contradicts them, else named in a warning."""

import numpy as np
import pytest
from synthetic_runs import isoflop_design

from mmfree_jax.experiments.scaling.errors import ScalingError
from mmfree_jax.experiments.scaling.output_files import write_csv
from mmfree_jax.experiments.scaling.read import read_runs

N, D, C = isoflop_design(10.0 ** np.linspace(17, 19, 3), 5)
RUNS = {"Size": N, "tokens": D, "flops": C, "loss": 2 + 400 * N**-0.34 + 1500 * D**-0.36}


def read(folder, **scale):
    """The frame of a file whose columns are multiplied by factors; None leaves one out."""
    kept = {k: v * scale.get(k, 1.0) for k, v in RUNS.items() if scale.get(k, 1.0) is not None}
    write_csv(folder / "x.csv", [{k: v[i] for k, v in kept.items()} for i in range(len(N))])
    return read_runs([folder / "x.csv"])


@pytest.mark.parametrize(
    ("name", "factor", "power"),
    [("tokens", 1e-6, 6), ("tokens", 1e-9, 9), ("tokens", 1e-3, 3), ("Size", 1e-6, 6),
     ("Size", 1e-9, 9), ("flops", 1e-18, 18), ("flops", 1e-15, 15), ("flops", 1e-21, 21)],
)  # fmt: skip
def test_a_column_that_contradicts_the_others_is_refused(tmp_path, name, factor, power):
    with pytest.raises(ScalingError) as caught:
        read(tmp_path, **{name: factor})
    told = str(caught.value)
    assert f"column '{name}' is in other units, by about 10^{power}: C is not near 6 N D" in told
    assert "in 15 of 15 runs, the first x.csv, row 2 (" in told
    flag = {"Size": "params"}.get(name, name)
    assert f"leave the column out by --columns.{flag} none" in told


def test_one_row_in_other_units_is_refused(tmp_path):
    one = np.ones(len(N))
    one[7] = 1e-6
    with pytest.raises(ScalingError, match=r"'tokens' is in other .* in 1 of 15 runs, .* row 9 "):
        read(tmp_path, tokens=one)


@pytest.mark.parametrize(
    ("scale", "told"),
    [
        ({"tokens": 1e-6}, "column 'tokens' has the median"),
        ({"tokens": 1e-9}, "column 'tokens' has the median"),
        ({"tokens": 1e-3}, "columns 'Size' and 'tokens' give 0.02 tokens a parameter (median)"),
        ({"Size": 1e-6}, "column 'Size' has the median"),
        ({"Size": 1e-3}, "columns 'Size' and 'tokens' give 2e+04 tokens a parameter (median)"),
        ({"Size": 1e-6, "tokens": 1e-6}, "column 'Size' has the median"),
        ({"loss": 1e3}, "column 'loss' has the median"),
        ({"loss": 1e-3}, "column 'loss' has the median"),
    ],
)
def test_without_compute_the_reader_is_warned(tmp_path, scale, told):
    notes = read(tmp_path, flops=None, **scale).notes
    assert told in notes[0]
    assert "other units" in notes[0]


def test_compute_in_other_units_is_told_where_tokens_follow_from_it(tmp_path):
    notes = read(tmp_path, tokens=None, flops=1e-9).notes
    assert "columns 'Size' and 'flops' give 2e-08 tokens a parameter (median)" in notes[0]
    assert "other units" not in " ".join(read(tmp_path, tokens=None).notes)


@pytest.mark.parametrize("ratio", [1 / 30, 30])  # a large head; an embedding that is counted
def test_honest_counts_pass(tmp_path, ratio):
    assert "units" not in " ".join(read(tmp_path, flops=ratio).notes)


def test_a_row_far_from_the_others_is_named(tmp_path):
    one = np.ones(len(N))
    one[3] = 1e-6
    notes = read(tmp_path, flops=None, tokens=one).notes
    assert "x.csv, row 5, the first of 1 runs outside 0.005 to 100000: other units?" in notes[0]
