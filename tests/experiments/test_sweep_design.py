"""`mmfree sweep design`: from a budget and assumed laws to a sweep's config."""

import json

import numpy as np
import pytest
import yaml

from mmfree_jax.data import writer
from mmfree_jax.errors import MMFreeError
from mmfree_jax.experiments.cli import sweep as sweep_cli
from mmfree_jax.experiments.cli.sweep_design import design
from mmfree_jax.experiments.sweep.config import load_sweep
from mmfree_jax.experiments.sweep.plan import main_runs, parameters

LAW = "E=1.75,A=420,B=1900,alpha=0.34,beta=0.36"
OTHER = "E=1.85,A=300,B=2300,alpha=0.32,beta=0.37"


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Designs from a template of two families and five sizes; text and config."""
    monkeypatch.chdir(tmp_path)
    template = {
        "out": "study",
        "families": [{"base": "matmulfree", "learning_rates": [4e-3, 8e-3],
                      "learning_rates_at": {"rung-1M": [8e-3], "rung-61M": [2e-3]}},
                     {"base": "transformer", "learning_rates": [1e-3, 2e-3]}],
        "sizes": ["rung-1M", "rung-3M", "rung-7M", "rung-18M", "rung-61M"],
        "tokens": [1e7],
        "seeds": [4, 5],
        "replicates": {"sizes": ["rung-1M"], "seeds": [6]},
        "tuning": {"tokens": 1e7, "sizes": ["rung-1M", "rung-61M"]},
        "train": {"batch_size": 32, "model": {"vocab_size": 8192},
                  "data": {"paths": ["books"], "seq_len": 512}},
    }  # fmt: skip

    def act(*words, assume=(LAW,), change=None, budget="1e17"):
        (tmp_path / "template.yaml").write_text(yaml.safe_dump(template | (change or {})))
        argv = ["template.yaml", "--budget", budget, "--device", "H100", "--assume", *assume]
        assert design([*argv, *words]) == 0
        return capsys.readouterr().out, load_sweep("design.yaml")

    return act


def test_the_config_that_is_written_is_a_plan_within_the_budget(run, capsys):
    text, sweep = run("--quantity", "gap", "--at", "1e20", "--runs", "30",
                      assume=[f"matmulfree:{LAW}", f"transformer:{OTHER}"])  # fmt: skip
    runs = main_runs(sweep)
    assert 20 <= len(runs) <= 30
    assert 0.8e17 < sum(r.flops for r in runs) <= 1e17
    assert {r.seed for r in runs} == {4}
    cells = {f: {(r.size, r.tokens) for r in runs if r.family == f}
             for f in ("matmulfree", "transformer")}  # fmt: skip
    assert cells["matmulfree"] == cells["transformer"]
    for r in runs:
        assert 1.9 < r.tokens / parameters(r.config, "non-embedding") < 201
    assert (sweep.out, sweep.train["batch_size"], sweep.tuning.tokens) == ("study", 32, 1e7)
    sizes = {r.size for r in runs}
    assert set(sweep.tuning.sizes) == sizes & {"rung-1M", "rung-61M"}
    assert "loss of matmulfree less transformer at 1e+20 FLOPs: -" in text
    assert "H100 SXM minutes" in text
    assert "wrote design.yaml" in text
    assert sweep_cli.plan(["design.yaml", "--device", "H100"]) == 0
    assert f"transformer  {min(sizes)}" in capsys.readouterr().out


def test_families_apart_have_cells_and_seeds_of_their_own(run):
    _, sweep = run("--no-paired", "--repeats", "2", "--quantity", "floor", "--runs", "20")
    runs = main_runs(sweep)  # all for the first family, whose floor it is
    assert {r.family for r in runs} == {"matmulfree"}
    assert {r.seed for r in runs} == {4, 5}
    assert len(runs) <= 20


def test_all_rates_count_where_none_are_tuned(run):
    text, sweep = run("--runs", "64", change={
        "tuning": {}, "replicates": {}, "axes": {"b2": [0.9, 0.98]}})  # fmt: skip
    runs = main_runs(sweep)
    assert 56 <= len(runs) <= 64
    assert {r.config.optimizer.b2 for r in runs} == {0.9, 0.98}
    assert sum(r.flops for r in runs) <= 1e17
    assert f"{len(runs)} runs" in text


def test_shapes_come_from_the_ladder_where_no_sizes_are_named(run):
    no_sizes = {"sizes": [], "tokens": [], "flop_budgets": [1e17, 1e18], "replicates": {},
                "tokens_per_parameter": [5, 20, 80], "tuning": {"tokens": 1e7}}  # fmt: skip
    bare = [{"base": "matmulfree", "learning_rates": [4e-3, 8e-3]}]
    _, sweep = run("--params", "2e6", "2e7", change=no_sizes | {"families": bare})
    counts = [parameters(r.config, "non-embedding") for r in main_runs(sweep)]
    assert 2e6 <= min(counts) < max(counts) <= 2e7


def test_runs_end_with_the_corpus(run, tmp_path):
    identity = {"kind": "byte", "vocab_size": 256, "sha256": "0", "bos_id": None, "eos_id": None}
    tokens = np.zeros(10_000_000, np.uint8)
    writer.write_dataset(tmp_path / "books", {"train": [tokens], "heldout": [tokens[:9]]}, identity)
    _, sweep = run("--passes", "3")
    assert 2e7 < max(r.tokens for r in main_runs(sweep)) <= 3e7


def test_laws_come_from_fits(run, tmp_path):
    def fit(law, count="total"):
        values = {k: float(v) for k, v in (part.split("=") for part in law.split(","))}
        conventions = {"params": count, "flops": "exact"}
        return {"law": "chinchilla", "parameters": values, "interval_level": 0.95,
                "conventions": conventions}  # fmt: skip

    for name, document in (
        ("a", fit(LAW)), ("b", fit(OTHER)), ("n", fit(LAW, "non-embedding")),
        ("joint", {"law": "chinchilla", "families": {"matmulfree": fit(LAW),
                                                     "transformer": fit(OTHER)}}),
        ("bad", {"law": "chinchilla", "parameters": {"E": 1.7}}),
        ("line", {"law": "line", "parameters": {"intercept": 9.0, "slope": -0.3},
                  "interval_level": 0.95, "conventions": {"params": "total", "flops": "exact"}}),
    ):  # fmt: skip
        (tmp_path / f"{name}.json").write_text(json.dumps(document))
    gap = ("--quantity", "gap", "--at", "1e20", "--runs", "16")
    one, _ = run(*gap, assume=["matmulfree:a.json", "transformer:b.json"])
    both, _ = run(*gap, assume=["joint.json"])
    assert one == both
    assert "N (total)" in one
    shared, _ = run(*gap, "--share-floor", assume=["joint.json"])
    assert shared != both
    for assume, message in (
        (["bad.json"], "bad.json: is no whole fit: A is missing"),
        (["line.json"], "line.json is a fit of line; write one of chinchilla"),
        (["none.json"], "none.json: cannot be read"),
        (["mamba:a.json"], "'mamba' is no family of the sweep"),
        (["a.json", "matmulfree:b.json"], "matmulfree has two laws"),
        (["matmulfree:a.json", "transformer:n.json"], "N counts non-embedding and total"),
        (["E=1.7,A=400"], "'E=1.7,A=400' is no law"),
        (["matmulfree:hf://fits/a.json"], "assume is 'hf://fits/a.json'"),
        (["E=1.7,A=400,B=400,alpha=0.3,beta=-1"], "beta of matmulfree is -1"),
    ):
        with pytest.raises(MMFreeError, match=message):
            run(assume=assume)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--quantity", "gap"], "at is not given"),
        (["--quantity", "a", "--at", "1e20"], "leave it out for a"),
        (["--quantity", "crossing"], "cross 0 times"),
        (["--family", "mamba"], "family is 'mamba'"),
        (["--runs", "1"], "no cell is within both"),
        (["--runs", "8"], "leave parameters open"),
        (["--out", "template.yaml"], "is not replaced"),
    ],
)
def test_what_cannot_be_designed_is_refused_in_one_line(run, words, message):
    with pytest.raises(MMFreeError, match=message) as caught:
        run(*words)
    assert "\n" not in str(caught.value)
