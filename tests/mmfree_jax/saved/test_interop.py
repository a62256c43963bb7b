"""Hugging Face folders: round trips, equations of the parts that releases do not use, refusals."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hf_folders import HGRN, LLAMA, write_folder
from jax.sharding import PartitionSpec as P
from safetensors.numpy import load_file, save_file

from mmfree_jax.cli.main import main
from mmfree_jax.config import MeshConfig
from mmfree_jax.data.tokenizer import load_tokenizer
from mmfree_jax.data.train_bpe import train_bpe
from mmfree_jax.errors import CheckpointError, ConfigError
from mmfree_jax.model import LanguageModel
from mmfree_jax.parallel.sharding import make_mesh
from mmfree_jax.saved import huggingface
from mmfree_jax.saved.convert import export_hf, import_hf
from mmfree_jax.saved.end_tokens import end_ids
from mmfree_jax.saved.pretrained import load_pretrained

TOKENS = np.arange(14, dtype=np.int32).reshape(2, 7)


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
    tensors = write_folder(tmp_path / "hf", CONFIGS[kind], shards=2)
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
        tensors = write_folder(folder / "hf", HGRN, dtype=dtype)
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
    tensors = write_folder(tmp_path / "hf", config)
    model, params = load_pretrained(tmp_path / "hf")
    logits = model.apply({"params": params}, TOKENS)
    for row in range(2):
        want = _hgrn(tensors, config, TOKENS[row])
        # A rounding that falls the other way in float32 moves a logit by a percent or so.
        assert np.linalg.norm(logits[row] - want) / np.linalg.norm(want) < 2e-2
        assert np.mean(np.abs(logits[row] - want) < 1e-4 * np.abs(want).max()) > 0.5


def test_short_convolution_goes_on_from_its_state(tmp_path):
    write_folder(tmp_path / "hf", HGRN | {"use_short_conv": True})
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
    write_folder(tmp_path / "hf", CONFIGS[kind], shards=2)
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    _, alone = load_pretrained(tmp_path / "hf")
    _, shared = load_pretrained(tmp_path / "hf", mesh=mesh)
    jax.tree.map(np.testing.assert_array_equal, alone, shared)
    weight = shared["blocks"]["glu"]["gate_up_proj"]["weight"]
    assert weight.sharding.spec == P(None, "tensor", "fsdp")
    assert weight.addressable_shards[0].data.size == weight.size // 4


def test_a_mesh_that_does_not_divide_is_refused(tmp_path):
    write_folder(tmp_path / "hf", HGRN | {"vocab_size": 31})
    with pytest.raises(ConfigError, match=r"embedding/weight has 31 .* mesh.tensor \(2\)"):
        load_pretrained(tmp_path / "hf", mesh=make_mesh(MeshConfig(tensor=2)))


def test_compute_dtype(tmp_path):
    write_folder(tmp_path / "hf", HGRN)
    model, _ = load_pretrained(tmp_path / "hf")
    assert model.config.compute_dtype == "float32"
    model, params = load_pretrained(tmp_path / "hf", compute_dtype=jnp.bfloat16)
    assert (model.config.compute_dtype, model.config.residual_dtype) == ("bfloat16",) * 2
    assert model.apply({"params": params}, TOKENS).dtype == jnp.float32
    with pytest.raises(ConfigError, match="compute_dtype is 'int8'"):
        load_pretrained(tmp_path / "hf", compute_dtype="int8")


def test_a_tied_head_is_a_copy(tmp_path):
    tensors = write_folder(tmp_path / "hf", LLAMA)
    del tensors["lm_head.weight"]
    save_file(tensors, tmp_path / "hf/model.safetensors")
    (tmp_path / "hf/config.json").write_text(json.dumps(LLAMA | {"tie_word_embeddings": True}))
    _, params = load_pretrained(tmp_path / "hf")
    np.testing.assert_array_equal(params["head"]["weight"], params["embedding"]["weight"])
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    save_file(tensors, tmp_path / "hf/model.safetensors")
    load_pretrained(tmp_path / "hf")
    tensors["lm_head.weight"][3, 0] += 1
    save_file(tensors, tmp_path / "hf/model.safetensors")
    with pytest.raises(CheckpointError, match=r"lm_head.weight differs from model.embed_tokens"):
        load_pretrained(tmp_path / "hf")


def test_import_and_export_keep_every_end_token(tmp_path):
    write_folder(tmp_path / "hf", HGRN | {"eos_token_id": 7})
    assert end_ids(tmp_path / "hf") == (7,)
    (tmp_path / "hf/generation_config.json").write_text('{"eos_token_id": [2, 5]}')
    assert end_ids(tmp_path / "hf") == (2, 5)
    import_hf(tmp_path / "hf", tmp_path / "ours")
    assert end_ids(tmp_path / "ours") == (2, 5)
    export_hf(tmp_path / "ours", tmp_path / "back")
    for name in ("config.json", "generation_config.json"):
        assert json.loads((tmp_path / "back" / name).read_text())["eos_token_id"] == [2, 5]


def test_a_packed_model_keeps_the_tokens_that_begin_and_end_a_text(tmp_path):
    write_folder(tmp_path / "hf", HGRN | {"eos_token_id": [2, 5], "vocab_size": 258})
    own = train_bpe(["of the Senate and of the House " * 20], 258)
    own.save(tmp_path / "hf")
    config = tmp_path / "hf/tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"bos_token": None}))
    pack = ["--model", str(tmp_path / "hf"), "--out", str(tmp_path / "packed")]
    assert main(["pack", *pack, "--agreement-prompts", "0"]) == 0
    assert end_ids(tmp_path / "packed") == (2, 5)
    tokenizer = load_tokenizer(tmp_path / "packed")
    assert (tokenizer.bos_id, tokenizer.eos_id) == (None, 1)


def test_linear_norm_eps_travels(tmp_path):
    write_folder(tmp_path / "hf", HGRN | {"linear_norm_eps": 1e-8})
    model, _ = load_pretrained(tmp_path / "hf")
    assert model.config.linear_norm_eps == 1e-8
    fields = huggingface.write_config(model.config, dtype="float32")
    assert fields["linear_norm_eps"] == 1e-8
    plain = dataclasses.replace(model.config, linear_norm_eps=1e-6)
    assert "linear_norm_eps" not in huggingface.write_config(plain, dtype="float32")
