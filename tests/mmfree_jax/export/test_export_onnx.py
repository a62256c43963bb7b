"""ONNX exports: the integers and the stream of the model, and refusal of what is damaged."""

import dataclasses
import hashlib
import json
import re
import shutil
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import onnxruntime
import optax
import pytest
from initial_params import initial_params
from onnx_folders import DAMAGE, chat, continuation, damage, rewrite, run_graph

import mmfree_jax
from mmfree_jax.cli.main import main
from mmfree_jax.data.tokenizer import ByteTokenizer
from mmfree_jax.errors import CheckpointError, ConfigError, DataError
from mmfree_jax.export import agreement, manifest, onnx_export, onnx_graph, onnx_session
from mmfree_jax.export.onnx_weights import two_bit_codes
from mmfree_jax.export.supported import check_supported
from mmfree_jax.model import LanguageModel
from mmfree_jax.model_config import DENSE, LinearConfig, ModelConfig
from mmfree_jax.pallas_kernels.norm_quant.reference import quantize_int8
from mmfree_jax.presets import preset
from mmfree_jax.saved.open_model import open_model
from mmfree_jax.saved.pack import pack

TINY = preset("tiny").model
# Widths that no block divides, and a state that is wider than the residual stream.
ODD = dataclasses.replace(
    TINY, vocab_size=61, hidden_size=38, intermediate_size=135, expand_ratio=2.0,
    use_lower_bound=False,
)  # fmt: skip
TEXT = (
    "A language model without matrix multiplication adds and subtracts. Its memory is one vector "
    "a layer, which does not grow: after one word or after a million it has the same size. So it "
    "fits a laptop, and a telephone too; and what it has read it keeps as well as it can. "
)
PROMPTS = ["A language model", "So it fits", "memory", "zebra 7 ", "it keeps as well as"]


@pytest.fixture(scope="module")
def trained():
    """A model that has learnt a text by heart: its likeliest tokens are clear."""
    # The same function in another program, which is quicker to compile and to run here.
    model = LanguageModel(dataclasses.replace(TINY, bitlinear="plain"))
    data = np.frombuffer((TEXT * 3).encode(), np.uint8).astype(np.int32)
    starts = np.random.default_rng(0).integers(0, len(TEXT), (100, 4))
    batches = jnp.asarray(data[starts[..., None] + np.arange(41)])
    optimizer = optax.adam(1e-2)

    def loss(params, batch):
        logits = model.apply({"params": params}, batch[:, :-1])
        targets = batch[:, 1:]
        return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()

    def step(carry, batch):
        params, state = carry
        value, gradient = jax.value_and_grad(loss)(params, batch)
        updates, state = optimizer.update(gradient, state, params)
        return (optax.apply_updates(params, updates), state), value

    params = jax.jit(model.init)(jax.random.key(0), batches[0])["params"]
    run = jax.jit(lambda params: jax.lax.scan(step, (params, optimizer.init(params)), batches))
    (params, _), losses = run(params)
    assert losses[-1] < 1.0  # nats a byte
    return LanguageModel(TINY), params


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    ByteTokenizer().save(folder)
    return folder


@pytest.fixture(scope="module")
def saved(trained, tokenizer_folder, tmp_path_factory, save_model):
    """The trained model on disk."""
    folder = tmp_path_factory.mktemp("saved") / "tiny"
    return save_model(folder, TINY, trained[1], tokenizer_folder)


@pytest.fixture(scope="module")
def exports(saved, tmp_path_factory):
    """The folders of both grades."""
    out = tmp_path_factory.mktemp("exports")
    for grade in ("exact", "fast"):
        onnx_export.export_onnx(saved, out / grade, grade=grade)
    return out


@pytest.fixture(scope="module")
def exact(exports):
    return onnx_session.load(exports / "exact", threads=1)


@pytest.mark.parametrize("product", ["exact", "integer"])
@pytest.mark.parametrize("columns", [5, 127, 128, 300])
@pytest.mark.parametrize("rows", [1, 7])
def test_sums_are_the_integers_of_training_bit_for_bit(product, columns, rows):
    rng = np.random.default_rng(columns)
    x_TK = rng.standard_normal((1, rows, columns)).astype(np.float32)
    trits_NK = rng.integers(-1, 2, (24, columns)).astype(np.int8)
    g = onnx_graph.Graph(TINY, product, padded=True)
    q, absmax = onnx_graph.quantize(g, "x")
    padded = onnx_graph.padded_columns(columns)
    make = onnx_graph.two_bit_product if product == "exact" else onnx_graph.integer_product
    sums = make(g, onnx_graph.fill_blocks(g, q, columns), "m", outputs=24, inputs=padded)
    constants = {
        "m.codes": two_bit_codes(trits_NK, padded=True),
        onnx_graph.ones_name(24, padded): np.ones(24 * padded // onnx_graph.BLOCK, np.float32),
    }
    found_q, found_absmax, found = run_graph(g, [q, absmax, sums], constants, x=x_TK)
    want_q, scale = quantize_int8(jnp.asarray(x_TK))
    np.testing.assert_array_equal(found_q, np.asarray(want_q))
    np.testing.assert_allclose(found_absmax / 127, np.asarray(scale), rtol=1e-6)
    want = np.asarray(want_q, np.int32) @ trits_NK.T.astype(np.int32)
    np.testing.assert_array_equal(found.astype(np.int32), want)
    assert (found == np.round(found)).all()


@pytest.mark.parametrize("graph", ["graph", "web_graph"])
def test_the_exact_grade_writes_what_the_model_writes(trained, exports, graph):
    ids = [ByteTokenizer().encode(prompt) for prompt in PROMPTS]
    want = mmfree_jax.generate(*trained, ids, max_new_tokens=220, temperature=0).tokens
    export = onnx_session.load(exports / "exact", threads=1, graph=graph)
    for prompt, tokens in zip(ids, want, strict=True):
        stream = onnx_session.greedy(export, prompt)
        assert [next(stream) for _ in tokens] == tokens


@pytest.mark.parametrize("grade", ["exact", "fast"])
def test_a_prompt_may_be_read_in_any_chunks(exports, grade):
    export = onnx_session.load(exports / grade, threads=1)
    prompt = ByteTokenizer().encode(TEXT)[:150]
    logits_V, state = onnx_session.prefill(export, prompt, export.start(), chunk=150)
    assert np.abs(state).max() > 0
    for chunk in (1, 37, 64):
        found_V, found = onnx_session.prefill(export, prompt, export.start(), chunk=chunk)
        if grade == "exact":
            np.testing.assert_array_equal(found_V, logits_V)
            np.testing.assert_array_equal(found, state)
        # The fast kernels add up blocks in an order of their own for one row.
        np.testing.assert_allclose(found_V, logits_V, atol=0.02 * np.abs(logits_V).max())


def test_rows_of_a_batch_do_not_see_each_other(exact):
    rng = np.random.default_rng(1)
    tokens_BT = rng.integers(0, 256, (3, 9))
    logits_BV, state = exact.step(tokens_BT, exact.start(3))
    for row in range(3):
        alone_BV, alone = exact.step(tokens_BT[row : row + 1], exact.start())
        np.testing.assert_array_equal(alone_BV[0], logits_BV[row])
        np.testing.assert_array_equal(alone[:, 0], state[:, row])


@pytest.mark.parametrize("graph", ["graph", "web_graph"])
def test_the_runtimes_optimisations_change_no_bit(exact, exports, graph):
    levels = onnxruntime.GraphOptimizationLevel
    path = exports / "exact" / exact.manifest[graph]
    prompt = np.array([ByteTokenizer().encode(TEXT)[:50]])
    want = exact.step(prompt, exact.start())
    for level in (levels.ORT_DISABLE_ALL, levels.ORT_ENABLE_BASIC, levels.ORT_ENABLE_ALL):
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = level
        session = onnxruntime.InferenceSession(path, options)
        found = session.run(None, {"tokens": prompt, "state": exact.start()})
        for a, b in zip(found, want, strict=True):
            np.testing.assert_array_equal(a, b)


def test_agreement_with_the_model_is_close_and_is_measured(trained, exports, exact):
    text = np.frombuffer((TEXT * 2).encode(), np.uint8)
    windows_WT = np.stack([text[s : s + 60] for s in (0, 31, 99, 170)]).astype(np.int64)
    found = agreement.compare(*trained, exact, windows_WT)
    assert found.tokens == 4 * 59
    assert found.kl < 1e-5
    assert found.same_top > 0.99
    assert found.export_perplexity == pytest.approx(found.perplexity, rel=1e-3)
    fast = onnx_session.load(exports / "fast", threads=1)
    quick = agreement.compare(*trained, fast, windows_WT)
    assert found.kl < quick.kl < 0.05
    assert quick.same_top > 0.9
    prompts = [ByteTokenizer().encode(prompt) for prompt in PROMPTS]
    assert agreement.same_continuations(*trained, exact, prompts, new_tokens=220) == [220] * 5
    # Of another model's predictions it says so.
    other = jax.tree.map(lambda x: -x, trained[1])
    counts = agreement.same_continuations(trained[0], other, exact, prompts, new_tokens=220)
    assert max(counts) < 10
    assert agreement.compare(trained[0], other, exact, windows_WT).kl > 0.5
    with pytest.raises(DataError, match="264 tokens, the model 61"):
        agreement.compare(LanguageModel(ODD), other, exact, windows_WT)
    with pytest.raises(DataError, match="token id 9999"):
        agreement.compare(*trained, exact, np.array([[1, 9999]]))


def test_widths_that_no_block_divides(tmp_path, save_model):
    model = LanguageModel(ODD)
    params = jax.jit(model.init)(jax.random.key(2), jnp.zeros((1, 2), jnp.int32))["params"]
    tensors = save_model(tmp_path / "odd", ODD, params)
    tokens_WT = np.random.default_rng(3).integers(0, 61, (4, 9))
    for grade, most in (("exact", 1e-5), ("fast", 1e-3)):
        out = tmp_path / grade
        onnx_export.export_onnx(tensors, out, grade=grade)
        export, web = (onnx_session.load(out, threads=1, graph=g) for g in ("graph", "web_graph"))
        assert agreement.compare(model, params, export, tokens_WT).kl < most
        assert agreement.compare(model, params, web, tokens_WT).kl < 1e-4
        if grade == "exact":
            want, _ = export.step(tokens_WT, export.start(4))
            np.testing.assert_array_equal(web.step(tokens_WT, web.start(4))[0], want)


def test_a_packed_model_gives_the_same_files_as_its_run(saved, exports, tmp_path):
    pack(saved, tmp_path / "packed", embedding="float32", bits="1.6")
    assert main(
        ["export", "onnx", "--model", str(tmp_path / "packed"), "--out", str(tmp_path / "out")]
    ) == 0  # fmt: skip
    for name in ("model.onnx", "model.onnx.data"):
        want, found = (
            (exports / "exact" / name).read_bytes(),
            (tmp_path / "out" / name).read_bytes(),
        )
        assert hashlib.sha256(found).digest() == hashlib.sha256(want).digest()


@pytest.mark.parametrize("embedding", ["bfloat16", "int8"])
def test_the_embedding_is_stored_as_asked(embedding, saved, exact, tmp_path):
    onnx_export.export_onnx(saved, tmp_path / "out", embedding=embedding)
    export = onnx_session.load(tmp_path / "out", threads=1)
    size = export.manifest["files"]["model.onnx.data"]["bytes"]
    assert size < exact.manifest["files"]["model.onnx.data"]["bytes"]
    tokens = np.array([[65, 66]])
    logits, want = export.step(tokens, export.start())[0], exact.step(tokens, exact.start())[0]
    assert not np.array_equal(logits, want)
    np.testing.assert_allclose(logits, want, atol=0.1 * np.abs(want).max())


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"short_conv": 4}, "model.short_conv is 4"),
        ({"mixer_linear": LinearConfig(int8_activations=False)}, "not all BitLinear"),
        ({"mixer": "attention", "mixer_linear": DENSE, "glu_linear": DENSE}, "model.mixer is"),
    ],
)
def test_an_unsupported_config_is_refused_by_name(change, match):
    config = dataclasses.replace(TINY, **change)
    with pytest.raises(ConfigError, match=match):
        check_supported(config)


def test_sums_that_float32_cannot_hold_are_refused(saved, tmp_path):
    config = ModelConfig(hidden_size=8, num_layers=1, intermediate_size=140_000)
    tensors = dataclasses.replace(saved, config=config)
    with pytest.raises(ConfigError, match="140000 columns"):
        onnx_export.export_onnx(tensors, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_of_more_tokens_than_the_model_is_refused(tmp_path, save_model):
    ByteTokenizer().save(tmp_path / "tokenizer")
    source = save_model(tmp_path / "m", ODD, initial_params(ODD, 1), tmp_path / "tokenizer")
    with pytest.raises(DataError, match="the tokenizer has 258 tokens, the model 61"):
        onnx_export.export_onnx(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_failed_export_leaves_nothing(saved, tmp_path):
    def read(shapes, mesh):
        if any(name.startswith("head") for name in shapes):
            raise CheckpointError("the head is damaged")
        return saved._read(shapes, mesh)

    with pytest.raises(CheckpointError, match="damaged"):
        onnx_export.export_onnx(dataclasses.replace(saved, _read=read), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_is_kept_unless_told(exports, capsys):
    before = manifest.read(exports / "exact")
    assert main(["export", "onnx", "--model", str(exports), "--out", str(exports / "exact")]) == 2
    assert manifest.read(exports / "exact") == before
    assert "mmfree: error:" in capsys.readouterr().err


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_folder_is_refused(kind, exports, tmp_path):
    folder = shutil.copytree(exports / "exact", tmp_path / "copy")
    damage(kind, folder)
    with pytest.raises((CheckpointError, ConfigError), match=DAMAGE[kind]):
        onnx_session.load(folder)
    answer = chat(folder, "--prompt", "x")
    assert answer.returncode == 2
    assert answer.stdout == ""
    assert answer.stderr.startswith("chat.py: error:")
    assert DAMAGE[kind] in answer.stderr


def test_an_old_runtime_is_refused_with_the_version_that_is_needed(exact):
    manifest.check_runtime(manifest.ONNXRUNTIME, exact.manifest)
    manifest.check_runtime("1.131.0.dev20270101", exact.manifest)
    with pytest.raises(ConfigError, match=rf"1\.28\.2.*{manifest.ONNXRUNTIME}"):
        manifest.check_runtime("1.28.2", exact.manifest)


def test_a_token_that_the_model_does_not_have_is_refused(exact):
    with pytest.raises(DataError, match="token id 264"):
        onnx_session.prefill(exact, [1, 264], exact.start())
    with pytest.raises(DataError, match="empty"):
        onnx_session.prefill(exact, [], exact.start())
    # The runtime counts -1 from the end, and takes 2.5 for 2.
    for tokens, words in (([[-1]], "id -1"), ([[2.5]], "float64"), ([3], "shape"), ([[]], "shape")):
        with pytest.raises(DataError, match=words):
            exact.step(np.array(tokens), exact.start())


def test_an_export_of_an_older_version_loads(exports, tmp_path):
    folder = shutil.copytree(exports / "exact", tmp_path / "copy")
    rewrite(folder / "export.json", sign=False)
    onnx_session.load(folder)
    answer = chat(folder, "--prompt", "We hold", "--max-new-tokens", "3")
    assert answer.returncode == 0, answer.stderr


def test_the_example_is_short():
    lines = onnx_export.CHAT.read_text().splitlines()
    assert len(lines) < 160
    assert not any("jax" in line for line in lines if line.lstrip().startswith(("import", "from")))


def test_the_example_writes_the_models_text_without_jax(exact, exports):
    prompt = "So it fits"
    want, _ = continuation(exact, ByteTokenizer().encode(prompt), 60)
    options = ("--temperature", "0", "--max-new-tokens", "60")
    answer = chat(exports / "exact", "--prompt", prompt, *options)
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout == prompt + want + "\n"
    assert "tokens/s" in answer.stderr


def test_the_examples_speed_stands_below_its_text_where_both_go_to_one_file(exports):
    options = ("--prompt", "So", "--max-new-tokens", "3")
    both = chat(exports / "exact", *options, stderr=subprocess.STDOUT).stdout
    assert re.search(r"^So.*\n\[\d+ tokens read [^\n]*\]\n\Z", both, re.S)


def test_every_end_token_of_the_folder_ends_an_answer(saved, exact, tmp_path):
    prompt = "So it fits"
    want = continuation(exact, ByteTokenizer().encode(prompt), 20)[0].encode()
    other = next(i for i in range(256) if i not in want)
    source = shutil.copytree(saved.path, tmp_path / "source")
    ends = {"eos_token_id": [other, want[5]]}
    (source / "generation_config.json").write_text(json.dumps(ends))
    onnx_export.export_onnx(open_model(source), tmp_path / "out")
    written = json.loads((tmp_path / "out/export.json").read_text())
    assert written["end_ids"] == [ByteTokenizer.eos_id, other, want[5]]
    assert written["eos_token_id"] == ByteTokenizer.eos_id
    answer = chat(tmp_path / "out", "--prompt", prompt, "--temperature", "0")
    assert answer.stdout == prompt + want[: want.index(want[5])].decode() + "\n"


def test_the_examples_state_carries_over_the_conversation(exact, exports):
    """Two typed lines read as one text, with the first answer between them."""
    encode = ByteTokenizer().encode
    first, state = continuation(exact, encode("A language"), 30)
    second, _ = continuation(exact, encode("a"), 30, state)
    assert second != continuation(exact, encode("a"), 30)[0]
    options = ("--temperature", "0", "--max-new-tokens", "30")
    answer = chat(exports / "exact", *options, typed="A language\na\n")
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout == f"\n> {first}\n\n> {second}\n\n> \n"


def test_a_prompt_that_is_no_text_is_refused(exports):
    answer = chat(exports / "exact", "--prompt", "\udcff")
    assert (answer.returncode, answer.stdout) == (2, "")
    assert answer.stderr.startswith("chat.py: error: the prompt is not UTF-8")


def test_the_examples_draws_are_reproducible_and_matter(exports):
    def draw(seed):
        return chat(exports / "fast", "--prompt", "So", "--seed", seed, "--max-new-tokens", "40")

    first = draw("1").stdout
    assert first.startswith("So")
    assert draw("1").stdout == first
    assert draw("2").stdout != first
