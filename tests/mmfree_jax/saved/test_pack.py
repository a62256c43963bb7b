"""Packed models: exact trits, the same stream, and refusal of what is damaged."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from damaged_packs import damaged, flip, older_with
from safetensors import safe_open
from safetensors.numpy import save_file
from small_packed_model import BASE, build

from mmfree_jax.cli.main import main
from mmfree_jax.errors import CheckpointError, ConfigError, OutputError
from mmfree_jax.infer import api
from mmfree_jax.model import Ternary, packing
from mmfree_jax.model import weights as weights_module
from mmfree_jax.model.packing import pack as pack_in_memory
from mmfree_jax.model.parameters import flatten
from mmfree_jax.model.weights import Packed, as_weights, ternary_weights
from mmfree_jax.model_config import DENSE, LinearConfig
from mmfree_jax.pallas_kernels.packed_matmul import api as packed_matmul
from mmfree_jax.saved import packed as pack
from mmfree_jax.saved.convert import export_hf
from mmfree_jax.saved.kinds import PACKED_FILE
from mmfree_jax.saved.model_folder import write_model
from mmfree_jax.saved.open_model import open_model
from mmfree_jax.saved.pack import pack as make_packed
from mmfree_jax.saved.pack import packed_bytes, write_packed
from mmfree_jax.saved.pretrained import load_model
from mmfree_jax.saved.session import load_session, save_session
from mmfree_jax.saved.tensor_file import Reader

PROMPTS = [[5, 9, 11, 2, 3], [7], list(range(1, 18))]


def write(config, out, **options):
    out.mkdir(exist_ok=True)
    leaf = flatten(build(config)[1]).__getitem__
    return write_packed(out / PACKED_FILE, config, leaf, **options)


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    out = tmp_path_factory.mktemp("packed") / "model"
    report = write(BASE, out, embedding="float32")
    return out, report


@pytest.mark.parametrize("bits", ["2", "1.6"])
def test_unpacking_gives_the_exact_trits_scales_and_norms(bits, tmp_path):
    write(BASE, tmp_path / "p", bits=bits, embedding="float32")
    _, params = build(BASE)
    weights = open_model(tmp_path / "p").weights("ternary")
    expected = jax.jit(ternary_weights, static_argnums=1)(params, BASE)
    assert jax.tree.structure(weights.ternary) == jax.tree.structure(expected)
    for found, want in zip(
        jax.tree.leaves(weights.ternary), jax.tree.leaves(expected), strict=True
    ):
        assert found.dtype == want.dtype
        np.testing.assert_array_equal(found, want)
    np.testing.assert_array_equal(
        weights.params["blocks"]["glu"]["down_proj"]["norm_scale"],
        params["blocks"]["glu"]["down_proj"]["norm_scale"],
    )
    assert "weight" not in weights.params["head"]


def test_greedy_streams_are_identical_packed_unpacked_and_full(packed):
    model, params = build(BASE)
    streams = {}
    for name, weights in {
        "master": params,
        "packed": open_model(packed[0]).weights("packed"),
        "trits": open_model(packed[0]).weights("ternary"),
        "packed in memory": pack_in_memory(as_weights(params, BASE), BASE),
    }.items():
        streams[name] = api.generate(model, weights, PROMPTS, max_new_tokens=30, temperature=0)
        alone = api.generate(model, weights, PROMPTS[:1], max_new_tokens=30, temperature=0)
        assert alone.tokens == streams[name].tokens[:1]
    tokens = streams["master"].tokens
    for name, out in streams.items():
        assert out.tokens == tokens, name
        np.testing.assert_array_equal(
            out.session.logits_BV, streams["master"].session.logits_BV, err_msg=name
        )
    # The full-sequence forward predicts each of the tokens.
    apply = jax.jit(lambda t: model.apply({"params": params}, t))
    for prompt, answer in zip(PROMPTS, tokens, strict=True):
        logits = apply(jnp.asarray([prompt + answer], jnp.int32))
        np.testing.assert_array_equal(np.argmax(logits[0, len(prompt) - 1 : -1], -1), answer)


@pytest.mark.parametrize(
    "config",
    [BASE, dataclasses.replace(BASE, param_dtype="bfloat16")],
    ids=["float32", "bfloat16"],
)
def test_a_model_packed_in_memory_is_its_packed_file_bit_for_bit(config, tmp_path):
    _, params = build(config)
    write(config, tmp_path / "p", embedding="float32")
    file = open_model(tmp_path / "p").weights("packed")
    memory = pack_in_memory(as_weights(params, config), config)
    # The file keeps a bfloat16 master's norms in float32; not a last bit may differ else.
    memory = jax.tree.map(lambda x: x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x, memory)
    jax.tree_util.tree_map_with_path(
        lambda path, a, b: np.testing.assert_array_equal(a, b, jax.tree_util.keystr(path)),
        memory,
        file,
    )
    bounds = np.asarray(file.mixer.lower_bound)
    assert bounds.shape == (config.num_layers, config.state_size)
    assert np.diff(bounds, axis=0).min() > 0  # they are not all 0


def test_scales_and_bounds_are_made_by_the_same_programs_in_memory_and_for_a_file(
    tmp_path, monkeypatch
):
    # Tests compile without optimisation, where sums have one order in all programs; else a fifth
    # of the lower bounds (12 layers of 640) change by a last bit when fused with other work.
    seen = []

    def watch(module, name):
        program = getattr(module, name)

        def watched(x, *how):
            seen.append((name, x.shape, x.dtype.name, isinstance(x, jax.core.Tracer)))
            return program(x, *how)

        monkeypatch.setattr(module, name, watched)

    _, params = build(BASE)
    watch(weights_module, "_ternarise_matrix")
    watch(packing, "_lower_bounds")
    pack_in_memory(as_weights(params, BASE), BASE)
    in_memory = sorted(seen)
    seen.clear()
    write(BASE, tmp_path / "p")
    open_model(tmp_path / "p").weights("packed")
    # The file's header is made of shapes, by tracing.
    assert in_memory == sorted(call for call in seen if not call[-1])
    assert [name for name, *_ in in_memory] == ["_lower_bounds"] + 7 * ["_ternarise_matrix"]


def test_decoding_off_a_cpu_reads_one_form_of_a_run_and_of_its_packed_file(tmp_path, monkeypatch):
    _, params = build(BASE)
    (tmp_path / "m").mkdir()
    write_model(tmp_path / "m", BASE, params)
    make_packed(open_model(tmp_path / "m"), tmp_path / "p")
    assert isinstance(open_model(tmp_path / "m").weights(), Ternary)
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    run, file = (open_model(tmp_path / name).weights() for name in ("m", "p"))
    assert isinstance(run, Packed)
    jax.tree.map(np.testing.assert_array_equal, run, file)
    (tmp_path / "h").mkdir()
    write_model(tmp_path / "h", HYBRID, build(HYBRID)[1])
    assert isinstance(open_model(tmp_path / "h").weights(), Ternary)  # it cannot be packed


def test_integer_sums_are_identical_packed_and_unpacked():
    _, params = build(BASE)
    weights = as_weights(params, BASE)
    packed = pack_in_memory(weights, BASE)
    rng = np.random.default_rng(0)
    checked = 0
    for path, trits in jax.tree_util.tree_leaves_with_path(weights.ternary):
        if path[-1].key != "trits":
            continue
        group, name = (packed, "head") if len(path) == 2 else (
            getattr(packed, path[1].key), path[2].key
        )  # fmt: skip
        matrix = getattr(group, name).matrix
        matrices = trits.reshape(-1, *trits.shape[-2:])
        rows = matrix.reshape(-1, *matrix.shape[-2:])
        for t, p in zip(matrices, rows, strict=True):
            x = jnp.asarray(rng.integers(-128, 128, (3, t.shape[1])), jnp.int8)
            found = packed_matmul.packed_matmul(x, p)
            assert found.dtype == jnp.int32
            np.testing.assert_array_equal(
                found, np.asarray(x, np.int32) @ np.asarray(t, np.int32).T
            )
            checked += 1
    assert checked == 6 * BASE.num_layers + 1


def test_sizes_are_two_bits_a_weight_and_less(tmp_path):
    config = dataclasses.replace(BASE, hidden_size=80, intermediate_size=160, vocab_size=200)
    sizes = {}
    for bits in ("2", "1.6"):
        report = write(config, tmp_path / bits, bits=bits)
        reader = pack.open_packed(tmp_path / bits).reader
        sizes[bits] = sum(
            reader.read(name).nbytes for name in reader.names() if name.endswith("/packed")
        )
        assert sizes[bits] * 8 / report.weights == pytest.approx(float(bits))


@pytest.mark.parametrize(
    "changes",
    [
        {"mixer": "hgrn2,attention", "float_attention": True},
        {"mixer": "rwkv4", "weight_scale": "learned"},
        {"head_linear": DENSE, "residual_dtype": "bfloat16"},
        {"mixer": "rglru", "hidden_size": 128, "intermediate_size": 256, "weight_scale": "groups"},
    ],
)
def test_the_bytes_that_info_tells_are_the_files(changes, tmp_path):
    config = dataclasses.replace(BASE, num_heads=1, **changes)
    write(config, tmp_path / "p")
    reader = pack.open_packed(tmp_path / "p").reader
    assert packed_bytes(config) == sum(reader.read(name).nbytes for name in reader.names())


def test_any_safetensors_reader_opens_the_file(packed):
    with safe_open(packed[1].file, framework="np") as file:
        assert file.metadata()["format"] == "mmfree-packed"
        assert file.metadata()["version"] == "1"
        assert file.get_tensor("blocks/mixer/i_proj/packed").shape == (2, 38, 10)
    assert packed[1].num_bytes == packed[1].file.stat().st_size


def test_bfloat16_and_int8_embedding_report_their_error(tmp_path):
    config = dataclasses.replace(BASE, compute_dtype="bfloat16", residual_dtype="bfloat16")
    assert BASE.residual_dtype == "float32"
    whole = write(BASE, tmp_path / "whole")
    assert (whole.embedding, whole.embedding_error) == ("float32", 0.0)
    _, params = build(config)
    table = np.asarray(params["embedding"]["weight"])
    half = write(config, tmp_path / "half")
    small = write(config, tmp_path / "small", embedding="int8")
    assert (half.embedding, small.embedding) == ("bfloat16", "int8")
    assert 1e-4 < half.embedding_error < 4e-3
    assert 1e-3 < small.embedding_error < 2e-2
    model, weights = (
        open_model(tmp_path / "small").model("float32"),
        open_model(tmp_path / "small").weights("packed"),
    )
    embedding = weights.embedding
    assert embedding.table_VD.dtype == jnp.int8
    stored = np.asarray(embedding.table_VD, np.float32) * np.asarray(embedding.row_scale_V1)
    np.testing.assert_allclose(stored, table, atol=np.abs(table).max() / 127)
    trits = open_model(tmp_path / "small").weights("ternary")
    np.testing.assert_allclose(trits.params["embedding"]["weight"], stored, rtol=1e-6)
    outputs = [
        api.generate(model, v, PROMPTS, max_new_tokens=12, temperature=0).tokens
        for v in (weights, trits)
    ]
    assert outputs[0] == outputs[1]


HYBRID = dataclasses.replace(
    BASE,
    mixer="attention",
    num_heads=1,
    glu_linear=DENSE,
    head_linear=LinearConfig(input_norm=False),
)


def test_a_hybrid_model_packs_and_runs_on_trits(tmp_path):
    model, params = build(HYBRID)
    write(HYBRID, tmp_path / "p", embedding="float32")
    loaded, weights = load_model(tmp_path / "p")
    assert isinstance(weights, Ternary)
    assert loaded.config.glu_linear == DENSE
    expected = api.generate(model, params, PROMPTS, max_new_tokens=10, temperature=0)
    found = api.generate(loaded, weights, PROMPTS, max_new_tokens=10, temperature=0)
    assert found.tokens == expected.tokens
    with pytest.raises(ConfigError, match="hybrid"):
        open_model(tmp_path / "p").weights("packed")


def test_a_dense_model_is_refused(tmp_path):
    dense = dataclasses.replace(HYBRID, mixer_linear=DENSE, head_linear=DENSE)
    with pytest.raises(ConfigError, match="no ternary layer"):
        write(dense, tmp_path / "p")


def test_a_failed_write_leaves_nothing(tmp_path):
    def leaf(name):
        if name.startswith("head"):
            raise OSError(28, "No space left on device")
        return flatten(build(BASE)[1])[name]

    with pytest.raises(OutputError, match="No space left"):
        write_packed(tmp_path / PACKED_FILE, BASE, leaf)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda data: data[:-1], "truncated or damaged"),
        (lambda data: data[:100], "no readable header"),
        (lambda data: b"", "no readable header"),
        (flip(-1), "does not match its checksum"),
        (lambda data: data.replace(b'"version": "1"', b'"version": "7"'), "version 7"),
        (lambda data: data.replace(b"mmfree-packed", b"mmfree-pocked"), "mmfree-pocked"),
        (lambda data: data.replace(b"head/packed", b"head/pocked"), "header does not match its"),
        (older_with(b'hidden_size\\": 38', b'hidden_size\\": 36'), "has shape"),
        (older_with(b"head/packed", b"head/pocked"), "no tensor head/packed"),
    ],
)
def test_damage_is_found_and_named(packed, tmp_path, change, match):
    with pytest.raises(CheckpointError, match=match) as error:
        open_model(damaged(packed, tmp_path, change)).weights("ternary")
    assert "\n" not in str(error.value)


def test_every_tensor_is_covered_by_a_checksum(packed, tmp_path):
    data = (packed[0] / PACKED_FILE).read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        reader = pack.open_packed(packed[0]).reader
        reader.read(name)
        at = 8 + length + entry["data_offsets"][0]
        reader._path = tmp_path / "flipped"
        reader._path.write_bytes(flip(at)(data))
        with pytest.raises(CheckpointError, match=name):
            reader.read(name)


def test_a_session_survives_the_disk_and_serves_packed_and_unpacked(packed, tmp_path):
    model, params = build(BASE)
    weights = as_weights(params, BASE)
    packed_weights = open_model(packed[0]).weights("packed")
    options = {"temperature": 0.8, "seed": 3, "repetition_penalty": 1.2}
    whole = api.generate(model, weights, PROMPTS, max_new_tokens=20, **options)
    first = api.generate(model, weights, PROMPTS, max_new_tokens=8, **options)
    save_session(tmp_path / "s", first.session, weights, BASE)
    for other in (weights, packed_weights):
        session = load_session(tmp_path / "s", other, BASE)
        rest = api.generate(
            model, other, [[], [], []], max_new_tokens=12, session=session, **options
        )
        joined = [a + b for a, b in zip(first.tokens, rest.tokens, strict=True)]
        assert joined == whole.tokens


@pytest.mark.parametrize("config", [BASE, HYBRID], ids=["mlgru", "attention"])
def test_a_session_of_another_model_is_refused(config, tmp_path):
    model, params = build(config)
    weights = as_weights(params, config)
    session = api.prefill(model, params, [[1, 2, 3]])
    save_session(tmp_path / "s", session, weights, config)
    load_session(tmp_path / "s", weights, config)

    head = params["head"] | {"weight": params["head"]["weight"] * 1.001}
    other = as_weights(params | {"head": head}, config)
    with pytest.raises(CheckpointError, match="other weights"):
        load_session(tmp_path / "s", other, config)
    deeper = dataclasses.replace(config, norm_eps=1e-5)
    with pytest.raises(CheckpointError, match="norm_eps"):
        load_session(tmp_path / "s", weights, deeper)
    with pytest.raises(CheckpointError, match="mmfree-session"):
        Reader(tmp_path / "s", file_format=pack.FORMAT, version=1)


def test_a_prompt_cache_is_one_small_file(tmp_path):
    model, params = build(BASE)
    weights = as_weights(params, BASE)
    sizes = []
    for length in (1, 400):
        session = api.prefill(model, weights, [[1] * length])
        save_session(tmp_path / str(length), session, weights, BASE)
        sizes.append((tmp_path / str(length)).stat().st_size)
    assert sizes[0] == sizes[1]


def test_a_huggingface_folder_packs_one_parameter_at_a_time(tmp_path, capsys):
    _, params = build(BASE)
    folder = tmp_path / "model"
    folder.mkdir()
    write_model(folder, BASE, params)
    flat = {k: np.asarray(v) for k, v in flatten(params).items()}
    export_hf(folder, tmp_path / "hf")
    for name in ("model", "hf"):
        leaf = open_model(tmp_path / name).leaf("head/weight")
        np.testing.assert_array_equal(leaf, params["head"]["weight"])
        assert main(["pack", "--model", str(tmp_path / name), "--out", str(tmp_path / f"{name}-p"),
                     "--embedding", "float32", "--agreement-prompts", "0"]) == 0  # fmt: skip
    write(BASE, tmp_path / "direct", embedding="float32")
    direct = open_model(tmp_path / "direct").weights("ternary")
    for name in ("model-p", "hf-p"):
        found = open_model(tmp_path / name).weights("ternary")
        jax.tree.map(np.testing.assert_array_equal, found, direct)
    del flat["head/weight"]
    save_file(flat, folder / "params.safetensors")
    assert main(["pack", "--model", str(folder), "--out", str(tmp_path / "q")]) == 2
    assert "head/weight" in capsys.readouterr().err
    assert not (tmp_path / "q" / PACKED_FILE).exists()
