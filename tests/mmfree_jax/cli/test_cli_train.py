"""`mmfree train`: which setting wins, and what bad input says."""

import shlex

import pytest

from mmfree_jax.cli.main import main
from mmfree_jax.cli.train import last_value, resolve_config
from mmfree_jax.config import TrainConfig
from mmfree_jax.config_io import dump_yaml
from mmfree_jax.presets import preset
from mmfree_jax.saved.run_directory import load_config


def _yaml(tmp_path, text):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    return str(path)


def test_defaults():
    assert resolve_config([]) == TrainConfig()


def test_preset_then_yaml_then_flags(tmp_path):
    path = _yaml(tmp_path, "steps: 77\nmodel:\n  hidden_size: 128\n  num_layers: 3\n")
    config = resolve_config(
        ["--preset", "tiny", "--config", path, "--model.hidden-size", "256", "--seed=4"]
    )
    assert config.model.vocab_size == preset("tiny").model.vocab_size
    assert (config.steps, config.model.num_layers) == (77, 3)
    assert (config.model.hidden_size, config.seed) == (256, 4)


def test_a_preset_flag_wins_over_the_files_preset(tmp_path):
    path = _yaml(tmp_path, "preset: small\nsteps: 5\n")
    assert resolve_config(["--config", path]).model == preset("small").model
    assert resolve_config(["--config", path, "--preset", "tiny"]).model == preset("tiny").model


def test_flags_that_set_the_defaults_may_be_spelt_with_underscores():
    """tyro takes both spellings; the defaults must be those of the model that is named."""
    assert last_value(["--init_from", "a", "--steps", "1"], "--init-from") == "a"
    assert last_value(["--init_from=a_b", "--init-from=c_d"], "--init-from") == "c_d"


def test_all_kinds_of_values():
    config = resolve_config(
        shlex.split(
            "--data.paths a b --data.weights 0.25 0.75 --log.no-tensorboard "
            "--log.profile-steps 3 5 --optimizer.learning-rate 3e-4 --optimizer.clip-norm None "
            "--model.head-linear.no-ternary-weights --checkpoint.no-resume --mesh.data -1"
        )
    )
    assert config.data.paths == ("a", "b")
    assert config.data.weights == (0.25, 0.75)
    assert config.log.profile_steps == (3, 5)
    assert config.optimizer.learning_rate == 3e-4
    assert config.optimizer.clip_norm is None
    assert not config.log.tensorboard
    assert not config.model.head_linear.ternary_weights
    assert not config.checkpoint.resume


def test_a_resolved_config_comes_back_the_same(tmp_path):
    config = resolve_config(["--preset", "1.3B-transformer", "--data.paths", "x"])
    assert resolve_config(["--config", _yaml(tmp_path, dump_yaml(config))]) == config


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (["--model.hidden-sise", "3"], ["--model.hidden-sise", "--model.hidden-size"]),
        (["--model.hidden-size", "big"], ["--model.hidden-size", "'big'", "whole number"]),
        (["--model.hidden-size", "-3"], ["model.hidden_size is -3", "above 0"]),
        (["--model.remat", "some"], ["--model.remat", "'some'", "dots"]),
        (["--model.hidden-size"], ["--model.hidden-size"]),
        (["--preset", "99B"], ["preset is '99B'", "370M"]),
        (["--preset"], ["--preset has no value"]),
        (["--config", "/nowhere.yaml"], ["/nowhere.yaml", "No such file"]),
        (["--steps", "5", "--optimizer.warmup-steps", "9"], ["optimizer.warmup_steps is 9"]),
        (["word"], ["word"]),
    ],
)
def test_bad_flags_are_one_line(argv, parts, capsys):
    assert main(["train", *argv]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("mmfree: error: ")
    assert err.count("\n") == 1
    for part in parts:
        assert part in err


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("modle: {}\n", ["'modle'", "did you mean 'model'"]),
        ("model: {hidden_sise: 3}\n", ["'model.hidden_sise'", "hidden_size"]),
        ("model: {hidden_size: big}\n", ["model.hidden_size is 'big'", "int"]),
        ("preset: 99B\n", ["preset is '99B'"]),
        ("a: [\n", ["not valid YAML"]),
    ],
)
def test_bad_files_are_one_line(text, parts, capsys, tmp_path):
    path = _yaml(tmp_path, text)
    assert main(["train", "--config", path]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    for part in parts:
        assert part in err


def test_missing_data_and_run_directory_are_one_line(capsys, tmp_path, small_run):
    assert main(["train", "--preset", "tiny", "--run-dir", str(tmp_path / "run")]) == 2
    assert "data.paths is empty" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    path = _yaml(tmp_path, dump_yaml(small_run))
    assert main(["train", "--config", path, "--run-dir", str(tmp_path / "file" / "run")]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert f"run_dir {tmp_path / 'file' / 'run'} cannot be written (Not a directory)" in err
    assert "choose a writable folder" in err


def test_exit_codes_of_a_run_that_was_stopped(monkeypatch, capsys):
    from mmfree_jax.train import training

    for stopped_by, code in ((None, 0), ("max_minutes", 0), ("SIGTERM", 143), ("SIGHUP", 129)):
        monkeypatch.setattr(training, "train", lambda config, s=stopped_by, **_: {"stopped_by": s})
        assert main(["train"]) == code


@pytest.mark.usefixtures("cached_compilation")
def test_a_run_from_the_command_line(capsys, tmp_path, small_run):
    path = _yaml(tmp_path, dump_yaml(small_run))
    run_dir = tmp_path / "run"
    argv = ["train", "--config", path, "--run-dir", str(run_dir), "--steps", "4"]
    assert main(argv) == 0
    out = capsys.readouterr().out
    assert "held-out loss" in out
    for file in ("config.yaml", "metrics.jsonl", "summary.json", "loss_curve.png"):
        assert str(run_dir / file) in out
    assert load_config(run_dir) == resolve_config(argv[1:])
    # A run directory's own config.yaml is all it takes to go on.
    assert main(["train", "--config", str(run_dir / "config.yaml")]) == 0
    assert "already holds this run" in capsys.readouterr().out
