"""Held-out loss while training: exact, by source, on every mesh the same."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from mmfree_jax.config import DataConfig, MeshConfig
from mmfree_jax.data import writer
from mmfree_jax.data.dataset import open_dataset
from mmfree_jax.data.pipeline import make_eval_batches
from mmfree_jax.model import LanguageModel
from mmfree_jax.model.parameters import param_shapes, unflatten
from mmfree_jax.model_config import LinearConfig
from mmfree_jax.parallel.sharding import make_mesh, process_rows
from mmfree_jax.saved.history import read_history
from mmfree_jax.train.event_file import EventFile
from mmfree_jax.train.held_out import evaluate
from mmfree_jax.train.loss import TokenLosses
from mmfree_jax.train.plot import draw_metrics
from mmfree_jax.train.run_display import format_record
from mmfree_jax.train.step import jit_eval_step
from mmfree_jax.train.training import train

T = 16
IDENTITY = {"kind": "byte", "vocab_size": 256, "sha256": "0", "bos_id": None, "eos_id": None}


def _documents(seed, count, letters):
    rng = np.random.default_rng(seed)
    return [rng.choice(list(letters), rng.integers(5, 40)) for _ in range(count)]


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    """Three folders, two of which have one name."""
    root = tmp_path_factory.mktemp("mixture")
    for i, name in enumerate(("books", "web/news", "print/news")):
        splits = {
            "train": _documents(i, 60, range(97 + 4 * i, 103 + 4 * i)),
            "heldout": _documents(10 + i, 6 + 5 * i, range(97 + 4 * i, 103 + 4 * i)),
        }
        writer.write_dataset(root / name, splits, IDENTITY)
    return tuple(str(root / name) for name in ("books", "web/news", "print/news"))


@pytest.fixture(scope="module")
def config(small_run):
    # Not quantised: a sum in another order may turn an integer.
    linear = LinearConfig(ternary_weights=False, int8_activations=False)
    model = dataclasses.replace(
        small_run.model, mixer_linear=linear, glu_linear=linear, head_linear=linear
    )
    return dataclasses.replace(small_run, model=model)


def _losses_alone(config, params, paths):
    """Loss and tokens of each folder's held-out rows by the definition, in float64."""
    sets = [open_dataset(path, "heldout") for path in paths]
    rows = [[d.row(r, T) for r in range(d.num_rows(T, partial=True))] for d in sets]
    batch = {name: np.stack([row[name] for part in rows for row in part]) for name in rows[0][0]}
    model = jax.jit(LanguageModel(config.model).apply)
    logits = np.asarray(model({"params": params}, batch["tokens"], batch["segment_ids"]), float)
    chosen = np.take_along_axis(logits, np.maximum(batch["targets"], 0)[..., None], axis=-1)
    nll = np.log(np.exp(logits).sum(axis=-1)) - chosen[..., 0]
    ends = np.cumsum([len(part) for part in rows])[:-1]
    counted = np.split(batch["targets"] >= 0, ends)
    sums = [x[there].sum() for x, there in zip(np.split(nll, ends), counted, strict=True)]
    return [
        (total, d.num_tokens - d.num_documents)
        for total, d, there in zip(sums, sets, counted, strict=True)
        if there.sum() == d.num_tokens - d.num_documents
    ]


MESHES = [MeshConfig(), MeshConfig(fsdp=4), MeshConfig(fsdp=2, sequence=2, tensor=2)]


@pytest.fixture(scope="module")
def evaluated(config, mixture):
    """The evaluation of one model on each mesh, and its parameters."""
    data, found = DataConfig(paths=mixture, seq_len=T), []
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda x: rng.normal(0, 0.3, x.shape).astype(np.float32),
        unflatten(param_shapes(config.model)),
    )
    for mesh_config in MESHES:
        mesh = make_mesh(mesh_config)
        rows = process_rows(mesh, (config.batch_size, T))
        batches = make_eval_batches(data, batch_size=config.batch_size, rows=rows)
        found.append(evaluate(jit_eval_step(config, mesh), params, batches, mesh))
    return found, params


def test_each_source_has_the_loss_of_its_documents_on_every_mesh(config, mixture, evaluated):
    found, params = evaluated
    alone = _losses_alone(config, params, mixture)
    names = ["books", "web/news", "print/news"]
    for losses in found:
        assert list(losses.by_source) == names
        for name, (total, count) in zip(names, alone, strict=True):
            assert losses.by_source[name].tokens == count
            np.testing.assert_allclose(losses.by_source[name].loss, total / count, rtol=1e-6)
        assert losses.total.tokens == sum(count for _, count in alone)
        whole = sum(total for total, _ in alone) / losses.total.tokens
        np.testing.assert_allclose(losses.total.loss, whole, rtol=1e-6)
    assert found[0].record()["loss/web/news"] == found[0].by_source["web/news"].loss


def test_the_devices_have_the_next_batch_while_one_is_read(config, mixture):
    mesh, done = make_mesh(MeshConfig(data=1), jax.devices()[:1]), []
    rows = range(config.batch_size)
    batches = make_eval_batches(
        DataConfig(paths=mixture, seq_len=T), batch_size=config.batch_size, num_batches=3, rows=rows
    )

    class Found:
        """One of a step's results, which says when it is read."""

        def __init__(self, number):
            self.number = number

        def __array__(self, dtype=None, copy=None):
            done.append(f"read {self.number}")
            return np.ones((config.batch_size, T), np.float32)

    def eval_step(params, batch):
        number = sum(what.startswith("dispatch") for what in done)
        done.append(f"dispatch {number}")
        return TokenLosses(*[Found(number)] * 3)

    losses = evaluate(eval_step, {}, batches, mesh)
    firsts = list(dict.fromkeys(done))
    assert firsts == ["dispatch 0", "dispatch 1", "read 0", "dispatch 2", "read 1", "read 2"]
    assert losses.total.tokens == 3 * config.batch_size * T


def test_rows_split_over_data_and_fsdp_alike_give_the_same_bits(evaluated):
    (first, second, _), _ = evaluated
    assert first == second


def test_a_folder_given_twice_is_one_source_and_is_counted_once(mixture):
    once = make_eval_batches(DataConfig(paths=mixture[:2], seq_len=T), batch_size=8)
    twice = make_eval_batches(DataConfig(paths=(*mixture[:2], mixture[0]), seq_len=T), batch_size=8)
    assert [source.name for source in twice.sources] == ["books", "news"]
    assert twice.num_predicted == once.num_predicted
    sources = np.concatenate([twice.sources_of(b) for b in range(len(twice))])
    rows = [open_dataset(path, "heldout").num_rows(T, partial=True) for path in mixture[:2]]
    assert [(sources == k).sum() for k in (0, 1)] == rows


def test_a_source_of_little_weight_has_a_row_all_the_same(mixture):
    data = DataConfig(paths=mixture, weights=(1.0, 1e-6, 1.0), seq_len=T)
    few = make_eval_batches(data, batch_size=4, num_batches=2)
    sources = np.concatenate([few.sources_of(b) for b in range(len(few))])
    assert sorted(np.bincount(sources)) == [1, 3, 4]
    assert (sources == 1).sum() == 1


@pytest.mark.usefixtures("traced_once", "cached_compilation")
def test_a_run_records_each_source(small_run, mixture, tmp_path):
    written = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            EventFile,
            "write",
            lambda self, step, values, texts: written.update(
                {(name, step): value for name, value in values.items()}
            ),
        )
        run = dataclasses.replace(
            small_run,
            run_dir=str(tmp_path / "run"),
            steps=4,
            data=DataConfig(paths=mixture, seq_len=T),
            eval=dataclasses.replace(small_run.eval, every_steps=2),
            log=dataclasses.replace(small_run.log, tensorboard=True, ternary_every_steps=0),
        )
        summary = train(run)
    records = [r for r in read_history(tmp_path / "run/metrics.jsonl") if r["kind"] == "eval"]
    assert [r["step"] for r in records] == [2, 4]
    names = ["books", "web/news", "print/news"]
    last = records[-1]
    assert summary["eval_loss_by_source"] == {name: last[f"loss/{name}"] for name in names}
    assert json.loads((tmp_path / "run/summary.json").read_text()) == summary
    tokens = sum(last[f"eval_tokens/{name}"] for name in names)
    assert tokens == last["eval_tokens"]
    mean = sum(last[f"loss/{name}"] * last[f"eval_tokens/{name}"] for name in names) / tokens
    assert last["loss"] == pytest.approx(mean, rel=1e-12)
    for name in names:
        assert written["eval/loss/" + name, 4] == last[f"loss/{name}"]
        assert f"{name} {last[f'loss/{name}']:.4f}" in format_record(last, 4)
    figure, _ = draw_metrics([tmp_path / "run"], metrics=["loss", "loss/books"])
    assert [axes.get_ylabel() for axes in figure.axes] == [
        "loss (nats per token)",
        "books: loss (nats per token)",
    ]
