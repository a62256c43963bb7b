"""Runs come in from CSV, parquet and run directories; what is missing is named."""

import gzip
import json
import os

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mmfree_jax.errors import TrainingError
from mmfree_jax.experiments.scaling.errors import ScalingError
from mmfree_jax.experiments.scaling.frame import (
    compute,
    definitions,
    inputs,
    make_frame,
    resolve,
    sizes,
)
from mmfree_jax.experiments.scaling.read import Columns, read_runs


def write(path, text):
    path.write_text(text)
    return path


def test_columns_may_have_any_name(tmp_path):
    path = write(tmp_path / "x.csv", "weights;Daten;Verlust\n1e7;1e9;3.1\n2e7;2e9;2.9\n")
    frame = read_runs([path], Columns(params="weights", tokens="Daten", loss="Verlust"))
    np.testing.assert_array_equal(frame.params, [1e7, 2e7])
    np.testing.assert_array_equal(frame.tokens, [1e9, 2e9])
    np.testing.assert_array_equal(frame.loss, [3.1, 2.9])


def test_usual_names_are_found_and_tokens_are_derived(tmp_path):
    path = write(tmp_path / "x.csv", '"Model Size","Training FLOP",loss\n1e8,6e18,3.0\n')
    frame = read_runs([path])
    assert frame.tokens[0] == pytest.approx(1e10)
    assert "derived as FLOPs / (6 params)" in " ".join(frame.notes)
    assert "params = 'Model Size'" in " ".join(frame.notes)


def test_parquet_and_csv_stack(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"N": [1e7, 2e7], "D": [1e9, 1e9], "loss": [3.0, None]}),
                   tmp_path / "x.parquet")  # fmt: skip
    csv = write(tmp_path / "y.csv", "\ufeffN,D,loss\n3e7,1e9,2.5\n\n")
    frame = read_runs([tmp_path / "x.parquet", csv])
    np.testing.assert_array_equal(frame.params, [1e7, 3e7])
    assert "1 of 3 runs have no finite loss" in " ".join(frame.notes)


def test_where(tmp_path):
    path = write(tmp_path / "x.csv", "N,D,loss,family\n1e7,1e9,4,a\n2e7,1e9,3,a\n2e7,1e9,2,b\n")
    assert read_runs([path], where=["loss < 3.5", "family = a"]).loss.tolist() == [3.0]
    with pytest.raises(ScalingError, match="no column 'los'"):
        read_runs([path], where=["los < 3.5"])
    with pytest.raises(ScalingError, match="is not 'column < value'"):
        read_runs([path], where=["loss"])
    with pytest.raises(ScalingError, match="orders words"):
        read_runs([path], where=["family < b"])
    with pytest.raises(ScalingError, match="no row satisfies"):
        read_runs([path], where=["loss > 9"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("N,D\n1,2\n", "no column looks like the loss; name it with --columns.loss"),
        ("N,D,loss\n1e7,1e9,three\n", "column 'loss', row 2: 'three' is not a number"),
        ("N,D,loss\n1e7,1e9\n", "row 2 has 2 fields where the header has 3"),
        ("N,D,loss,loss\n1,2,3,4\n", "column 'loss' occurs twice"),
        ("N,n_params,loss\n1,2,3\n", None),
        ("params,Params,loss\n1,2,3\n", "could all be params"),
        ("N,D,loss\n", "a header and at least one run are needed"),
        ("N,D,loss\n1e7,1e9,-1\n", "'loss' is -1 in x.csv, row 2"),
        ("N,D,loss\n1e7,1e9,nan\n", "no row has a finite loss"),
    ],
)
def test_bad_tables_are_named(tmp_path, text, message):
    path = write(tmp_path / "x.csv", text)
    if message is None:
        assert len(read_runs([path])) == 1
        return
    with pytest.raises(ScalingError, match=message) as caught:
        read_runs([path])
    assert "\n" not in str(caught.value)


def test_missing_files_and_flags(tmp_path):
    with pytest.raises(ScalingError, match="does not exist"):
        read_runs([tmp_path / "no.csv"])
    path = write(tmp_path / "x.csv", "N,D,loss\n1,2,3\n")
    with pytest.raises(ScalingError, match=r"--columns.tokens names 'T', .* found 'N', 'D'"):
        read_runs([path], Columns(tokens="T"))
    write(tmp_path / "bad.parquet", "not parquet")
    with pytest.raises(ScalingError, match="not a readable parquet file"):
        read_runs([tmp_path / "bad.parquet"])
    with pytest.raises(ScalingError, match="neither a run directory"):
        read_runs([tmp_path])


SUMMARY = {
    "status": "complete", "family": "mmfree",
    "parameters": {"total": 1100, "non_embedding": 1000, "ternary": 900},
    "flops_per_token": {"forward": 2000, "training": 6600},
}  # fmt: skip


def run_directory(path, evals=((1, 4.0), (2, 3.0)), summary=SUMMARY, extra=""):
    path.mkdir()
    lines = [{"kind": "train", "step": s, "tokens": 100 * s, "loss": 5.0 - s} for s in (1, 2)]
    lines += [{"kind": "eval", "step": s, "tokens": 100 * s, "loss": v} for s, v in evals]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (path / "metrics.jsonl").write_text(text + extra)
    (path / "config.yaml").write_text("seed: 7\nmodel:\n  mixer: mlgru\n")
    if summary is not None:
        (path / "summary.json").write_text(json.dumps(summary))
    return path


def test_run_directories(tmp_path):
    run_directory(tmp_path / "one")
    run_directory(tmp_path / "two", evals=((1, 4.0), (2, 3.5), (1, 4.1), (2, 3.2)), extra='{"ki')
    frame = read_runs([tmp_path])
    assert frame.loss.tolist() == [3.0, 3.2]
    assert frame.tokens.tolist() == [200, 200]
    assert frame.flops.tolist() == [200 * 6600] * 2
    assert frame.family.tolist() == ["mmfree"] * 2
    assert frame.seed.tolist() == ["7"] * 2
    assert frame.run.tolist() == ["one", "two"]
    curve = read_runs([tmp_path / "two"], points="all")
    assert curve.loss.tolist() == [4.1, 3.2]


def test_run_directories_that_lack_something(tmp_path):
    one = run_directory(tmp_path / "one", summary=None)
    with pytest.raises(ScalingError, match=r"one/summary.json: is missing; a run writes it when"):
        read_runs([one])
    two = run_directory(tmp_path / "two", summary={"status": "complete"})
    with pytest.raises(ScalingError, match=r"two/summary.json: lacks 'parameters.total'"):
        read_runs([two])
    three = run_directory(tmp_path / "three", evals=())
    frame = read_runs([three])
    assert frame.loss.tolist() == [3.5]
    assert "mean training loss of the last 2 records stands in" in " ".join(frame.notes)
    four = run_directory(tmp_path / "four", extra='{"torn\n{"kind": "event"}\n')
    with pytest.raises(TrainingError, match="line 5 is not JSON"):
        read_runs([four])
    five = run_directory(tmp_path / "five", summary={**SUMMARY, "status": "stopped", "step": 2})
    assert "is stopped at step 2" in " ".join(read_runs([five]).notes)


def test_flop_conventions():
    frame = make_frame(params=120.0, params_non_embedding=100.0, params_ternary=80.0, tokens=10.0,
                       flops=7000.0, loss=[2.0])  # fmt: skip
    assert compute(frame, "6nd")[0] == 7200
    assert compute(frame, "6nd-non-embedding")[0] == 6000
    assert compute(frame, "exact")[0] == 7000
    # forward products of ternary weights: 2 x 80 x 10 FLOPs, of which a part is saved
    share = np.log2(3) * 8 / 256
    assert compute(frame, "bit-operations")[0] == pytest.approx(7000 - 1600 * (1 - share))
    assert compute(frame, "energy")[0] == pytest.approx(7000 - 1600 * (1 - 0.1 / 1.5))
    with pytest.raises(ScalingError, match="flops: '8nd' is unknown"):
        compute(frame, "8nd")
    bare = make_frame(params=120.0, tokens=10.0, loss=[2.0])
    with pytest.raises(ScalingError, match=r"'flops' is missing .* --columns.flops"):
        compute(bare, "exact")
    with pytest.raises(ScalingError, match="'params_ternary' is missing"):
        compute(bare, "energy")
    with pytest.raises(ScalingError, match="'params_non_embedding' is missing"):
        sizes(bare, "non-embedding")


def test_what_is_no_table_is_one_line(tmp_path):
    os.mkfifo(tmp_path / "pipe.csv")
    os.mkfifo(tmp_path / "pipe.parquet")
    (tmp_path / "long.csv").write_text("N,D,loss\n1,2," + "3" * 200_000 + "\n")
    (tmp_path / "cut.csv.gz").write_bytes(gzip.compress(b"N,D,loss\n1,2,3\n")[:-9])
    (tmp_path / "no.csv.gz").write_bytes(b"N,D,loss\n1,2,3\n")
    (tmp_path / "no.parquet").write_bytes(b"PAR1" + b"\xff" * 40 + b"\x20\0\0\0PAR1")
    for path, told in (
        ("/dev/null", "/dev/null: cannot be read .a device, not a file"),
        ("/dev/zero", "a device, not a file"),
        (tmp_path / "pipe.csv", "a named pipe, not a file"),
        (tmp_path / "pipe.parquet", "a named pipe, not a file"),
        (tmp_path / "long.csv", "long.csv: is no CSV .field larger than"),
        (tmp_path / "cut.csv.gz", "cut.csv.gz: cannot be read"),
        (tmp_path / "no.csv.gz", "no.csv.gz: cannot be read"),
        (tmp_path / "no.parquet", "no.parquet: is not a readable parquet file"),
    ):
        with pytest.raises(ScalingError, match=told):
            read_runs([path])


def test_a_number_that_no_float_holds_is_named(tmp_path):
    table = pa.table({"N": [1.0], "D": pa.array([2.0]), "loss": ["x" * 5000]})
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(ScalingError, match=r"column 'loss', row 2: 'x{100}' is not a number"):
        read_runs([tmp_path / "a.parquet"])


def test_a_summary_of_another_type_is_named(tmp_path):
    write(tmp_path / "metrics.jsonl", '{"kind": "eval", "tokens": 1, "loss": 2.0}\n')
    for text in ("[1]", "7", "[" * 100_000 + "]" * 100_000):
        write(tmp_path / "summary.json", text)
        with pytest.raises(ScalingError, match=r"summary\.json: is"):
            read_runs([tmp_path])


def test_gaps_and_nonsense_in_a_column_are_named():
    frame = make_frame(params=[1e7, np.nan], tokens=1e9, loss=[2.0, 3.0])
    gap = "'params' is empty or not finite in 1 of 2 runs, the first run 2, and"
    with pytest.raises(ScalingError, match=gap):
        inputs(frame, ("params",))
    frame = make_frame(params=[1e7, 0], tokens=1e9, loss=[2.0, 3.0])
    with pytest.raises(ScalingError, match="'params' is 0 in run 2"):
        inputs(frame, ("params",))
    with pytest.raises(ScalingError, match="'tokens' has 1 rows but 'loss' has 2"):
        make_frame(tokens=[1.0], loss=[2.0, 3.0])


def test_conventions_follow_the_columns():
    """N without embedding and head where the file says so, C as the file says it."""
    both = make_frame(params=120.0, params_non_embedding=100.0, tokens=10.0, flops=7000.0,
                      budget=8000.0, loss=[2.0, 3.0])  # fmt: skip
    assert resolve([both]) == ("non-embedding", "exact")
    assert resolve([both], budgets=True) == ("non-embedding", "budget")
    assert resolve([both], "total", "6nd", budgets=True) == ("total", "6nd")
    assert (sizes(both)[0], compute(both)[0], compute(both, "budget")[0]) == (100, 7000, 8000)
    bare = make_frame(params=120.0, tokens=10.0, loss=[2.0, 3.0], sources={"params": "Size"})
    assert resolve([both, bare]) == ("total", "6nd")
    assert definitions(bare, "total", "6nd") == {
        "N": "the parameters that column 'Size' counts", "C": "6 N D, N from column 'Size'"
    }  # fmt: skip
    bodies = make_frame(params_non_embedding=100.0, tokens=10.0, loss=[2.0])
    assert resolve([bodies]) == ("non-embedding", "6nd-non-embedding")


def test_run_directories_use_their_exact_flops(tmp_path):
    frame = read_runs([run_directory(tmp_path / "one"), run_directory(tmp_path / "two")])
    assert resolve([frame]) == ("non-embedding", "exact")
    assert compute(frame).tolist() == [200 * 6600] * 2


def test_a_column_can_be_left_out(tmp_path):
    path = write(tmp_path / "x.csv", "N,D,loss,arch,C\n1e7,1e9,3,a,7e16\n2e7,1e9,2,b,9e16\n")
    frame = read_runs([path])
    assert frame.family.tolist() == ["a", "b"]
    assert frame.sources["family"] == "arch"
    left = read_runs([path], Columns(family="none", flops="none"))
    assert left.family.tolist() == ["", ""]
    assert np.isnan(left.flops).all()
    named = write(tmp_path / "y.csv", "N,D,loss,none\n1e7,1e9,3,a\n")
    assert read_runs([named], Columns(family="none")).family.tolist() == ["a"]


def test_gaps_are_named_by_their_row(tmp_path):
    text = "N,D,C,loss,source\n1e7,1e9,7e16,3,paper\n,1e9,9e16,2,paper\n3e7,1e9,,2,paper\n"
    notes = " ".join(read_runs([write(tmp_path / "x.csv", text)]).notes)
    assert "params of 1 runs derived as FLOPs / (6 tokens), the first x.csv, row 3" in notes
    assert "column 'C' is empty in 1 of 3 runs, the first x.csv, row 4 (paper)" in notes
    bare = read_runs([write(tmp_path / "y.csv", "N,D,loss\n1e7,1e9,3\n,1e9,2\n")])
    with pytest.raises(ScalingError, match=r"in 1 of 2 runs, the first y\.csv, row 3, and"):
        inputs(bare, ("params",))


def test_rows_are_named_as_in_the_file_and_repeated_ones_are_noted(tmp_path):
    text = "N,D,loss,keep\n1e7,1e9,nan,1\n2e7,1e9,3,0\n2e7,-1e9,3,1\n3e7,1e9,2,1\n3e7,1e9,2,1\n"
    frame = read_runs([write(tmp_path / "x.csv", text)], where=["keep = 1"])
    with pytest.raises(ScalingError, match=r"'tokens' is -1e\+09 in x.csv, row 4; it must"):
        inputs(frame, ("params", "tokens"))
    notes = " ".join(frame.notes)
    assert "1 rows repeat another in every number, the first x.csv, row 5" in notes
    seeds = write(tmp_path / "y.csv", "N,D,loss,seed\n3e7,1e9,2,0\n3e7,1e9,2,1\n")
    assert "repeat" not in " ".join(read_runs([seeds]).notes)
