"""Hugging Face folders: round trips, equations of the parts that releases do not use, refusals."""

import dataclasses
import json
import os
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from safetensors.numpy import load_file, save_file

from mmfree_jax.cli.main import main
from mmfree_jax.config import MeshConfig
from mmfree_jax.data.tokenizer import load_tokenizer
from mmfree_jax.data.train_bpe import train_bpe
from mmfree_jax.errors import CheckpointError, ConfigError, DataError, OutputError
from mmfree_jax.model import LanguageModel
from mmfree_jax.model_config import DENSE, ModelConfig
from mmfree_jax.parallel.sharding import make_mesh
from mmfree_jax.saved import huggingface
from mmfree_jax.saved.convert import export_hf, import_hf
from mmfree_jax.saved.end_tokens import end_ids
from mmfree_jax.saved.model_folder import write_model
from mmfree_jax.saved.pretrained import load_pretrained
from mmfree_jax.saved.tensor_names import tensor_map

HGRN = {
    "model_type": "hgrn_bit",
    "vocab_size": 32,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 64,
}
LLAMA = HGRN | {
    "model_type": "llama",
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500.0,
}
TOKENS = np.arange(14, dtype=np.int32).reshape(2, 7)


def _write_folder(folder, config, *, dtype=np.float32, seed=0, shards=1):
    """A Hugging Face folder of random weights; returns the tensors."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    names = tensor_map(huggingface.read_config(folder).config)
    rng = np.random.default_rng(seed)
    tensors = {
        name: (rng.normal(size=slot.shape) * 0.3 + (len(slot.shape) == 1)).astype(dtype)
        for name, (slot, *_) in names.items()
    }
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return tensors
    weight_map = {}
    for k in range(shards):
        part = dict(list(tensors.items())[k::shards])
        save_file(part, folder / f"model-{k}.safetensors")
        weight_map |= dict.fromkeys(part, f"model-{k}.safetensors")
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return tensors


def _same_bits(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype
        assert a[name].shape == b[name].shape, name
        assert a[name].tobytes() == b[name].tobytes(), name


CONFIGS = {
    "hgrn": HGRN,
    "llama": LLAMA,
    "short_conv": HGRN | {"use_short_conv": True, "num_heads": 4},
    "expand": HGRN | {"expand_ratio": 2, "use_lower_bound": False},
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_round_trip_keeps_every_bit(tmp_path, kind):
    tensors = _write_folder(tmp_path / "hf", CONFIGS[kind], shards=2)
    import_hf(tmp_path / "hf", tmp_path / "ours")
    export_hf(tmp_path / "ours", tmp_path / "back", shard_bytes=4000)
    index = json.loads((tmp_path / "back/model.safetensors.index.json").read_text())
    found = {}
    for file in sorted(set(index["weight_map"].values())):
        part = load_file(tmp_path / "back" / file)
        assert {index["weight_map"][name] for name in part} == {file}
        found |= part
    _same_bits(found, tensors)
    again = huggingface.read_config(tmp_path / "back").config
    assert again == huggingface.read_config(tmp_path / "hf").config


def test_half_precision_is_read_exactly_and_written(tmp_path):
    for dtype, name in ((np.float16, "float16"), (ml_dtypes.bfloat16, "bfloat16")):
        folder = tmp_path / name
        tensors = _write_folder(folder / "hf", HGRN, dtype=dtype)
        _, params = load_pretrained(folder / "hf")
        assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(params))
        got = params["blocks"]["mixer"]["f_proj"]["weight"][1]
        want = tensors["model.layers.1.attn.f_proj.weight"].astype(np.float32)
        np.testing.assert_array_equal(got, want)
        export_hf(_as_model_folder(folder / "hf"), folder / "back", dtype=name)
        _same_bits(load_file(folder / "back/model.safetensors"), tensors)


def _as_model_folder(folder):
    import_hf(folder, folder.parent / "ours")
    return folder.parent / "ours"


def _norm(x, weight, eps):
    return x / np.sqrt(np.mean(x * x, -1, keepdims=True) + eps) * weight


def _silu(x):
    return x / (1 + np.exp(-x))


def _bit_linear(t, name, x, eps):
    x = _norm(x, t[name + ".norm.weight"], eps)
    scale = 127 / np.maximum(np.abs(x).max(-1, keepdims=True), 1e-5)
    x = np.clip(np.round(x * scale), -128, 127) / scale
    w = t[name + ".weight"]
    s = 1 / max(np.abs(w).mean(), 1e-5)
    return x @ (np.clip(np.round(w * s), -1, 1) / s).T


def _hgrn(tensors, config, tokens):
    """The authors' equations in float64, one sequence: heads, short convolutions, expansion."""
    t = {name: x.astype(np.float64) for name, x in tensors.items()}
    eps, layers = 1e-6, config["num_hidden_layers"]
    x = t["model.embeddings.weight"][tokens]

    def convolve(y, weight):
        padded = np.concatenate([np.zeros((3, y.shape[1])), y])
        out = sum(padded[j : j + len(y)] * weight[:, 0, j] for j in range(4))
        return _silu(out)

    if config.get("use_lower_bound", True):
        share = np.exp(t["model.lower_bounds"])
        share /= share.sum(0)
        bounds = np.cumsum(share, 0) - share[0]
    for i in range(layers):
        p = f"model.layers.{i}.attn."
        h = _norm(x, t[f"model.layers.{i}.attn_norm.weight"], eps)
        if f"{p}h_conv1d.weight" in t:
            h = convolve(h, t[f"{p}h_conv1d.weight"])
        inputs, forget, gate = (_bit_linear(t, f"{p}{n}_proj", h, eps) for n in "ifg")
        if f"{p}i_conv1d.weight" in t:
            inputs = convolve(inputs, t[f"{p}i_conv1d.weight"])
            forget = convolve(forget, t[f"{p}f_conv1d.weight"])
        forget = 1 / (1 + np.exp(-forget))
        if config.get("use_lower_bound", True) and i > 0:
            forget = bounds[i] + (1 - bounds[i]) * forget
        inputs = _silu(inputs) * (1 - forget)
        state, states = np.zeros(inputs.shape[1]), []
        for step in range(len(tokens)):
            state = forget[step] * state + inputs[step]
            states.append(state)
        out = _norm(gate, t[p + "g_norm.weight"], eps) * _silu(np.array(states))
        x = x + _bit_linear(t, p + "o_proj", out, eps)
        h = _norm(x, t[f"model.layers.{i}.mlp_norm.weight"], eps)
        up = _bit_linear(t, f"model.layers.{i}.mlp.gate_proj", h, eps)
        a, b = np.split(up, 2, -1)
        x = x + _bit_linear(t, f"model.layers.{i}.mlp.down_proj", _silu(a) * b, eps)
    return _bit_linear(t, "lm_head", _norm(x, t["model.norm.weight"], eps), eps)


@pytest.mark.parametrize(
    "change",
    [
        {"num_heads": 4},
        {"use_short_conv": True},
        {"use_short_conv": True, "share_conv_kernel": False},
        {"expand_ratio": 2, "use_lower_bound": False},
    ],
    ids=["heads", "shared_conv", "separate_conv", "expand"],
)
def test_unusual_hgrn_configs_compute_their_equations(tmp_path, change):
    config = HGRN | change
    tensors = _write_folder(tmp_path / "hf", config)
    model, params = load_pretrained(tmp_path / "hf")
    logits = model.apply({"params": params}, TOKENS)
    for row in range(2):
        want = _hgrn(tensors, config, TOKENS[row])
        # A rounding that falls the other way in float32 moves a logit by a percent or so.
        assert np.linalg.norm(logits[row] - want) / np.linalg.norm(want) < 2e-2
        assert np.mean(np.abs(logits[row] - want) < 1e-4 * np.abs(want).max()) > 0.5


def test_short_convolution_goes_on_from_its_state(tmp_path):
    _write_folder(tmp_path / "hf", HGRN | {"use_short_conv": True})
    model, params = load_pretrained(tmp_path / "hf")
    from mmfree_jax.model import init_state

    whole, _ = model.apply({"params": params}, TOKENS, method=LanguageModel.hidden)
    state, parts = init_state(model.config, 2), []
    for piece in (TOKENS[:, :2], TOKENS[:, 2:3], TOKENS[:, 3:]):
        padded = np.pad(piece, ((0, 0), (0, 2)))
        held = np.pad(np.ones_like(piece), ((0, 0), (0, 2)))
        x, state = model.apply({"params": params}, padded, held, state, method=LanguageModel.hidden)
        parts.append(x[:, : piece.shape[1]])
    np.testing.assert_allclose(np.concatenate(parts, 1), whole, rtol=1e-3, atol=1e-4)

    # Documents packed into a row do not see each other.
    segments = np.array([[1, 1, 1, 2, 2, 2, 2]] * 2)
    packed, _ = model.apply({"params": params}, TOKENS, segments, method=LanguageModel.hidden)
    alone, _ = model.apply({"params": params}, TOKENS[:, 3:], method=LanguageModel.hidden)
    np.testing.assert_allclose(packed[:, 3:], alone, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", ["hgrn", "llama"])
def test_a_mesh_gives_each_device_its_part(tmp_path, kind):
    _write_folder(tmp_path / "hf", CONFIGS[kind], shards=2)
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    _, alone = load_pretrained(tmp_path / "hf")
    _, shared = load_pretrained(tmp_path / "hf", mesh=mesh)
    jax.tree.map(np.testing.assert_array_equal, alone, shared)
    weight = shared["blocks"]["glu"]["gate_up_proj"]["weight"]
    assert weight.sharding.spec == P(None, "tensor", "fsdp")
    assert weight.addressable_shards[0].data.size == weight.size // 4


def test_a_mesh_that_does_not_divide_is_refused(tmp_path):
    _write_folder(tmp_path / "hf", HGRN | {"vocab_size": 31})
    with pytest.raises(ConfigError, match=r"embedding/weight has 31 .* mesh.tensor \(2\)"):
        load_pretrained(tmp_path / "hf", mesh=make_mesh(MeshConfig(tensor=2)))


def test_compute_dtype(tmp_path):
    _write_folder(tmp_path / "hf", HGRN)
    model, _ = load_pretrained(tmp_path / "hf")
    assert model.config.compute_dtype == "float32"
    model, params = load_pretrained(tmp_path / "hf", compute_dtype=jnp.bfloat16)
    assert (model.config.compute_dtype, model.config.residual_dtype) == ("bfloat16",) * 2
    assert model.apply({"params": params}, TOKENS).dtype == jnp.float32
    with pytest.raises(ConfigError, match="compute_dtype is 'int8'"):
        load_pretrained(tmp_path / "hf", compute_dtype="int8")


def test_a_tied_head_is_a_copy(tmp_path):
    tensors = _write_folder(tmp_path / "hf", LLAMA)
    del tensors["lm_head.weight"]
    save_file(tensors, tmp_path / "hf/model.safetensors")
    (tmp_path / "hf/config.json").write_text(json.dumps(LLAMA | {"tie_word_embeddings": True}))
    _, params = load_pretrained(tmp_path / "hf")
    np.testing.assert_array_equal(params["head"]["weight"], params["embedding"]["weight"])


def test_every_fault_is_listed_at_once(tmp_path):
    tensors = _write_folder(tmp_path / "hf", HGRN)
    del tensors["model.norm.weight"]
    tensors["surplus"] = np.zeros(3, np.float32)
    tensors["lm_head.norm.weight"] = np.zeros(5, np.float32)
    tensors["model.layers.0.attn_norm.weight"] = np.zeros(16, np.int32)
    tensors["model.layers.1.mlp.down_proj.weight"][3, 4] = np.nan
    save_file(tensors, tmp_path / "hf/model.safetensors")
    with pytest.raises(CheckpointError) as caught:
        load_pretrained(tmp_path / "hf")
    message = str(caught.value)
    assert "5 places" in message
    for part in (
        "model.norm.weight: missing",
        "surplus: not part of this model",
        "lm_head.norm.weight: shape [5], expected [16]",
        "model.layers.0.attn_norm.weight: dtype I32",
        "model.layers.1.mlp.down_proj.weight: values that are not finite",
    ):
        assert part in message
    assert "\n" not in message


def test_values_that_are_not_finite_alone(tmp_path):
    tensors = _write_folder(tmp_path / "hf", HGRN)
    tensors["model.embeddings.weight"][0, 0] = np.inf
    tensors["lm_head.weight"][0, 0] = np.nan
    save_file(tensors, tmp_path / "hf/model.safetensors")
    with pytest.raises(CheckpointError, match=r"lm_head\.weight: .*embeddings\.weight: values"):
        load_pretrained(tmp_path / "hf")


@pytest.mark.parametrize("target", ["../model.safetensors", "/etc/passwd", "a/b.safetensors", ".."])
def test_an_index_may_not_leave_the_folder(tmp_path, target):
    _write_folder(tmp_path / "hf", HGRN, shards=2)
    shutil.copy(tmp_path / "hf/model-0.safetensors", tmp_path / "model.safetensors")
    index = tmp_path / "hf/model.safetensors.index.json"
    values = json.loads(index.read_text())
    values["weight_map"]["lm_head.weight"] = target
    index.write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match="leave the folder are refused"):
        load_pretrained(tmp_path / "hf")


def test_a_pipe_in_an_index_is_not_waited_for(tmp_path):
    _write_folder(tmp_path / "hf", HGRN, shards=2)
    (tmp_path / "hf/model-1.safetensors").unlink()
    os.mkfifo(tmp_path / "hf/model-1.safetensors")
    with pytest.raises(CheckpointError, match=r"model-1\.safetensors .*a named pipe, not a file"):
        load_pretrained(tmp_path / "hf")


def test_a_message_names_a_hundred_faults_at_most(tmp_path):
    tensors = _write_folder(tmp_path / "hf", HGRN)
    surplus = {f"surplus.{i:03}": np.zeros(1, np.float32) for i in range(150)}
    save_file(tensors | surplus, tmp_path / "hf/model.safetensors")
    with pytest.raises(CheckpointError, match=r"150 places: .*surplus\.099: .*; and 50 more: "):
        load_pretrained(tmp_path / "hf")


def test_pickled_weights_are_refused(tmp_path):
    _write_folder(tmp_path / "hf", HGRN)
    (tmp_path / "hf/model.safetensors").rename(tmp_path / "hf/pytorch_model.bin")
    with pytest.raises(CheckpointError, match="only pickled weights"):
        load_pretrained(tmp_path / "hf")
    with pytest.raises(CheckpointError, match="is pickled"):
        load_pretrained(tmp_path / "hf/pytorch_model.bin")
    index = {"weight_map": {"lm_head.weight": "pytorch_model.bin"}}
    (tmp_path / "hf/model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"only \.safetensors"):
        load_pretrained(tmp_path / "hf")


def test_damaged_files(tmp_path):
    _write_folder(tmp_path / "hf", HGRN)
    file = tmp_path / "hf/model.safetensors"
    contents = file.read_bytes()
    for damaged in (contents[: len(contents) // 2], b"", b"\xff" * 100):
        file.write_bytes(damaged)
        with pytest.raises(CheckpointError, match="damaged"):
            load_pretrained(tmp_path / "hf")
    file.unlink()
    with pytest.raises(CheckpointError, match=r"no model\.safetensors"):
        load_pretrained(tmp_path / "hf")
    with pytest.raises(CheckpointError, match="is not a folder"):
        load_pretrained(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("base", "change", "named"),
    [
        (HGRN, {"model_type": "mamba"}, "model_type is 'mamba'"),
        (HGRN, {"model_type": ["hgrn_bit"]}, r"model_type is \['hgrn_bit'\]"),
        (HGRN, {"model_type": "x" * 10_000}, "model_type is 'x{99}\\.\\.\\.: only hgrn_bit"),
        # Nothing is made of so many layers, names for example, before they are refused.
        (
            HGRN,
            {"num_hidden_layers": 10**9},
            r"num_layers is 1000000000: set .* \[1, 10000",
        ),
        (LLAMA, {"num_hidden_layers": 1e30}, "num_layers is 1000000000000000019884624838656: set"),
        (
            LLAMA,
            {"hidden_size": 2**40},
            "hidden_size is 1099511627776: set at most 2147483647",
        ),
        (HGRN, {"vocab_size": 2**31}, "vocab_size is 2147483648: set at most 2147483647"),
        (HGRN, {"intermediate_size": 2**31}, "intermediate_size is 2147483648: set at most"),
        (HGRN, {"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        (HGRN, {"attn_mode": "other"}, "attn_mode is 'other'"),
        (HGRN, {"num_heads": 3}, "num_heads is 3"),
        (HGRN, {"expand_ratio": 2}, "expand_ratio is 2"),
        (HGRN, {"hidden_size": "16"}, "hidden_size is '16'"),
        (HGRN, {"num_hidden_layers": None}, "num_hidden_layers is None"),
        (HGRN, {"quantization_config": {"bits": 4}}, "quantization_config"),
        (LLAMA, {"rope_scaling": {"rope_type": "llama3"}}, "rope_scaling"),
        (LLAMA, {"num_key_value_heads": 3}, "num_kv_heads is 3"),
        (LLAMA, {"mlp_bias": True}, "mlp_bias is True"),
        (LLAMA, {"qkv_bias": True}, "qkv_bias is True"),
        (LLAMA, {"sliding_window": 4096}, "sliding_window is 4096"),
        (LLAMA, {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types is"),
        (LLAMA, {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        (LLAMA, {"logits_scaling": 8.0}, "logits_scaling is 8.0, a field that is not known"),
        (LLAMA, {"n_kv_heads": 1}, "n_kv_heads is 1, a field that is not known"),
        (LLAMA, {"layer_norm_eps": 1e-5}, "layer_norm_eps is 1e-05, a field that is not known"),
        (LLAMA, {"pruned_heads": {"0": [1]}}, "pruned_heads is"),
        (LLAMA, {"tie_word_embeddings": "false"}, "tie_word_embeddings is 'false'"),
        (LLAMA, {"rope_theta": "10000"}, "rope_theta is '10000'"),
        (LLAMA, {"rope_theta": 0}, "rope_theta is 0"),
        (LLAMA, {"rope_scaling": {"factor": 2.0}}, "rope_scaling is"),
        (LLAMA, {"rope_scaling": {"type": "linear", "factor": True}}, "rope_scaling is"),
        (LLAMA, {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_scaling is"),
        (LLAMA, {"rope_scaling": "linear"}, "rope_scaling is 'linear'"),
        (LLAMA, {"rope_parameters": {"rope_type": "yarn", "factor": 4}}, "rope_parameters is"),
        (
            LLAMA,
            {"rope_parameters": {"full_attention": {"rope_theta": 1e6}}},
            "rope_parameters is",
        ),
        (
            LLAMA,
            {"rope_parameters": {"rope_theta": 1e6, "partial_rotary_factor": 0.5}},
            "rope_parameters is",
        ),
        (
            LLAMA,
            {"rope_theta": 1e4, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
            "rope_theta is 10000.0 and rope_parameters.rope_theta is 1000000.0",
        ),
        (LLAMA, {"rope_scaling": {"type": ["linear"]}}, "rope_scaling is"),
        (LLAMA, {"layer_types": [{"type": "full_attention"}] * 2}, "layer_types is"),
        (LLAMA, {"hidden_size": float("nan")}, "hidden_size is nan: a number above 0"),
        (HGRN, {"num_hidden_layers": float("inf")}, "num_hidden_layers is inf: a number above 0"),
        (HGRN, {"use_short_conv": "false"}, "use_short_conv is 'false'"),
        (HGRN, {"use_lower_bound": 1}, "use_lower_bound is 1"),
        (HGRN, {"feature_map": "relu"}, "feature_map is 'relu', a field that is not known"),
        (HGRN, {"rope_theta": 1e4}, "rope_theta is 10000.0, a field that is not known"),
    ],
)
def test_configs_that_are_not_implemented_are_refused_by_name(tmp_path, base, change, named):
    (tmp_path / "config.json").write_text(json.dumps(base | change))
    with pytest.raises(ConfigError, match=named):
        load_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("change", "theta"),
    [
        ({}, 10_000.0),
        ({"rope_theta": 5e5}, 5e5),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, 5e5),
        ({"rope_theta": 5e5, "rope_parameters": {"rope_theta": 5e5}}, 5e5),
        ({"rope_scaling": {"rope_type": "default", "rope_theta": 5e5}}, 5e5),
        ({"rope_scaling": {"type": "default"}, "rope_theta": 250000}, 250000.0),
        ({"rope_scaling": None, "rope_parameters": {}}, 10_000.0),
    ],
)
def test_every_spelling_of_the_rotary_base_is_read(tmp_path, change, theta):
    base = {k: v for k, v in LLAMA.items() if not k.startswith("rope")}
    (tmp_path / "config.json").write_text(json.dumps(base | change))
    assert huggingface.read_config(tmp_path).config.rope_theta == theta


def test_import_and_export_keep_every_end_token(tmp_path):
    _write_folder(tmp_path / "hf", HGRN | {"eos_token_id": [2, 5]})
    (tmp_path / "hf/generation_config.json").write_text('{"eos_token_id": 7}')
    assert end_ids(tmp_path / "hf") == (2, 5, 7)
    import_hf(tmp_path / "hf", tmp_path / "ours")
    assert end_ids(tmp_path / "ours") == (2, 5, 7)
    export_hf(tmp_path / "ours", tmp_path / "back")
    for name in ("config.json", "generation_config.json"):
        assert json.loads((tmp_path / "back" / name).read_text())["eos_token_id"] == [2, 5, 7]


def test_a_packed_model_keeps_the_tokens_that_begin_and_end_a_text(tmp_path):
    _write_folder(tmp_path / "hf", HGRN | {"eos_token_id": [2, 5]})
    own = train_bpe(["of the Senate and of the House " * 20], 258)
    own.save(tmp_path / "hf")
    config = tmp_path / "hf/tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"bos_token": None}))
    pack = ["--model", str(tmp_path / "hf"), "--out", str(tmp_path / "packed")]
    assert main(["pack", *pack, "--agreement-prompts", "0"]) == 0
    assert end_ids(tmp_path / "packed") == (2, 5)
    tokenizer = load_tokenizer(tmp_path / "packed")
    assert (tokenizer.bos_id, tokenizer.eos_id) == (None, 1)


@pytest.mark.parametrize("value", ["2", [1, "2"], -1, 2.0, True, [None]])
def test_end_tokens_that_are_no_ids_are_refused(tmp_path, value):
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))
    with pytest.raises(ConfigError, match=r"generation_config.json: eos_token_id is"):
        end_ids(tmp_path)


def test_fields_that_change_nothing_are_passed_over(tmp_path):
    harmless = {
        "_name_or_path": "x",
        "architectures": ["LlamaForCausalLM"],
        "attention_dropout": 0.1,
        "dtype": "bfloat16",
        "eos_token_id": [1, 2],
        "layer_types": ["full_attention", "full_attention"],
        "max_position_embeddings": 99,
        "partial_rotary_factor": 1.0,
        "pretraining_tp": 2,
        "sliding_window": None,
        "something_new": None,
        "torch_dtype": "float16",
        "transformers_version": "4.31.0",
        "use_sliding_window": False,
    }
    file = tmp_path / "config.json"
    file.write_text(json.dumps(LLAMA))
    plain = huggingface.read_config(tmp_path).config
    file.write_text(json.dumps(LLAMA | harmless))
    assert huggingface.read_config(tmp_path).config == plain


def test_export_refuses_what_no_package_computes(tmp_path):
    config = ModelConfig(
        vocab_size=8, hidden_size=16, num_layers=1, intermediate_size=16, glu_linear=DENSE
    )
    params = LanguageModel(config).init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    (tmp_path / "m").mkdir()
    write_model(tmp_path / "m", config, params)
    model, loaded = load_pretrained(tmp_path / "m")
    assert model.config == config
    jax.tree.map(np.testing.assert_array_equal, loaded, params)
    with pytest.raises(ConfigError, match="hybrid"):
        export_hf(tmp_path / "m", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_model_whose_tokenizer_is_damaged_is_not_imported(tmp_path):
    _write_folder(tmp_path / "hf", HGRN)
    (tmp_path / "hf/tokenizer.json").write_bytes(b"\x1f\x8b")
    with pytest.raises(DataError, match=r"hf/tokenizer\.json is not a Hugging Face tokenizer"):
        import_hf(tmp_path / "hf", tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


def test_a_target_that_exists_is_kept(tmp_path):
    _write_folder(tmp_path / "hf", HGRN)
    (tmp_path / "out").mkdir()
    (tmp_path / "out/precious").write_text("x")
    for overwrite in (False, True):
        with pytest.raises(OutputError, match="was not written by `mmfree import-hf`"):
            import_hf(tmp_path / "hf", tmp_path / "out", overwrite=overwrite)
    assert (tmp_path / "out/precious").read_text() == "x"
    (tmp_path / "out/precious").unlink()
    import_hf(tmp_path / "hf", tmp_path / "out")
    with pytest.raises(OutputError, match="pass --overwrite"):
        import_hf(tmp_path / "hf", tmp_path / "out")
    import_hf(tmp_path / "hf", tmp_path / "out", overwrite=True)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        ".mmfree-output.json",
        "model.yaml",
        "params.safetensors",
    ]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf", "out"]


def test_linear_norm_eps_travels(tmp_path):
    _write_folder(tmp_path / "hf", HGRN | {"linear_norm_eps": 1e-8})
    model, _ = load_pretrained(tmp_path / "hf")
    assert model.config.linear_norm_eps == 1e-8
    fields = huggingface.write_config(model.config, dtype="float32")
    assert fields["linear_norm_eps"] == 1e-8
    plain = dataclasses.replace(model.config, linear_norm_eps=1e-6)
    assert "linear_norm_eps" not in huggingface.write_config(plain, dtype="float32")
