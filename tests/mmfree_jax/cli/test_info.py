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


def test_groups_say_that_they_have_no_kernel(capsys):
    argv = ["info", "--preset", "rung-1M", "--model.weight-scale", "groups"]
    assert main(argv) == 0
    assert "note: weight_scale groups: no Pallas kernel takes them" in capsys.readouterr().out
    assert main(argv[:3]) == 0
    assert "note:" not in capsys.readouterr().out


def test_packed_bytes_by_hand(capsys):
    # vocabulary 512, width 128, one layer of a GLU of 256: mixer 4 * 128 * 128, GLU
    # 3 * 128 * 256 and head at a quarter of a byte, the embedding in bfloat16; in float32 seven
    # scales, and of norms the block's two, four inputs', the gate's, gate_up's, the last and the
    # head's of 128, down's of 256; 128 lower bounds.
    flags = "--preset rung-1M --model.vocab-size 512 --model.hidden-size 128 --model.num-layers 1"
    argv = [*flags.split(), "--model.intermediate-size", "256"]
    trits, vectors = 4 * 128 * 128 + 3 * 128 * 256 + 512 * 128, 10 * 128 + 256 + 128
    report = _json(capsys, *argv)
    assert report["packed_bytes"] == trits // 4 + 2 * 512 * 128 + 4 * (7 + vectors)
    assert report["not_packed"] == []
    # A float head is in float32 on disk, without a scale and a norm, and keeps the model unpacked.
    loose_flags = ["no-ternary-weights", "no-int8-activations", "no-input-norm"]
    loose = _json(capsys, *argv, *(f"--model.head-linear.{flag}" for flag in loose_flags))
    head = 4 * 512 * 128 - 512 * 128 // 4 - 4 * (1 + 128)
    assert loose["packed_bytes"] == report["packed_bytes"] + head
    assert loose["not_packed"] == ["model.head_linear"]
    dense = _json(capsys, "--preset", "rung-1M-transformer")
    assert dense["packed_bytes"] is None
    assert dense["bfloat16_bytes"] == 2 * dense["parameters"]["total"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--devices", "none"], "--devices is 'none'"),
        (["--devices", "0"], "--devices is '0'"),
        (["--run", "/nowhere"], "there is no /nowhere/config.yaml, so it is no training run"),
        (["--run", "x", "--preset", "tiny"], "leave out --preset"),
        (["--preset", "99B"], "preset is '99B'"),
    ],
)
def test_bad_input_is_one_line(argv, message, capsys):
    assert main(["info", *argv]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1
