"""The best checkpoints: chosen by a named number, kept, found by name, right after a restart."""

import dataclasses
import json

import pytest

from mmfree_jax.cli.main import main
from mmfree_jax.config import CheckpointConfig, TrainConfig
from mmfree_jax.errors import CheckpointError, ConfigError
from mmfree_jax.saved.best import BestMetric, best_metric
from mmfree_jax.saved.manifest import checkpoint_steps
from mmfree_jax.saved.open_model import open_model
from mmfree_jax.saved.run_directory import load_config
from mmfree_jax.train import loop
from mmfree_jax.train.best import BestSteps, with_direction
from mmfree_jax.train.held_out import HeldOutLoss, HeldOutLosses
from mmfree_jax.train.training import train

NAN, INF = float("nan"), float("inf")


def _evaluated(step, loss, **more):
    return {"kind": "eval", "step": step, "loss": loss, **more}


def test_ties_keep_the_earliest_and_what_is_not_finite_is_never_best():
    values = {2: NAN, 4: 3.0, 6: 2.0, 8: 2.0, 10: None, 12: INF, 14: -INF}
    records = [_evaluated(step, value) for step, value in values.items()]
    best = BestSteps(BestMetric("eval_loss", True), 2, records)
    assert best.among([2, 4, 6, 8, 10, 12, 14, 16]) == [6, 8]
    assert best.among([4, 8, 12]) == [8, 4]
    best.write(_evaluated(16, 1.0))
    best.write({"kind": "train", "step": 17, "loss": 0.1})
    assert best.among([6, 16, 17]) == [16, 6]
    highest = BestMetric("eval_accuracy/books", False)
    shares = {1: 0.2, 2: 0.4, 3: 0.4}
    records = [_evaluated(s, 1.0, **{"accuracy/books": share}) for s, share in shares.items()]
    assert highest.best(highest.values(records), [1, 2, 3]) == [2, 3, 1]
    task = BestMetric("piqa/acc", False)
    assert task.value({"kind": "tasks", "step": 3, "piqa/acc": 0.5}) == 0.5
    assert task.value(_evaluated(3, 1.0)) is None


def _config(**options):
    return TrainConfig(checkpoint=CheckpointConfig(keep_best=1, **options))


@pytest.mark.parametrize(
    ("config", "sources", "message"),
    [
        (_config(best_metric="loss"), ["a"], "eval_loss, eval_bits_per_byte, eval_accuracy, "),
        (_config(best_metric="eval_loss/c"), ["a", "b"], "eval_loss, eval_loss/a, eval_loss/b, "),
        (
            _config(best_metric="eval_loss/a"),
            ["a"],
            "choose one of eval_loss, eval_b",
        ),
        (_config(best_metric="own/score"), ["a"], "set --checkpoint.best-is"),
    ],
)
def test_a_number_that_is_not_logged_is_refused_with_those_that_are(config, sources, message):
    tasks = {"piqa/acc": False, "own/score": None}
    with pytest.raises(ConfigError, match=message):
        with_direction(config, sources, tasks)


def test_directions_are_known_or_given():
    def direction(**options):
        tasks = {"piqa/acc": False, "own/score": None}
        return with_direction(_config(**options), ["a", "b"], tasks).checkpoint.best_is

    assert direction() == "lowest"
    assert direction(best_metric="eval_bits_per_byte/b") == "lowest"
    assert direction(best_metric="eval_accuracy") == direction(best_metric="piqa/acc") == "highest"
    assert direction(best_metric="own/score", best_is="lowest") == "lowest"
    assert direction(best_is="highest") == "highest"
    with pytest.raises(ConfigError, match=r"nothing is evaluated: set --eval\.batches above 0"):
        with_direction(_config(), [], {})
    assert best_metric(CheckpointConfig()) == BestMetric("eval_loss", True)


@pytest.fixture
def scripted(monkeypatch, small_run, tmp_path):
    """scripted(name, losses, **changes): a run whose evaluations find these losses by step."""

    def run(name, losses, **changes):
        in_order = iter([losses[step] for step in sorted(losses)])
        monkeypatch.setattr(
            loop, "evaluate", lambda *_: HeldOutLosses(HeldOutLoss(next(in_order), 0.5, 10, 1.0))
        )
        config = dataclasses.replace(
            small_run,
            run_dir=str(tmp_path / name),
            checkpoint=CheckpointConfig(every_steps=5, keep_last=1, keep_best=1),
            eval=dataclasses.replace(small_run.eval, every_steps=2),
            **changes,
        )
        summary = train(config)
        return summary, checkpoint_steps(tmp_path / name / "checkpoints")

    return run


@pytest.mark.usefixtures("traced_once", "cached_compilation")
def test_the_best_is_saved_when_it_is_found_kept_and_opened_by_name(scripted, tmp_path, capsys):
    _, steps = scripted("run", {2: 3.0, 4: 2.0, 6: 2.0, 7: 2.4}, stop_at=7)
    assert steps == [4, 7]  # 4 is no multiple of 5; 6 is no better
    run = tmp_path / "run"
    summary = json.loads((run / "summary.json").read_text())
    assert summary["best"] == {"step": 4, "metric": "eval_loss", "value": 2.0}
    assert f"{run}/checkpoints/4 (eval_loss 2)" in capsys.readouterr().out
    assert load_config(run).checkpoint.best_is == "lowest"
    assert open_model(run, step="best").checkpoint() == run / "checkpoints/4"
    assert open_model(run).checkpoint() == run / "checkpoints/7"
    command = ["export-hf", str(run), str(tmp_path / "out"), "--step", "first"]
    assert main(command) == 2
    assert "best" in capsys.readouterr().err

    # The run goes on behind the best, which stays until the last evaluation, behind the last save.
    summary, steps = scripted("run", {8: NAN, 10: 2.5, 11: 1.5}, stop_at=11)
    assert (summary["best"]["step"], steps) == (11, [11])


def test_a_run_without_a_measured_checkpoint_has_no_best(finished, tmp_path):
    _, run_dir, _ = finished
    assert open_model(run_dir, step="best").checkpoint() == run_dir / "checkpoints/12"
    copy = tmp_path / "copy"
    (copy / "checkpoints/8").mkdir(parents=True)
    for name in ("config.yaml", "metrics.jsonl", "checkpoints/8/manifest.json"):
        (copy / name).write_bytes((run_dir / name).read_bytes())
    with pytest.raises(CheckpointError, match=r"finite eval_loss \(it has 8; measured at 6, 12\)"):
        open_model(copy, step="best").checkpoint()
