"""Which settings of a run may change when it is resumed."""

import dataclasses
from pathlib import Path

import pytest

from mmfree_jax.cli.main import main
from mmfree_jax.config import (
    CheckpointConfig,
    DataConfig,
    EvalConfig,
    LogConfig,
    MeshConfig,
    OptimizerConfig,
    TrainConfig,
)
from mmfree_jax.config_io import to_dict
from mmfree_jax.errors import ConfigError
from mmfree_jax.model_config import ModelConfig
from mmfree_jax.train.same_run import check_same_run, refuse_other_models


def _prolong(step, *, old=100, new=200, **optimizer):
    """Goes on at `step` of a run of `old` steps with `new` steps."""
    before = TrainConfig(steps=old, optimizer=OptimizerConfig(**optimizer))
    after = dataclasses.replace(before, steps=new)
    check_same_run(Path("run"), to_dict(before), after, step)


def test_steps_may_change_where_the_past_does_not():
    _prolong(100, schedule="constant", warmup_steps=10)
    _prolong(80, schedule="wsd", decay_fraction=0.2)
    _prolong(0, schedule="cosine")
    with pytest.raises(ConfigError, match=r"steps 100 -> 200 \(the 'wsd' schedule"):
        _prolong(90, schedule="wsd", decay_fraction=0.2)
    with pytest.raises(ConfigError, match="steps 100 -> 200"):
        _prolong(10, schedule="cosine")
    with pytest.raises(ConfigError, match="already made 60"):
        _prolong(60, schedule="constant", new=50)


def _resume(step=100, **changes):
    """Goes on at `step` of a run of the defaults with some settings changed."""
    before = TrainConfig()
    check_same_run(Path("run"), to_dict(before), dataclasses.replace(before, **changes), step)


_WHERE = "give another --run-dir; or its settings, --config run/config.yaml"
_BRANCH = "; or to go on from its checkpoint under other settings, --branch-from run --run-dir NEW"


def test_what_does_not_change_the_function_may_change_in_place():
    model = ModelConfig(scan_layers=False, remat="none", matmul_kernel="xla_int8")
    _resume(
        model=model,
        grad_accum=2,
        loss_chunk=64,
        mesh=MeshConfig(fsdp=2),
        log=LogConfig(every_steps=1),
        eval=EvalConfig(every_steps=3),
        checkpoint=CheckpointConfig(every_steps=7),
    )


@pytest.mark.parametrize(
    ("changes", "differing", "ways_out"),
    [
        ({"batch_size": 4}, "batch_size 8 -> 4", _WHERE + _BRANCH),
        (
            {"optimizer": OptimizerConfig(learning_rate=1e-3)},
            "optimizer.learning_rate 0.004 -> 0.001",
            _WHERE + _BRANCH,
        ),
        ({"steps": 2000}, "steps 1000 -> 2000 (the 'paper' schedule", _WHERE + _BRANCH),
        ({"data": DataConfig(seq_len=8)}, "data.seq_len 2048 -> 8", _WHERE + _BRANCH),
        ({"batch_size": 4, "step": 0}, "batch_size 8 -> 4", _WHERE),  # nothing to branch from
        ({"model": ModelConfig(num_layers=3)}, "model.num_layers 24 -> 3", _WHERE),
        ({"seed": 3}, "seed 0 -> 3", _WHERE),
        ({"branch_from": "a"}, "branch_from None -> 'a'", _WHERE),
    ],
)
def test_what_changes_it_is_refused_and_the_way_out_named(changes, differing, ways_out):
    with pytest.raises(ConfigError) as e:
        _resume(**changes)
    assert f"differing: {differing}" in str(e.value)
    assert str(e.value).endswith(ways_out)


def test_a_field_newer_than_the_checkpoint_has_its_default():
    saved = to_dict(TrainConfig())
    del saved["model"]["short_conv"]
    check_same_run(Path("run"), saved, TrainConfig(), 5)
    saved["model"]["unknown"] = 1
    with pytest.raises(ConfigError, match=r"model\.unknown"):
        check_same_run(Path("run"), saved, TrainConfig(), 5)


@pytest.mark.parametrize(
    ("file", "what"),
    [
        ("packed.safetensors", "a packed model"),
        ("model.yaml", "a model folder of ours"),
        ("config.json", "a Hugging Face model"),
        (".mmfree-output.json", "what a command made"),  # an export, prepared data
    ],
)
def test_a_run_goes_into_no_folder_of_another_model(file, what, tmp_path, byte_data, capsys):
    refuse_other_models(tmp_path)
    (tmp_path / file).write_text("{}")
    arguments = ["--preset", "tiny", "--data.paths", str(byte_data), "--run-dir", str(tmp_path)]
    assert main(["train", *arguments, "--eval.sample-tokens", "0"]) == 2
    error = capsys.readouterr().err.strip().split("\n")[-1]
    assert error == (
        f"mmfree: error: run_dir {tmp_path} holds {file} ({what}): give another --run-dir"
    )
    assert [path.name for path in tmp_path.iterdir()] == [file]
