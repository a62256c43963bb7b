"""The sweeps of docs/recipes.md, expanded without training."""

from pathlib import Path

import pytest

from mmfree_jax.errors import ConfigError
from mmfree_jax.experiments.sweep.config import load_sweep
from mmfree_jax.experiments.sweep.plan import main_runs, parameters
from mmfree_jax.experiments.sweep.planned_run import config_hash

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "experiments" / "configs" / "recipes"
ARMS = {
    "absmean", "float-twin", "transformer", "ternary-transformer", "rwkv4", "attention",
    "mingru", "rglru", "hgrn2", "hybrid-3-1", "hybrid-6-1", "hybrid-3-1-float",
    "float-first-10", "float-first-30", "float-first-60", "warmup-20", "warmup-50",
    "float-first-30-warmup-20", "decay-0.1", "decay-0.1-ends", "linear", "linear-two-stages",
    "bitnet-two-stages", "paper-schedule", "squared-relu", "float-head", "muon", "lion",
    "adafactor", "schedule-free", "groups", "learnt-scale",
}  # fmt: skip


def runs_of(stage):
    return main_runs(load_sweep(CONFIGS / f"{stage}.yaml"))


def test_stage_1_has_every_arm_at_three_rates():
    runs = runs_of("stage1")
    assert {run.family for run in runs} == ARMS
    assert len(runs) == 3 * len(ARMS) == len({config_hash(run.config) for run in runs})
    assert {(run.size, run.seed, run.tokens) for run in runs} == {("rung-7M", 0, 8350 * 32 * 512)}
    by_arm = {name: [run.config for run in runs if run.family == name] for name in ARMS}
    for name, configs in by_arm.items():
        scale = 0.25 if name == "lion" else 1
        rates = [config.optimizer.learning_rate / scale for config in configs]
        assert rates == pytest.approx([2e-3, 4e-3, 8e-3]), name
    absmean = by_arm["absmean"][0]
    assert runs[0].tokens / parameters(absmean, "non-embedding") == pytest.approx(20, rel=0.01)
    (first, *_), (both, *_) = by_arm["float-first-30"], by_arm["float-first-30-warmup-20"]
    assert first.quantizer.forms(0, first.steps, first.steps) == ("float", "ternary")
    assert both.quantizer.ternary_from(both.steps) == both.steps / 2
    staged = by_arm["bitnet-two-stages"][0].optimizer
    assert (staged.second_stage_at, staged.weight_decay_until, staged.schedule) == (
        0.5, 0.5, "linear",
    )  # fmt: skip


def test_stage_2_has_two_seeds_of_the_best_arms_and_their_combination():
    runs = runs_of("stage2")
    known, best = (
        {"absmean", "float-twin", "transformer"},
        {"hybrid-6-1", "float-head", "adafactor"},
    )
    combined = "hybrid-6-1-float-head-adafactor"
    assert {run.family for run in runs} == known | best | {combined}
    assert {(run.size, run.seed) for run in runs} == {("rung-18M", 0), ("rung-18M", 1)}
    assert len(runs) == 7 * 3 * 2
    (config, *_) = [run.config for run in runs if run.family == combined]
    model = config.model
    assert (model.mixer, config.optimizer.name) == ("mlgru:6,attention", "adafactor")
    assert not model.head_linear.ternary_weights
    assert model.glu_linear.ternary_weights
    ratio = runs[0].tokens / parameters(runs[0].config, "non-embedding")
    assert ratio == pytest.approx(20, rel=0.01)


def test_every_arm_is_in_the_document():
    text = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    assert all(f"`{arm}`" in text for arm in ARMS)


@pytest.mark.parametrize(
    ("train", "name"),
    [
        ("quantizer: {float_fraction: 0.2}", "quantizer.float_fraction is 0.2"),
        ("optimizer: {weight_decay_until: 0.5}", "optimizer.weight_decay_until is 0.5"),
        ("optimizer: {schedule: wsd, second_stage_at: 0.5}", "optimizer.second_stage_at is 0.5"),
    ],
)
def test_budgets_that_share_a_trunk_cannot_switch_at_a_share_of_their_own(tmp_path, train, name):
    path = tmp_path / "sweep.yaml"
    path.write_text(
        "families: [{base: matmulfree}]\nsizes: [rung-1M]\ntokens: [1.0e+7, 2.0e+7]\n"
        f"schedule: wsd-branched\ntrain: {{{train}}}\n"
    )
    with pytest.raises(ConfigError, match=f"train.{name}: leave it out, or set schedule: train"):
        load_sweep(path)
