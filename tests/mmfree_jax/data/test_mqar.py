"""Rows of multi-query associative recall: what they ask, and that they come again to the bit."""

import dataclasses
import itertools

import numpy as np
import pytest

from mmfree_jax.cli.main import main
from mmfree_jax.cli.train import resolve_config
from mmfree_jax.config import DataConfig
from mmfree_jax.data.dataset import open_dataset
from mmfree_jax.data.mqar import Mqar, mqar_row, parse_mqar
from mmfree_jax.data.pipeline import make_eval_batches, make_train_iterator
from mmfree_jax.errors import ConfigError, DataError

T = 24


def test_each_key_is_asked_for_once_behind_the_pairs_and_its_value_is_the_target():
    task = Mqar(pairs=5, vocab=64)
    for number in range(200):
        row = mqar_row(task, "train", number, T)
        assert {name: (x.dtype, x.shape) for name, x in row.items()} == dict.fromkeys(
            ("tokens", "targets", "segment_ids"), (np.dtype(np.int32), (T,))
        )
        tokens, asked = row["tokens"], np.flatnonzero(row["targets"] >= 0)
        keys, values = tokens[:10:2], tokens[1:10:2]
        assert len({*keys}) == len({*values}) == 5
        assert keys.min() >= 1
        assert keys.max() < 32 <= values.min()
        assert tokens.max() < 64
        assert asked.min() >= 10
        assert not (asked % 2).any()
        answers = dict(zip(keys, values, strict=True))
        assert [answers[key] for key in tokens[asked]] == [*row["targets"][asked]]
        assert sorted(tokens[asked]) == sorted(keys)
        np.testing.assert_array_equal(row["segment_ids"], 1)


def test_a_row_of_before_is_the_row_of_now():
    """Runs resume on these rows, and records name them: a change of how they are made shows."""
    row = mqar_row(Mqar(pairs=2, vocab=16), "train", 7, 12)
    assert row["tokens"].tolist() == [3, 15, 7, 9, 3, 1, 7, 2, 12, 6, 3, 9]
    assert row["targets"].tolist() == [-1, -1, -1, -1, 15, -1, 9, -1, -1, -1, -1, -1]


@pytest.mark.parametrize(("power", "nearest"), [(1.0, 0.25), (0.01, 0.4776)])
def test_gaps_fall_off_by_the_power_law(power, nearest):
    """Of 4 gaps the nearest has weight 1 of 1 + 2^(p-1) + 3^(p-1) + 4^(p-1)."""
    task = Mqar(pairs=1, vocab=16, power=power)
    first = [mqar_row(task, "train", i, 10)["targets"][2] >= 0 for i in range(4000)]
    assert abs(np.mean(first) - nearest) < 0.03  # four standard errors


def test_splits_and_rows_and_tasks_have_other_rows():
    task = Mqar(pairs=4, vocab=512)
    rows = [
        mqar_row(task, "train", 0, 16),
        mqar_row(task, "train", 1, 16),
        mqar_row(task, "heldout", 0, 16),
        mqar_row(dataclasses.replace(task, vocab=514), "train", 0, 16),
    ]
    for a, b in itertools.combinations(rows, 2):
        assert (a["tokens"] != b["tokens"]).any()


def test_batches_are_a_function_of_the_seed_and_the_first_row():
    config = DataConfig(paths=("mqar:pairs=2,vocab=32", "mqar:pairs=4,vocab=32"), seq_len=16)

    def take(config, start, count):
        iterator = make_train_iterator(config, batch_size=4, start_row=start)
        return np.stack([next(iterator)["tokens"] for _ in range(count)])

    whole = take(config, 0, 6)
    np.testing.assert_array_equal(take(config, 12, 3), whole[3:])
    assert (take(dataclasses.replace(config, seed=1), 0, 6) != whole).any()


def test_held_out_rows_of_a_mixture_are_told_apart_and_counted():
    config = DataConfig(paths=("mqar:pairs=2,vocab=32", "mqar:pairs=4,vocab=32"), seq_len=16)
    batches = make_eval_batches(config, batch_size=4, num_batches=4)
    assert batches.num_predicted == 8 * 2 + 8 * 4
    assert sum(int((batch["targets"] >= 0).sum()) for batch in batches) == 48
    assert [source.name for source in batches.sources] == [
        "mqar:pairs=2,vocab=32,power=0.01", "mqar:pairs=4,vocab=32,power=0.01",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("mqar:", "has ''"),
        ("mqar:vocab=64", "has no pairs"),
        ("mqar:pairs=x", "has 'pairs=x'"),
        ("mqar:pairs=2,pairs=3", "has 'pairs=3'"),
        ("mqar:pairs=2,tokens=3", "has 'tokens=3'"),
        ("mqar:pairs=0", "mqar:pairs is 0"),
        ("mqar:pairs=2,power=nan", "mqar:power is nan"),
        ("mqar:pairs=32,vocab=64", "has 31 keys: set fewer pairs, or a vocab of 66 or more"),
    ],
)
def test_what_is_no_task_is_refused_by_name(text, message):
    with pytest.raises(ConfigError, match=message):
        parse_mqar(text)


def test_rows_too_short_and_readers_of_documents_are_refused():
    config = DataConfig(paths=("mqar:pairs=8,vocab=64",), seq_len=31)
    with pytest.raises(DataError, match=r"data.seq_len is 31: set --data.seq-len 32 or more"):
        make_train_iterator(config, batch_size=1)
    with pytest.raises(DataError, match="without documents"):
        open_dataset("mqar:pairs=8")


def test_a_model_takes_the_tasks_vocabulary(tmp_path, capsys):
    argv = ["--preset", "rung-1M", "--data.paths", "mqar:pairs=2,vocab=96"]
    run = ["--run-dir", str(tmp_path / "run")]
    assert resolve_config([*argv, *run]).model.vocab_size == 96
    assert main(["train", *argv, *run, "--eval.tasks", "piqa"]) == 2
    assert "has no text: leave them out" in capsys.readouterr().err
