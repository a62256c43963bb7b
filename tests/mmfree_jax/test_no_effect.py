"""Settings that change nothing: each pair by itself, and none in what the project ships."""

import dataclasses

import pytest

from mmfree_jax.cli.main import main
from mmfree_jax.config import TrainConfig
from mmfree_jax.config_io import from_dict
from mmfree_jax.no_effect import IDLE, without_effect
from mmfree_jax.presets import PRESETS

FLOAT = {"ternary_weights": False, "int8_activations": False, "input_norm": False}
DENSE = dict.fromkeys(("mixer_linear", "glu_linear", "head_linear"), FLOAT)

# A setting that changes nothing, and what lets it act: section, field, value, the other settings.
PAIRS = [
    ("optimizer", "second_stage_rate", 0.3, {"schedule": "cosine", "second_stage_at": 0.5}),
    ("optimizer", "decay_fraction", 0.1, {"schedule": "wsd"}),
    ("optimizer", "min_lr_ratio", 0.1, {"schedule": "cosine"}),
    ("checkpoint", "best_metric", "eval_accuracy", {"keep_best": 1}),
    ("checkpoint", "best_is", "lowest", {"keep_best": 1}),
    ("checkpoint", "local_every_steps", 7, {"local_dir": "copies"}),
    ("eval", "tasks_dir", "tasks", {"tasks": ["piqa"]}),
    ("eval", "tasks_every_steps", 5, {"tasks": ["piqa"]}),
    ("eval", "tasks_limit", 5, {"tasks": ["piqa"]}),
    ("eval", "tasks_minutes", 5.0, {"tasks": ["piqa"]}),
    ("log", "wandb_group", "g", {"wandb_project": "p"}),
    ("model", "num_heads", 2, {"mixer": "attention"}),
    ("model", "num_kv_heads", 2, {"mixer": "attention"}),
    ("model", "head_dim", 32, {"mixer": "attention"}),
    ("model", "attention_bias", "qkv", {"mixer": "attention"}),
    ("model", "qk_norm", True, {"mixer": "mlgru:3,attention"}),
    ("model", "rope_theta", 1e6, {"mixer": "attention"}),
    ("model", "rope_scaling", {"kind": "linear", "factor": 2.0}, {"mixer": "attention"}),
    ("model", "attention_kernel", "xla", {"mixer": "attention"}),
    ("model", "share_short_conv", False, {"short_conv": 4}),
    ("model", "mup_base_width", 128, {"mup": True}),
]

# The same where the other setting has to be given for the first to change nothing.
IDLE_UNDER = [
    ("optimizer", "second_stage_at", 0.5, {"schedule": "cosine", "second_stage_rate": 1.0}),
    ("optimizer", "eps", 1e-6, {"name": "lion"}),
    ("optimizer", "b2", 0.99, {"name": "adafactor"}),
    ("optimizer", "moment_dtype", "bfloat16", {"name": "schedule_free", "schedule": "constant"}),
    ("quantizer", "float_fraction", 1e-4, {}),
    ("quantizer", "warmup_fraction", 1e-4, {}),
    ("checkpoint", "at_steps", [2000], {}),
    ("eval", "every_steps", 7, {"batches": 0}),
    ("eval", "sample_every_steps", 7, {"sample_tokens": 0}),
    ("eval", "sample_prompt", "It", {"sample_tokens": 0}),
    ("eval", "sample_temperature", 0.0, {"sample_tokens": 0}),
    ("", "max_skips", 3, {}),
    ("", "stop_at", 1000, {}),
    ("model", "use_lower_bound", False, {"mixer": "rwkv4"}),
    ("model", "short_conv", 4, {"mixer": "attention"}),
    ("model", "expand_ratio", 2.0, {"mixer": "attention"}),
    ("model", "recurrence_kernel", "xla", {"mixer": "attention"}),
    ("model", "linear_norm_eps", 1e-8, DENSE),
    ("model", "backward", "int8_dx", {"bitlinear": "plain"}),
    ("model", "matmul_kernel", "xla_int8", DENSE),
    ("model", "bitlinear", "plain", DENSE),
]  # fmt: skip


def _config(section, values):
    return from_dict(TrainConfig, {section: values} if section else values)


def _told(section, field, config):
    name = f"{section}.{field}" if section else field
    return [line for line in without_effect(config) if line.startswith(f"{name} is ")]


@pytest.mark.parametrize(("section", "field", "value", "others"), PAIRS)
def test_a_setting_alone_is_told_and_with_its_other_is_not(section, field, value, others):
    (line,) = _told(section, field, _config(section, {field: value}))
    assert "changes nothing: " in line
    assert line.endswith(", or leave it out")
    assert not _told(section, field, _config(section, {field: value, **others}))
    # What is left out is never told of.
    assert not _told(section, field, _config(section, others))


@pytest.mark.parametrize(("section", "field", "value", "others"), IDLE_UNDER)
def test_a_setting_that_another_leaves_nothing_is_told(section, field, value, others):
    (line,) = _told(section, field, _config(section, {field: value, **others}))
    assert repr(_config(section, {field: value, **others})) != repr(TrainConfig())
    assert line.endswith(", or leave it out")


def test_gradients_of_the_textbook_program_are_exchanged_as_they_are():
    config = from_dict(
        TrainConfig,
        {"optimizer": {"gradient_dtype": "bfloat16"}, "model": {"bitlinear": "plain"}},
    )
    assert len(_told("optimizer", "gradient_dtype", config)) == 1


def test_every_field_of_the_table_is_in_a_pair():
    told = {f"{section}.{field}".lstrip(".") for section, field, *_ in (*PAIRS, *IDLE_UNDER)}
    assert {name for idle in IDLE for name in idle.fields} == told | {"optimizer.gradient_dtype"}


def test_presets_say_nothing_in_vain():
    for name, config in PRESETS.items():
        assert without_effect(config) == [], name
    imported = dataclasses.replace(PRESETS["tiny"].model, num_heads=1)
    config = dataclasses.replace(PRESETS["tiny"], model=imported, init_from="model")
    assert without_effect(config) == []


def test_the_command_says_so_in_one_line(capsys, tmp_path):
    # Refused later, as there are no data: nothing is trained.
    argv = ["train", "--preset", "tiny", "--run-dir", str(tmp_path / "r")]
    assert main([*argv, "--optimizer.second-stage-rate", "0.3"]) == 2
    err = capsys.readouterr().err
    assert (
        "warning: optimizer.second_stage_rate is 0.3, which changes nothing: set "
        "--optimizer.second-stage-at below 1, or leave it out\n"
    ) in err
