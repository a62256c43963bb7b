"""The studies of 8-bit backward products, on a model of two layers after two steps."""

import json

import jax.numpy as jnp
import prepared_data
import pytest

from mmfree_jax.cli.train import train
from mmfree_jax.experiments import gradient_agreement, gradient_rounding


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gradients")
    data = folder / "data"
    texts = prepared_data.write_jsonl(folder / "texts.jsonl", prepared_data.TEXTS)
    prepared_data.run(data, input=(texts,))
    arguments = f"--preset tiny --steps 2 --batch-size 8 --data.seq-len 32 --data.paths {data}"
    quiet = (
        "--eval.batches 0 --eval.sample-tokens 0 --checkpoint.every-steps 1 --log.no-tensorboard"
    )
    assert train([*arguments.split(), *quiet.split(), "--run-dir", str(folder / "run")]) == 0
    return folder / "run", data


def test_cosines_are_those_of_each_layer():
    expected = {"blocks": {"w": jnp.array([[3.0, 4.0], [1.0, 0.0]])}, "head": jnp.array([1.0, 1.0])}
    found = {"blocks": {"w": jnp.array([[3.0, 4.0], [1.0, 1.0]])}, "head": jnp.array([-2.0, -2.0])}
    cosines = gradient_agreement.cosines(found, expected)
    assert cosines == {"blocks/w": (0.70711, 0.85355), "head": (-1.0, -1.0)}
    assert gradient_agreement.global_norm({"a": jnp.array([3.0]), "b": jnp.array([[4.0]])}) == 5.0


def test_agreement_of_a_run_at_one_of_its_steps(run, capsys):
    path, data = run
    arguments = [str(path), str(data), "--rows", "2", "--length", "32", "--steps", "1"]
    assert gradient_agreement.main(arguments) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["step"] for line in lines] == [1]
    for line in lines:
        for backward in ("int8_dx", "int8"):
            assert line[backward]["norm_ratio"] == pytest.approx(1, abs=0.05)
            table = line[backward]["cosine_least_and_mean"]
            # Rounding to 127 steps turns a gradient by some hundredths, and not by nothing.
            turned = table["blocks/glu/down_proj/weight"]
            assert 0.99 < turned[0] <= turned[1] <= 1
            assert table["blocks/glu/gate_up_proj/weight"][0] < 1


def test_rounding_of_every_kind_of_layer(run, capsys):
    path, data = run
    assert gradient_rounding.main([str(path), str(data), "--rows", "2", "--length", "32"]) == 0
    errors = json.loads(capsys.readouterr().out)["errors"]
    assert set(errors) == {"down_proj", "gate_up_proj", "o_proj", "i_proj", "f_proj", "g_proj"}
    for products in errors.values():
        assert all(0 < error < 0.05 for error in products.values())
