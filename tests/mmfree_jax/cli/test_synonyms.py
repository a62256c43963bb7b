"""Options under the names that other programs give them."""

import pytest

from mmfree_jax.cli.main import main
from mmfree_jax.cli.parse import _flags
from mmfree_jax.cli.synonyms import _MEANINGS


@pytest.mark.parametrize(
    ("command", "suggestion"),
    [
        ("train --lr 3", "--optimizer.learning-rate for --lr"),
        ("train -lr 3", "--optimizer.learning-rate for -lr"),
        ("train --batch=3 --wd 1", "--batch-size for --batch, --optimizer.weight-decay for --wd"),
        ("train --epochs 2 --seed 1", "--steps for --epochs"),
        ("train --seq_len 3", "--data.seq-len for --seq_len"),
        ("train --seq-len 3", "--data.seq-len for --seq-len"),
        ("train --model-size 370M", "--preset for --model-size"),
        ("train --data x", "--data.paths for --data"),
        ("train --output-dir x", "--run-dir for --output-dir"),
        ("train --tp 2", "--mesh.tensor for --tp"),
        ("bench train --lr 3", "--optimizer.learning-rate for --lr"),
        ("compile --lr 3", "--optimizer.learning-rate for --lr"),
        ("generate --model x --prompt x --max-tokens 9", "--max-new-tokens for --max-tokens"),
        ("generate --model x --prompt x --temp 1", "--temperature for --temp"),
        ("generate --checkpoint x", "--model for --checkpoint"),  # what is missing comes first
        ("eval --model x --data y --batch 3", "--batch-tokens for --batch"),
        ("pack --model x --output y", "--out for --output"),
        ("sweep plan x --gpu 1", "--gpus for --gpu"),
        ("launch local --nproc 2 -- train", "-n for --nproc"),
    ],
)
def test_a_name_from_elsewhere_is_answered_with_ours(capsys, command, suggestion):
    assert main(command.split()) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert f"; perhaps you meant {suggestion}; see mmfree " in said


@pytest.mark.parametrize(
    ("command", "end"),
    [
        (
            "train --stepz 3",
            "unknown option --stepz; perhaps you meant --steps; see mmfree train --help\n",
        ),
        ("train --zzz 3", "unknown option --zzz; see mmfree train --help\n"),
        ("sweep run x --lr 1", "unknown option --lr; see mmfree sweep run --help\n"),  # it has none
    ],
)
def test_what_is_no_such_name_is_left_to_its_spelling(capsys, command, end):
    assert main(command.split()) == 2
    assert capsys.readouterr().err.endswith(end)


def test_every_meaning_is_an_option_of_some_command():
    from mmfree_jax.cli.data import InspectConfig
    from mmfree_jax.cli.eval import evaluate
    from mmfree_jax.cli.generate import GenerateConfig
    from mmfree_jax.cli.info import _Arguments as Info
    from mmfree_jax.cli.plot import plot
    from mmfree_jax.cli.tokenizer import TokenizerTrainConfig
    from mmfree_jax.cli.train import _Arguments as Train
    from mmfree_jax.data.prepare import PrepareConfig
    from mmfree_jax.experiments.bench.edge import Plan as Edge
    from mmfree_jax.experiments.bench.infer import Plan as Infer
    from mmfree_jax.experiments.cli.sweep import _Run

    targets = [InspectConfig, evaluate, GenerateConfig, Info, plot, TokenizerTrainConfig, Train,
               PrepareConfig, Edge, Infer, _Run]  # fmt: skip
    options = {name for target in targets for name, _, _ in _flags(target)}
    options |= {name.rpartition(".")[2] for name in options}
    # Parameters of functions inside of commands: launch local, export-hf, bench kernels.
    options |= {"n", "devices-per-process", "overwrite", "dtype", "tokens"}
    assert {ours for _, meanings in _MEANINGS for ours in meanings} - options == set()
