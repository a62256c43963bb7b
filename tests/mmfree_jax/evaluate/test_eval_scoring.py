"""Scores of sequences and held-out loss, against direct computation."""

import dataclasses
import io
import itertools

import jax
import numpy as np
import pytest
from initial_params import initial_params
from rich.console import Console

from mmfree_jax.config import MeshConfig
from mmfree_jax.data.dataset import open_dataset
from mmfree_jax.data.mqar import Mqar
from mmfree_jax.data.writer import write_dataset
from mmfree_jax.errors import CheckpointError, ConfigError, DataError
from mmfree_jax.evaluate import perplexity
from mmfree_jax.evaluate.perplexity import POSITIONS, evaluate_held_out
from mmfree_jax.evaluate.recall import evaluate_mqar
from mmfree_jax.evaluate.report import held_out_table
from mmfree_jax.evaluate.scoring import Query, Scorer
from mmfree_jax.model import LanguageModel
from mmfree_jax.model_config import DENSE, ModelConfig
from mmfree_jax.parallel.sharding import make_mesh, param_shardings

VOCAB = 256


def _model(**changes):
    config = ModelConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        num_layers=2,
        intermediate_size=32,
        compute_dtype="float32",
        residual_dtype="float32",
        remat="none",
        **changes,
    )
    model = LanguageModel(config)
    params = initial_params(config)
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    # Away from the initialisation, where all logits are nearly equal.
    leaves = [x + 0.2 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    return model, jax.tree.unflatten(tree, leaves)


@pytest.fixture(scope="module")
def mlgru():
    return _model()


@pytest.fixture(scope="module")
def attention():
    return _model(mixer="attention", mixer_linear=DENSE, glu_linear=DENSE, head_linear=DENSE)


def _direct(model, params):
    """log p of every next token of one sequence, at its own length."""

    @jax.jit
    def log_p(tokens_1T):
        return jax.nn.log_softmax(model.apply({"params": params}, tokens_1T))

    def score(tokens, scored):
        row = np.asarray(log_p(np.asarray([tokens])))[0]
        places = range(len(tokens) - scored, len(tokens))
        total = sum(row[i - 1, tokens[i]] for i in places)
        return total, all(row[i - 1].argmax() == tokens[i] for i in places)

    return score


def _questions(count=6, choices=4, seed=0):
    rng = np.random.default_rng(seed)
    for _ in range(count):
        context = rng.integers(0, VOCAB, rng.choice([3, 17, 30])).tolist()
        for _ in range(choices):
            answer = rng.integers(0, VOCAB, rng.choice([1, 6, 21])).tolist()
            yield Query(context + answer, len(answer))


@pytest.mark.parametrize("kind", ["mlgru", "attention"])
def test_scores_equal_a_direct_computation_and_do_not_depend_on_the_batch(kind, request):
    model, params = request.getfixturevalue(kind)
    queries = list(_questions())
    scorer = Scorer(model, params)
    together = scorer.score(queries)
    direct = _direct(model, params)
    lengths = sorted({len(q.tokens) for q in queries})[:3]  # one program a length
    for query, score in zip(queries, together, strict=True):
        if len(query.tokens) in lengths:
            value, greedy = direct(query.tokens, query.scored)
            assert score.log_likelihood == pytest.approx(value, abs=1e-4)
            assert score.greedy == greedy
    # One by one: the same programs, so the same bits.
    for query, score in itertools.islice(zip(queries, together, strict=True), 0, None, 5):
        assert scorer.score([query]) == [score]
    # Without shared contexts.
    alone = Scorer(model, params, share_contexts=False).score(queries)
    np.testing.assert_allclose(
        [s.log_likelihood for s in alone], [s.log_likelihood for s in together], atol=1e-4
    )
    assert len(scorer.programs) <= 6


def test_a_shared_context_is_read_once(mlgru):
    rng = np.random.default_rng(3)
    context = rng.integers(0, VOCAB, 60).tolist()
    queries = [Query([*context, *rng.integers(0, VOCAB, 4).tolist()], 4) for _ in range(64)]
    shared, apart = Scorer(*mlgru), Scorer(*mlgru, share_contexts=False)
    a, b = shared.score(queries), apart.score(queries)
    np.testing.assert_allclose(
        [s.log_likelihood for s in a], [s.log_likelihood for s in b], atol=1e-4
    )
    assert shared.tokens_read < 0.8 * apart.tokens_read


def test_more_contexts_than_states_are_kept(mlgru, monkeypatch):
    queries = list(_questions(count=9, choices=2, seed=5))
    expected = Scorer(*mlgru).score(queries)
    scorer = Scorer(*mlgru)
    scorer._states = 2
    seen = []
    got = scorer.score(queries, progress=seen.append)
    assert got == expected
    assert sum(seen) == len(queries)


def test_greedy_answers_are_recognised(mlgru):
    model, params = mlgru
    tokens = [5, 9, 200, 31]
    for _ in range(5):
        logits = model.apply({"params": params}, np.asarray([tokens]))
        tokens.append(int(logits[0, -1].argmax()))
    wrong = [*tokens[:-1], (tokens[-1] + 1) % VOCAB]
    scores = Scorer(model, params).score([Query(tokens, 5), Query(wrong, 5)])
    assert [s.greedy for s in scores] == [True, False]


def test_scores_on_a_mesh_are_the_same(mlgru):
    model, params = mlgru
    queries = list(_questions(count=3))
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    laid_out = jax.device_put(params, param_shardings(mesh, params))
    got = Scorer(model, laid_out, mesh=mesh).score(queries)
    want = Scorer(model, params).score(queries)
    np.testing.assert_allclose(
        [s.log_likelihood for s in got], [s.log_likelihood for s in want], rtol=2e-2
    )


@pytest.mark.parametrize(
    ("query", "words"),
    [
        (Query([1, 2, 3], 0), "scores 0 of 3"),
        (Query([1, 2, 3], 3), "scores 3 of 3"),
        (Query([1, VOCAB], 1), f"token id {VOCAB}"),
        (Query([1, -1], 1), "token id -1"),
        (Query([1, 2.5], 1), "tokens of float64: give whole"),
        (Query([1, 2, 3], 1.5), "scores 1.5 of 3"),
        (Query([1] * 34, 1), "34 tokens"),
    ],
)
def test_bad_queries_are_refused(mlgru, query, words):
    with pytest.raises(DataError, match=words):
        Scorer(*mlgru, max_length=32).score([query])


@pytest.mark.parametrize("mixer", ["mlgru", "rwkv4"])
def test_held_out_loss_is_that_of_each_document_alone(mlgru, byte_data, mixer):
    """Also where the state before a document is not all zeros, as RWKV-4's."""
    model, params = mlgru
    if mixer != "mlgru":
        model = LanguageModel(dataclasses.replace(model.config, mixer=mixer))
        init = jax.jit(model.init)(jax.random.key(0), np.zeros((1, 1), np.int32))["params"]
        params = jax.tree_util.tree_map_with_path(
            lambda path, x: x * (8 if path[-1].key == "weight" else 1), init
        )
    dataset = open_dataset(byte_data, "heldout")
    result = evaluate_held_out(model, params, dataset, batch_size=4, window=32)
    log_p = jax.jit(lambda t: jax.nn.log_softmax(model.apply({"params": params}, t)))
    losses, positions = [], []
    for i in range(dataset.num_documents):
        tokens = dataset.document(i)
        padded = np.zeros((1, 256), np.int32)
        padded[0, : len(tokens)] = tokens
        row = np.asarray(log_p(padded))[0]
        losses.append([-row[j, tokens[j + 1]] for j in range(len(tokens) - 1)])
        positions.append(np.arange(len(tokens) - 1))
    flat, place = np.concatenate(losses), np.concatenate(positions)
    assert result.loss.mean == pytest.approx(flat.mean(), abs=1e-4)
    assert result.loss.tokens == len(flat)
    assert result.loss.documents == dataset.num_documents
    assert result.perplexity == pytest.approx(np.exp(flat.mean()), rel=1e-4)
    # Bytes are the tokens here.
    assert result.bits_per_byte(result.loss.mean) == pytest.approx(
        flat.mean() / np.log(2) / dataset.bytes_per_token, rel=1e-4
    )
    for first, end, interval in result.by_position:
        inside = (place >= first) & (place < (end or 10**9))
        assert interval.tokens == inside.sum()
        assert interval.mean == pytest.approx(flat[inside].mean(), abs=1e-3)
    assert result.loss.low < result.loss.mean < result.loss.high
    assert [x[0] for x in result.by_position] == [p for p in POSITIONS if p <= place.max()]


@pytest.mark.parametrize(
    ("sizes", "most", "multiple", "rows"),
    [
        ([1000, 400, 300, 200], 32, 1, 2),  # the first takes two windows, all others one row
        ([500] * 4, 32, 1, 4),
        ([500] * 4, 2, 1, 2),
        ([10] * 100, 8, 1, 2),
        ([10] * 100, 8, 4, 4),
        ([300, 300, 300], 8, 1, 3),
        ([0, 0], 8, 2, 2),
    ],
)
def test_no_more_rows_are_read_than_shorten_it(sizes, most, multiple, rows):
    assert perplexity._fewest_rows(sizes, most, multiple, window=512) == rows


@pytest.mark.parametrize(
    ("fewest", "most", "multiple", "rows"),
    [(1, 32, 1, 1), (3, 32, 1, 4), (4, 32, 1, 4), (17, 24, 1, 24), (4, 32, 4, 4), (9, 48, 3, 12)],
)
def test_rows_off_a_cpu_are_those_of_other_data_sets(fewest, most, multiple, rows):
    assert perplexity._shared_rows(fewest, most, multiple) == rows


def test_data_sets_of_different_sizes_share_one_program(mlgru, byte_data, monkeypatch):
    dataset = open_dataset(byte_data, "heldout")

    def evaluate(documents):
        """Loss, and the programs that it took."""
        before = perplexity._window_losses._cache_size()
        result = evaluate_held_out(
            *mlgru, dataset, batch_size=8, window=37, max_documents=documents
        )
        return result.loss.mean, perplexity._window_losses._cache_size() - before

    apart = {documents: evaluate(documents) for documents in (13, 15)}
    assert [programs for _, programs in apart.values()] == [1, 1]
    perplexity._window_losses.clear_cache()
    monkeypatch.setattr(perplexity, "_compiles_long", lambda: True)
    together = {documents: evaluate(documents) for documents in (13, 15)}
    assert [programs for _, programs in together.values()] == [1, 0]
    for documents, (loss, _) in together.items():
        assert loss == pytest.approx(apart[documents][0], abs=1e-5)


def test_a_cut_memory_and_attention_see_only_their_window(mlgru, attention, byte_data):
    dataset = open_dataset(byte_data, "heldout")
    longest = max((dataset.document(i) for i in range(20)), key=len)
    for (model, params), settings in (
        (mlgru, {"window": 32, "context": 16}),
        (attention, {"window": 16}),
    ):
        result = evaluate_held_out(model, params, dataset, batch_size=4, **settings)
        log_p = jax.jit(
            lambda t, model=model, params=params: jax.nn.log_softmax(
                model.apply({"params": params}, t)
            )
        )
        losses = []
        for i in range(dataset.num_documents):
            tokens = dataset.document(i)
            for start in range(0, len(tokens) - 1, 16):
                piece = tokens[start : start + 17]
                padded = np.zeros((1, 17), np.int32)
                padded[0, : len(piece)] = piece
                row = np.asarray(log_p(padded))[0]
                losses += [-row[j, piece[j + 1]] for j in range(len(piece) - 1)]
        assert result.loss.tokens == len(losses)
        assert result.loss.mean == pytest.approx(np.mean(losses), abs=1e-4)
    assert len(longest) > 64  # the cut matters


def test_held_out_settings_are_checked(mlgru, byte_data):
    dataset = open_dataset(byte_data, "heldout")
    few = evaluate_held_out(*mlgru, dataset, batch_size=4, window=32, max_documents=1)
    assert (few.loss.documents, few.loss.low) == (1, None)
    for settings in ({"window": 0}, {"context": 0}, {"batch_size": 0}, {"max_documents": 0}):
        with pytest.raises(ConfigError, match=next(iter(settings))):
            evaluate_held_out(*mlgru, dataset, **settings)


def test_logits_that_are_not_finite_are_no_scores(mlgru, byte_data):
    """Argmax finds a NaN, so that the answer that has one would count as chosen."""
    model, params = mlgru
    params = dict(params, final_norm={"scale": params["final_norm"]["scale"].at[0].set(np.nan)})
    with pytest.raises(CheckpointError, match=r"logits are not finite.*--compute-dtype"):
        Scorer(model, params).score([Query([1, 2, 3], 1)])
    with pytest.raises(CheckpointError, match="logits are not finite"):
        evaluate_held_out(model, params, open_dataset(byte_data, "heldout"), window=32)
    with pytest.raises(CheckpointError, match="logits are not finite"):
        evaluate_mqar(model, params, Mqar(2, 32), 16, 4)


def test_documents_without_bytes_to_predict_have_no_bits_a_byte(mlgru, tmp_path):
    """Of documents of one byte, without a start token, the end tokens alone are predicted."""
    model, params = mlgru
    identity = {"kind": "byte", "vocab_size": 256, "sha256": "0", "bos_id": None, "eos_id": 0}
    documents = [np.array([letter, 0], np.uint16) for letter in range(97, 105)]
    write_dataset(tmp_path / "data", {"heldout": documents}, identity)
    result = evaluate_held_out(model, params, open_dataset(tmp_path / "data", "heldout"))
    assert result.loss.tokens == 8
    assert result.to_dict()["loss"]["bits_per_byte"] == {"mean": None, "low": None, "high": None}
    console = Console(width=120, file=io.StringIO())
    console.print(held_out_table(result))
    assert f"{result.loss.mean:.4f}" in console.file.getvalue()


def test_a_loss_whose_exponential_no_float_holds():
    result = perplexity.HeldOut(perplexity.Interval(800.0, None, None, 1, 1), 1.0, (), None)
    assert result.perplexity == result.to_dict()["loss"]["perplexity"] == np.inf
