"""What is said of arguments that cannot be read: the option, its value, the way out."""

import itertools

import pytest

from mmfree_jax.cli.main import main


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("info --mesh.data x", "--mesh.data is 'x': give a whole number"),
        ("info --batch-size nan", "--batch-size is 'nan': give a whole number"),
        ("info --batch-size=", "--batch-size is '': give a whole number"),
        ("info --model.norm-eps x", "--model.norm-eps is 'x': give a number"),
        ("info --log.profile-steps 1", "--log.profile-steps is '1': give 2 whole numbers or None"),
        ("data prepare --out x --workers 1.5", "--workers is '1.5': give a whole number or None"),
        ("crossing a b --families x", "--families is 'x': give 2 texts or None"),
        ("bench scaling --devices a", "--devices is 'a': give whole numbers"),
        (
            "bench infer --out x --batch-sizes 1,b",
            "--batch-sizes is '1,b': give whole numbers separated by commas",
        ),
        (
            "info --model.remat foo",
            "--model.remat is 'foo': choose one of none, full, stream, states, gated, gates, "
            "projections, dots",
        ),
        (
            "info --model.matmul-kernel x",
            "--model.matmul-kernel is 'x': choose one of pallas_mosaic_gpu, pallas_tpu, "
            "pallas_triton, xla_bf16, xla_f32, xla_int8, None",
        ),
        ("info --steps", "--steps has no value: give one after it"),
        ("launch local -n", "-n/--n has no value: give one after it"),
        ("plot x --log-x 3", "unexpected argument '3': leave it out"),
        (
            "train --checkpoint.resume false",
            "--checkpoint.resume takes no value: give --checkpoint.resume or "
            "--checkpoint.no-resume",
        ),
        ("plot x --log-x=0", "--log-x takes no value: give --log-x or --no-log-x"),
        ("info --mesh.dta 3", "unknown option --mesh.dta; perhaps you meant --mesh.data"),
        (
            "info --lr 3",
            "unknown option --lr; perhaps you meant --optimizer.learning-rate for --lr",
        ),
        (
            "data inspect --path x",
            "unknown option --path: PATH is given without it, as in `mmfree data inspect PATH`",
        ),
        ("export-hf a", "missing: STR (New folder, or its URL)"),
        (
            "export onnx",
            "missing: --model STR (Folder of the model, or its URL: a training run, a packed "
            "model or a Hugging Face model), --out STR (Folder to make, or its URL)",
        ),
        ("launch local", "missing: -n INT, --n INT (number of processes)"),
    ],
)
def test_arguments_that_cannot_be_read(command, message, capsys):
    assert main(command.split()) == 2
    name = itertools.takewhile(lambda word: len(word) > 1 and word[0] != "-", command.split())
    line = f"mmfree: error: {message}; see mmfree {' '.join(name)} --help\n"
    assert capsys.readouterr().err == line
