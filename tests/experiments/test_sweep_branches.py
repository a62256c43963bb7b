"""Branched sweeps: trunks and their decays in the plan, the runner and the table.

The trainer only pretends here; the real one is in test_sweep_end_to_end.py.
"""

import functools
import json
import shutil
import sys
from pathlib import Path

import pytest
import yaml

from mmfree_jax.config_io import from_dict, to_dict
from mmfree_jax.errors import ConfigError
from mmfree_jax.experiments.sweep.branches import apart, savings_text
from mmfree_jax.experiments.sweep.config import SweepConfig
from mmfree_jax.experiments.sweep.cost import DeviceRate, estimate
from mmfree_jax.experiments.sweep.errors import SweepError
from mmfree_jax.experiments.sweep.notes import plan_notes
from mmfree_jax.experiments.sweep.plan import flops_per_token, main_runs, shard
from mmfree_jax.experiments.sweep.planned_run import config_hash
from mmfree_jax.experiments.sweep.report import best_rows, plan_text, status_text, write_report
from mmfree_jax.experiments.sweep.runner import Options, run_sweep
from mmfree_jax.experiments.sweep.state import snapshot
from mmfree_jax.experiments.sweep.table import read_results

TRUNK = "matmulfree-2x64-trunk-lr0.004-s0"
SHORT, MIDDLE, LONG = (f"matmulfree-2x64-t{t}K-lr0.004-s0" for t in ("2.56", "5.12", "10.24"))

# A trunk saves each of its steps in turn. With FAKE=stepwise it saves the first and goes on only
# once a branch has started.
_TRAINER = """
import json, os, pathlib, sys, time, yaml
config = yaml.safe_load(open(sys.argv[1]))
out, steps, source = pathlib.Path(config["run_dir"]), config["steps"], config["branch_from"]
trunk, fake = out.parent.name == "trunks", os.environ.get("FAKE", "")
out.mkdir(parents=True, exist_ok=True)
with open(out / "starts", "a") as f:
    f.write(f"{steps} {source}\\n")
with open(out / "metrics.jsonl", "a") as f:
    f.write('{"kind": "train"}\\n')
yaml.safe_dump(config, open(out / "config.yaml", "w"))
kept = [int(path.name) for path in out.glob("checkpoints/*")]
def save(step):
    if step < max(kept, default=0):
        return  # it goes on from there
    folder = out / "checkpoints" / str(step)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "manifest.json").write_text("{}")
for n, step in enumerate(config["checkpoint"]["at_steps"]):
    if fake == f"diverges at {step}":
        print("mmfree: error: training is not finite: loss nan at step 9; lower the rate")
        sys.exit(2)
    if fake == "stepwise" and n == 1:
        end = time.time() + 30
        while not list(out.parents[1].glob("runs/*/starts")):
            if time.time() > end:
                sys.exit("no branch was started beside its trunk")
            time.sleep(0.05)
    save(step)
save(steps)
origin = None
if source:
    folder, step = source.rsplit("@", 1)
    assert (pathlib.Path(folder) / "checkpoints" / step / "manifest.json").is_file(), source
    origin = {"step": int(step), "tokens": int(step) * 256}
summary = {"status": "complete", "step": steps, "tokens": steps * 256,
  "eval_loss": None if trunk else 3 + 10 / steps, "training_flops": 1e9, "origin": origin,
  "parameters": {"total": 2, "non_embedding": 1, "ternary": 1},
  "device": {"kind": "cpu", "count": 1}, "versions": {"jax": "0"}, "tokens_per_s": 1e6}
(out / "summary.json").write_text(json.dumps(summary))
"""


def build(folder, **values):
    base = {
        "out": str(folder),
        "families": [{"base": "matmulfree", "learning_rates": [4e-3]}],
        "sizes": ["2x64"],
        "tokens": [2560, 5120, 10240],  # 10, 20 and 40 steps, 8, 16 and 32 at full rate
        "schedule": "wsd-branched",
        "warmup_fraction": 0.2,
        "train": {"batch_size": 4, "data": {"seq_len": 64}},
    }
    return from_dict(SweepConfig, {**base, **values})


@pytest.fixture
def make(tmp_path):
    return functools.partial(build, tmp_path / "out")


@pytest.fixture(scope="module")
def go(tmp_path_factory):
    script = tmp_path_factory.mktemp("trainer") / "trainer.py"
    script.write_text(_TRAINER)

    def command(config: Path) -> list[str]:
        return [sys.executable, str(script), str(config)]

    def run(sweep, **options):
        lines: list[str] = []
        return run_sweep(sweep, Options(**options), say=lines.append, command=command), lines

    return run


@pytest.fixture(scope="module")
def whole(tmp_path_factory, go):
    """A sweep that is done, two runs at a time: config, tally and lines. Leave it as it is."""
    sweep = build(tmp_path_factory.mktemp("whole") / "out")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FAKE", "stepwise")
        return sweep, *go(sweep, parallel=2)


@pytest.fixture
def done(whole, make):
    """A copy of it."""
    sweep = make()
    shutil.copytree(whole[0].out, sweep.out)
    return sweep


def starts(sweep, folder="runs"):
    found = Path(sweep.out).glob(f"{folder}/*/starts")
    return {path.parent.name: path.read_text().splitlines() for path in found}


def test_budgets_of_one_rate_and_seed_share_a_trunk(make):
    sweep = make(seeds=[0, 1])
    found = snapshot(sweep)
    assert [(t.name, t.config.steps, t.config.checkpoint.at_steps) for t in found.trunks] == [
        (TRUNK, 32, (8, 16, 32)),
        (TRUNK.replace("s0", "s1"), 32, (8, 16, 32)),
    ]
    assert {r.name: (r.trunk, r.full_rate_steps) for r in found.main if r.seed == 0} == {
        SHORT: (TRUNK, 8), MIDDLE: (TRUNK, 16), LONG: (TRUNK, 32),
    }  # fmt: skip
    for run in found.runs:
        assert run.config.optimizer.warmup_steps == 2  # of the shortest
        assert run.config.optimizer.schedule == "wsd"
    order = [r.name for r in found.runs if r.seed == 0]
    assert order == [TRUNK, SHORT, MIDDLE, LONG]


def test_a_trunk_is_counted_once(make):
    sweep = make(overhead_seconds=0.0)
    found = snapshot(sweep)
    step = flops_per_token(found.main[0].config) * 256
    cost = estimate(sweep, found.runs, [], DeviceRate("cpu", 1, 1e12, True))
    assert cost.flops == pytest.approx(step * (32 + 2 + 4 + 8))
    assert cost.seconds == pytest.approx(cost.flops / (1e12 * sweep.utilisation))
    text = savings_text(found.runs)
    assert text is not None
    whole = f"{step * 70:.3g}"
    assert text.startswith("branched: 1 trunks carry 3 decays, ")
    assert f"in place of {whole} for separate runs (34% less)" in text  # 46 steps for 70
    assert text in plan_notes(sweep, found.runs, None)
    separate = estimate(sweep, apart(found.runs), [], DeviceRate("cpu", 1, 1e12, True))
    assert (separate.runs, separate.flops) == (3, pytest.approx(step * 70))
    stages = [line.split()[2] for line in plan_text(found.runs, None).splitlines()]
    assert stages == ["stage", "trunk", "branch", "branch", "branch"]
    # What a finished branch took to start: its wall time without the steps of its own.
    rows = [{"device": "cpu", "parallel": "1", "family": "matmulfree", "size": "2x64",
             "tokens": "10240", "trunk_tokens": "8192", "tokens_per_s": "256",
             "wall_s": "13"}]  # fmt: skip
    again = estimate(sweep, found.runs, rows, DeviceRate("cpu", 1, 1e12, True))
    assert again.seconds == pytest.approx(46 + 4 * 5)


def test_a_branch_has_the_settings_of_the_run_alone(make):
    branched = {r.name: r for r in snapshot(make(tokens=[2560, 10240])).main}
    wsd = {"batch_size": 4, "data": {"seq_len": 64}, "optimizer": {"schedule": "wsd"}}
    (alone,) = main_runs(make(tokens=[2560], schedule="train", train=wsd))
    assert branched[SHORT].trunk == TRUNK
    assert config_hash(branched[SHORT].config) == config_hash(alone.config)


def test_single_budgets_and_other_rates_have_no_trunk(make):
    assert snapshot(make(tokens=[2560])).trunks == []
    families = [{"base": "matmulfree", "learning_rates": [4e-3, 8e-3]}]
    assert len(snapshot(make(families=families)).trunks) == 2
    assert snapshot(make(schedule="train")).trunks == []


def test_branches_start_where_their_trunk_has_come_to(whole, go):
    sweep, tally, lines = whole
    assert not tally.failed, tally.failed
    assert sorted(tally.done) == sorted([TRUNK, SHORT, MIDDLE, LONG])
    folder = f"{sweep.out}/trunks/{TRUNK}"
    assert starts(sweep, "trunks") == {TRUNK: ["32 None"]}
    assert starts(sweep) == {
        SHORT: [f"10 {folder}@8"], MIDDLE: [f"20 {folder}@16"], LONG: [f"40 {folder}@32"],
    }  # fmt: skip
    assert any(f"{TRUNK}: trunk of 3 branches" in line for line in lines)
    rows = {row["run"]: row for row in read_results(Path(sweep.out))}
    assert {name: (row["trunk"], row["trunk_tokens"], row["tokens"]) for name, row in rows.items()
            } == {SHORT: (TRUNK, "2048", "2560"), MIDDLE: (TRUNK, "4096", "5120"),
                  LONG: (TRUNK, "8192", "10240")}  # fmt: skip
    text, _ = write_report(snapshot(sweep))
    assert "3 of these 3 runs are decays branched from 1 trunks" in text
    assert len(best_rows(snapshot(sweep))) == 3
    assert "4 done; " in status_text(snapshot(sweep))
    assert not go(sweep)[0].done


def test_larger_budgets_make_the_trunk_longer_and_others_take_what_is_kept(done, make, go):
    sweep = make(tokens=[1280, 2560, 5120], min_steps=5)
    with pytest.raises(SweepError, match="other settings"):  # another warm-up is another run
        snapshot(sweep)
    sweep = make(tokens=[2560, 5120, 7680, 10240, 20480])
    waiting = "matmulfree-2x64-t20.48K-lr0.004-s0"
    found = snapshot(sweep)
    states = {run.name: found.status(run) for run in found.runs}
    between = "matmulfree-2x64-t7.68K-lr0.004-s0"
    assert states[TRUNK] == "cut off"
    assert states[between] == "pending"
    assert states[waiting] == "waiting"
    assert "1 branches wait for their trunks" in status_text(found)
    go(sweep)
    assert starts(sweep, "trunks")[TRUNK] == ["32 None", "64 None"]
    folder = f"{sweep.out}/trunks/{TRUNK}"
    assert starts(sweep)[between] == [f"30 {folder}@16"]  # 24 was not kept
    assert starts(sweep)[waiting] == [f"80 {folder}@64"]


def test_the_table_is_enough_to_go_on_elsewhere(whole, make, go, tmp_path):
    there = tmp_path / "there"
    there.mkdir()
    lines = (Path(whole[0].out) / "results.csv").read_text().splitlines(keepends=True)
    (there / "results.csv").write_text("".join(lines))
    assert not go(make(out=str(there)))[0].done
    (there / "results.csv").write_text("".join(line for line in lines if LONG not in line))
    assert sorted(go(make(out=str(there)))[0].done) == [LONG, TRUNK]


def test_a_trunk_that_fails_fails_the_branches_it_had_not_come_to(make, go, monkeypatch):
    monkeypatch.setenv("FAKE", "diverges at 16")
    sweep = make()
    tally, _ = go(sweep)
    assert list(tally.failed) == [TRUNK]
    assert tally.done == [SHORT]
    assert tally.waiting == 2
    found = snapshot(sweep)
    assert {r.name: found.status(r) for r in found.runs} == {
        TRUNK: "failed", SHORT: "done", MIDDLE: "failed", LONG: "failed",
    }  # fmt: skip
    assert found.failures[LONG]["reason"].startswith(f"its trunk {TRUNK} failed: training is not")
    again, _ = go(sweep)
    assert sorted(again.standing) == sorted([TRUNK, MIDDLE, LONG])
    monkeypatch.delenv("FAKE")
    repaired, _ = go(sweep, retry_failed=True)
    assert sorted(repaired.done) == sorted([TRUNK, MIDDLE, LONG])
    assert repaired.waiting == 0
    assert {snapshot(sweep).status(r) for r in snapshot(sweep).runs} == {"done"}


def test_checkpoints_of_a_trunk_go_after_its_last_branch(make, go):
    sweep = make(keep_checkpoints=False)
    tally, _ = go(sweep)
    assert len(tally.done) == 4
    assert list(Path(sweep.out).glob("*/*/checkpoints/*")) == []
    assert not go(sweep)[0].done


def test_a_branch_that_was_cut_off_keeps_its_source(done, go):
    sweep, out = done, Path(done.out)
    table = out / "results.csv"
    table.write_text("".join(line for line in table.open() if LONG not in line))
    (out / "runs" / LONG / "summary.json").unlink()
    path = out / "runs" / LONG / "config.yaml"
    there = yaml.safe_load(path.read_text()) | {"branch_from": f"{out}/trunks/{TRUNK}@8"}
    path.write_text(yaml.safe_dump(there))
    assert go(sweep)[0].done == [LONG]
    assert starts(sweep)[LONG][-1] == f"40 {out}/trunks/{TRUNK}@8"


def test_tuning_runs_stay_whole_and_their_winner_is_no_branch(make, go):
    families = [{"base": "matmulfree", "learning_rates": [2e-3, 4e-3]}]
    sweep = make(families=families, tuning={"tokens": 5120})
    found = snapshot(sweep)
    assert [r.full_rate_steps for r in found.tuning] == [16, 16]
    assert all(r.trunk is None for r in found.tuning)
    (trunk,) = found.trunks
    assert trunk.config.checkpoint.at_steps == (8, 32)  # without the tuning budget
    assert found.status(trunk) == "waiting"
    assert "3 runs wait for the tuning runs" in status_text(found)
    tally, _ = go(sweep)
    assert len(tally.done) == 2 + 1 + 2
    assert {row["trunk"] for row in read_results(Path(sweep.out)) if row["tokens"] == "5120"} == {
        ""
    }
    assert len(best_rows(snapshot(sweep))) == 3


def test_a_shard_has_a_trunk_with_its_branches(make):
    sweep = make(seeds=[0, 1, 2])
    runs = snapshot(sweep).of_stage("main")
    parts = [shard(sweep, runs, i, 2) for i in range(2)]
    assert sorted(r.name for part in parts for r in part) == sorted(r.name for r in runs)
    for part in parts:
        assert {r.trunk for r in part if r.trunk} == {r.name for r in part if r.stage == "trunk"}
    assert sorted(map(len, parts)) == [4, 8]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schedule": "wsd"}, "schedule is 'wsd': choose one of train, wsd-branched"),
        ({"train": {"optimizer": {"schedule": "cosine"}}},
         "train.optimizer.schedule is 'cosine': leave it out: schedule is wsd-branched"),
        ({"families": [{"learning_rates": [1e-3], "train": {"optimizer": {"schedule": "paper"}}}]},
         r"families\[0\].train.optimizer.schedule is 'paper'"),
        ({"train": {"optimizer": {"decay_fraction": 0.0}}}, "decay_fraction is 0.0: use one above"),
        ({"train": {"optimizer": {"decay_fraction": "0.0"}}}, "decay_fraction is 0.0: use one abo"),
        ({"train": {"optimizer": {"decay_fraction": 0.8}}}, "decay_fraction is 0.8: use one above"),
    ],
)  # fmt: skip
def test_other_schedules_are_refused(make, change, message):
    with pytest.raises(ConfigError, match=message):
        make(**change)


def test_a_trunk_of_other_settings_is_not_branched_from(whole, make):
    out = Path(whole[0].out)
    elsewhere = Path(make().out)
    shutil.copytree(out / "trunks", elsewhere / "trunks")
    assert snapshot(make()).status(snapshot(make()).trunks[0]) == "done"  # as it has come so far
    other = {"batch_size": 4, "data": {"seq_len": 64}, "optimizer": {"weight_decay": 0.1}}
    with pytest.raises(SweepError, match=f"trunks/{TRUNK} is a trunk of other settings: give anot"):
        snapshot(make(train=other))
    more = {"batch_size": 4, "data": {"seq_len": 64}, "eval": {"batches": 3}}
    assert snapshot(make(train=more)).trunks  # which changes no trunk


def test_a_branched_sweep_without_trunks_says_so(make):
    families = [{"base": "matmulfree", "learning_rates": [4e-3, 8e-3]}]
    sweep = make(tokens=[2560], families=families)
    (note,) = plan_notes(sweep, snapshot(sweep).runs, None)
    assert note.startswith("note: schedule is wsd-branched, but no two runs differ in their budget")


def test_a_branched_sweep_is_read_back(make):
    sweep = make()
    assert from_dict(SweepConfig, json.loads(json.dumps(to_dict(sweep)))) == sweep
