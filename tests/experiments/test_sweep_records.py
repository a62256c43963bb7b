"""What a sweep takes of records that an earlier one left: only what is of its settings and data."""

import json
import resource
from pathlib import Path

import pytest
from quick_trainer import TRAINER, quiet, starts

from mmfree_jax.errors import OutputError
from mmfree_jax.experiments.sweep.errors import SweepError
from mmfree_jax.experiments.sweep.pauses import record_pause
from mmfree_jax.experiments.sweep.runner import Options, run_sweep
from mmfree_jax.experiments.sweep.state import data_fingerprint, snapshot
from mmfree_jax.experiments.sweep.table import RESULTS, read_results

ONE = {"rates": (4e-3,), "sizes": ["rung-1M"]}


def _change_summary(sweep, **fields):
    """Sets fields of the one run's summary, and takes its row away: it was killed before that."""
    (path,) = Path(sweep.out).glob("runs/*/summary.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    (Path(sweep.out) / RESULTS).unlink(missing_ok=True)


def test_a_row_names_the_data_that_its_run_was_trained_on(make_sweep, trainer):
    sweep = make_sweep(**ONE)
    (name,) = run_sweep(sweep, Options(), say=quiet, command=trainer).done
    (run,) = snapshot(sweep).main
    now = data_fingerprint(run)
    _change_summary(sweep, data={"fingerprints": [now + "0" * 48]})
    run_sweep(sweep, Options(), say=quiet, command=trainer)
    (row,) = read_results(Path(sweep.out))
    assert row["data_fingerprint"] == now
    _change_summary(sweep, data=None)  # which does not say
    run_sweep(sweep, Options(), say=quiet, command=trainer)
    assert read_results(Path(sweep.out))[0]["data_fingerprint"] == now
    assert len(starts(sweep)[name]) == 1
    # Prepared anew in the same folder between the run's end and its row: the trainer must say so.
    _change_summary(sweep, data={"fingerprints": ["f" * 64]})
    run_sweep(sweep, Options(), say=quiet, command=trainer)
    assert len(starts(sweep)[name]) == 2


def test_a_row_is_not_of_data_that_came_while_the_run_was_trained(make_sweep, trainer, tmp_path):
    text = TRAINER.replace(
        '"status": status,', '"status": status, "data": {"fingerprints": ["ab"]},'
    )
    (tmp_path / "trainer.py").write_text(text)
    sweep = make_sweep(**ONE)
    with pytest.raises(SweepError, match=r"was run on other data \(ab, now [0-9a-f]{16}\)"):
        run_sweep(sweep, Options(), say=quiet, command=trainer)
    assert "ab" in (Path(sweep.out) / RESULTS).read_text()


@pytest.mark.parametrize(
    "damage", [{"parameters": 3}, {"device": None}, {"eval_loss": "low"}, {"data": []}]
)
def test_a_damaged_summary_is_a_failure_of_its_run(make_sweep, trainer, tmp_path, damage):
    sweep = make_sweep(**ONE)
    (name,) = run_sweep(sweep, Options(), say=quiet, command=trainer).done
    _change_summary(sweep, **damage)
    (tmp_path / "trainer.py").write_text("")  # which leaves it as it is
    tally = run_sweep(sweep, Options(), say=quiet, command=trainer)
    assert tally.failed == {
        name: "the trainer ended well but left no summary.json that can be read"
    }


def test_failures_under_other_settings_say_nothing_of_these(make_sweep, trainer):
    rates, train = (4e-3, 0.5), make_sweep().train
    sweep = make_sweep(rates=rates, sizes=["rung-1M"])
    (name,) = run_sweep(sweep, Options(), say=quiet, command=trainer).failed
    assert [snapshot(sweep).status(run) for run in snapshot(sweep).main] == ["done", "failed"]
    other = make_sweep(
        rates=rates[1:], sizes=["rung-1M"], train=train | {"optimizer": {"clip_norm": 0.5}}
    )
    (run,) = snapshot(other).main
    assert run.name == name
    assert (snapshot(other).status(run), snapshot(other).loss(run)) == ("cut off", None)
    old = Path(sweep.out) / "failures" / f"{name}.json"  # as older versions wrote them
    old.write_text(json.dumps({"kind": "diverged", "reason": "loss nan"}))
    assert snapshot(other).status(run) == "failed"


def test_pauses_on_other_data_are_refused(make_sweep, tmp_path):
    halved = {"tuning": {"tokens": 2e4}, "halving": {"eta": 2, "fraction": 0.25}}
    sweep = make_sweep(sizes=["1x64"], **halved)
    run = snapshot(sweep).tuning[0]
    record_pause(tmp_path / "out", run, 20, 3.0, data=data_fingerprint(run))
    assert run.name in snapshot(sweep).halved.paused
    path = tmp_path / "out" / "pauses" / f"{run.name}.json"
    path.write_text(path.read_text().replace(data_fingerprint(run), "0" * 16))
    with pytest.raises(SweepError, match=r"was run on other data \(0000000000000000, now "):
        snapshot(sweep)


@pytest.mark.parametrize("name", ["locks", "logs"])
def test_a_full_disk_ends_the_sweep_in_a_line_that_names_the_file(make_sweep, trainer, name):
    sweep, before = make_sweep(**ONE), resource.getrlimit(resource.RLIMIT_FSIZE)
    (run,) = snapshot(sweep).main
    folder = Path(sweep.out) / name
    folder.mkdir(parents=True)
    file = folder / f"{run.name}.{name[:-1]}"
    file.write_bytes(b"." * 20_000)  # what a lock's file holds is replaced; a log is added to

    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (0 if name == "locks" else 20_000, before[1]))
        with pytest.raises(OutputError, match=f"^{file}[^\n]* cannot be written .File too large"):
            run_sweep(sweep, Options(), say=quiet, command=trainer)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not starts(sweep)
