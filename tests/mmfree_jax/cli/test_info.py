"""`mmfree info`."""

import json

import pytest

from mmfree_jax.cli.main import main
from mmfree_jax.config_io import dump_yaml
from mmfree_jax.presets import preset


def _json(capsys, *argv):
    assert main(["info", *argv, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_preset(capsys):
    report = _json(capsys, "--preset", "1.3B", "--devices", "1,8")
    assert report["parameters"]["total"] == pytest.approx(1.364e9, rel=1e-3)
    assert report["flops_per_token"]["training"] == 3 * report["flops_per_token"]["forward"]
    assert [(m["devices"], m["split"]) for m in report["memory"]] == [
        (1, "data"),
        (8, "data"),
        (8, "fsdp"),
    ]
    fsdp = report["memory"][2]
    assert fsdp["optimizer"] == report["memory"][0]["optimizer"] / 8
    parts = [v for k, v in fsdp.items() if k not in ("devices", "split", "total")]
    assert fsdp["total"] == pytest.approx(sum(parts))


def test_flags_change_single_fields(capsys):
    report = _json(capsys, "--preset", "370M", "--model.num-layers", "2", "--steps", "10")
    assert report["model"]["num_layers"] == 2
    assert report["training_flops"] == 10 * report["training_flops_per_step"]


def test_a_run_and_a_file(capsys, tmp_path):
    (tmp_path / "config.yaml").write_text(dump_yaml(preset("small")))
    expected = _json(capsys, "--preset", "small")
    assert _json(capsys, "--run", str(tmp_path)) == expected
    assert _json(capsys, "--config", str(tmp_path / "config.yaml")) == expected


def test_tables(capsys):
    assert main(["info", "--preset", "tiny", "--devices", "1,3"]) == 0
    out = capsys.readouterr().out
    for part in ("matmulfree", "embedding", "ternary", "training", "3 devices, fsdp: batch_size"):
        assert part in out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--devices", "none"], "--devices is 'none'"),
        (["--devices", "0"], "--devices is '0'"),
        (["--run", "/nowhere"], "/nowhere/config.yaml"),
        (["--run", "x", "--preset", "tiny"], "leave out --preset"),
        (["--preset", "99B"], "preset is '99B'"),
    ],
)
def test_bad_input_is_one_line(argv, message, capsys):
    assert main(["info", *argv]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1
