"""Folders of llama and its kin: their equations in float64, their names written out, refusals.

`tests/interop_torch/test_imports.py` compares with transformers itself.
"""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mmfree_jax.errors import ConfigError
from mmfree_jax.model import rope
from mmfree_jax.saved import huggingface
from mmfree_jax.saved.convert import export_hf, import_hf
from mmfree_jax.saved.pretrained import load_pretrained

LLAMA = {
    "model_type": "llama",
    "vocab_size": 32,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "intermediate_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500.0,
}
MISTRAL = LLAMA | {"model_type": "mistral", "head_dim": 6, "sliding_window": None}
QWEN2 = LLAMA | {"model_type": "qwen2"}
QWEN3 = LLAMA | {"model_type": "qwen3", "head_dim": 6}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 8192}  # fmt: skip
TOKENS = np.arange(14, dtype=np.int32).reshape(2, 7)


def write_folder(folder, config, biases=""):
    """A folder of random weights, named and shaped as transformers does; returns the tensors."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    width, m, vocab = (config[f"{n}_size"] for n in ("hidden", "intermediate", "vocab"))
    channels = config.get("head_dim", width // config["num_attention_heads"])
    queries, keys = (config[f"num_{n}_heads"] * channels for n in ("attention", "key_value"))
    shapes = {"model.embed_tokens.weight": (vocab, width), "lm_head.weight": (vocab, width),
              "model.norm.weight": (width,)}  # fmt: skip
    for layer in range(config["num_hidden_layers"]):
        p = f"model.layers.{layer}."
        shapes |= {f"{p}self_attn.q_proj.weight": (queries, width),
                   f"{p}self_attn.k_proj.weight": (keys, width),
                   f"{p}self_attn.v_proj.weight": (keys, width),
                   f"{p}self_attn.o_proj.weight": (width, queries),
                   f"{p}mlp.gate_proj.weight": (m, width),
                   f"{p}mlp.up_proj.weight": (m, width),
                   f"{p}mlp.down_proj.weight": (width, m),
                   f"{p}input_layernorm.weight": (width,),
                   f"{p}post_attention_layernorm.weight": (width,)}  # fmt: skip
        sizes = {"q": queries, "k": keys, "v": keys, "o": width}
        shapes |= {f"{p}self_attn.{n}_proj.bias": (sizes[n],) for n in biases}
        if config["model_type"] == "qwen3":
            shapes |= {f"{p}self_attn.{n}_norm.weight": (channels,) for n in "qk"}
    rng = np.random.default_rng(0)
    tensors = {
        name: (rng.normal(size=shape) * 0.3 + ("norm" in name)).astype(np.float32)
        for name, shape in shapes.items()
    }
    save_file(tensors, folder / "model.safetensors")
    return tensors


def norm(x, weight, eps):
    return x / np.sqrt(np.mean(x * x, -1, keepdims=True) + eps) * weight


def equations(tensors, config, tokens):
    """The model in float64, one sequence."""
    t = {name: x.astype(np.float64) for name, x in tensors.items()}
    eps, heads, groups = config["rms_norm_eps"], 4, config["num_key_value_heads"]
    x = t["model.embed_tokens.weight"][tokens]
    T, D = x.shape
    K = config.get("head_dim", D // heads)
    angle = np.arange(T)[:, None] * config["rope_theta"] ** (-np.arange(0, K, 2) / K)
    cos, sin = (np.concatenate([f(angle)] * 2, -1)[:, None] for f in (np.cos, np.sin))

    def rotate(y):
        half = np.concatenate([-y[..., K // 2 :], y[..., : K // 2]], -1)
        return y * cos + half * sin

    def linear(name, y):
        return y @ t[f"{name}.weight"].T + t.get(f"{name}.bias", 0.0)

    for i in range(config["num_hidden_layers"]):
        p = f"model.layers.{i}."
        h = norm(x, t[p + "input_layernorm.weight"], eps)
        q, k, v = (linear(f"{p}self_attn.{n}_proj", h).reshape(T, -1, K) for n in "qkv")
        if config["model_type"] == "qwen3":  # over each head
            q, k = (
                norm(y, t[f"{p}self_attn.{n}_norm.weight"], eps) for n, y in (("q", q), ("k", k))
            )
        q, k = rotate(q), rotate(k)
        k, v = (np.repeat(y, heads // groups, axis=1) for y in (k, v))
        scores = np.einsum("thk,shk->hts", q, k) / np.sqrt(K)
        scores = np.where(np.tri(T, dtype=bool), scores, -np.inf)
        share = np.exp(scores - scores.max(-1, keepdims=True))
        share /= share.sum(-1, keepdims=True)
        mixed = np.einsum("hts,shk->thk", share, v).reshape(T, heads * K)
        x = x + linear(p + "self_attn.o_proj", mixed)
        h = norm(x, t[p + "post_attention_layernorm.weight"], eps)
        gate, up = (linear(f"{p}mlp.{n}_proj", h) for n in ("gate", "up"))
        x = x + linear(p + "mlp.down_proj", gate / (1 + np.exp(-gate)) * up)
    return norm(x, t["model.norm.weight"], eps) @ t["lm_head.weight"].T


@pytest.mark.parametrize(
    ("config", "biases", "exported"),
    [
        (LLAMA | {"attention_bias": True}, "qkvo", "llama"),
        (MISTRAL, "", "llama"),
        (QWEN2, "qkv", "qwen2"),
        (QWEN3, "", "qwen3"),
    ],
    ids=["llama", "mistral", "qwen2", "qwen3"],
)
def test_a_folder_computes_its_equations_and_comes_back(tmp_path, config, biases, exported):
    tensors = write_folder(tmp_path / "hf", config, biases)
    model, params = load_pretrained(tmp_path / "hf")
    logits = model.apply({"params": params}, TOKENS)
    for row in range(2):
        want = equations(tensors, config, TOKENS[row])
        np.testing.assert_allclose(logits[row], want, rtol=2e-4, atol=2e-4)
    assert import_hf(tmp_path / "hf", tmp_path / "ours").model_type == config["model_type"]
    assert export_hf(tmp_path / "ours", tmp_path / "back").model_type == exported
    back = load_file(tmp_path / "back/model.safetensors")
    assert back.keys() == tensors.keys()
    for name, x in back.items():
        np.testing.assert_array_equal(x, tensors[name], err_msg=name)
    assert huggingface.read_config(tmp_path / "back").config == model.config


@pytest.mark.parametrize(
    ("base", "change", "named"),
    [
        (LLAMA, {"head_dim": 7}, "head_dim is 7: set --model.head-dim to an even number"),
        (LLAMA, {"attention_bias": "yes"}, "attention_bias is 'yes'"),
        (MISTRAL, {"attention_bias": True}, "attention_bias is True"),
        (MISTRAL, {"sliding_window": 4096, "max_position_embeddings": 4097},
         r"sliding_window is 4096: .* shorter than max_position_embeddings \(4097\)"),
        (QWEN2, {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
         "sliding_window is 8"),
        (QWEN2, {"mlp_bias": True}, "mlp_bias is True"),
        (LLAMA, {"rope_scaling": LLAMA3 | {"low_freq_factor": 4}}, "high_freq_factor is 4.0: set"),
        (LLAMA, {"rope_scaling": LLAMA3 | {"attention_factor": 2}}, "rope_scaling is"),
        (LLAMA, {"rope_scaling": LLAMA3, "rope_parameters": {"rope_theta": 500.0}},
         "rope_parameters is .* and rope_scaling is .*: make them one value"),
    ],
)  # fmt: skip
def test_what_is_not_computed_is_refused(tmp_path, base, change, named):
    (tmp_path / "config.json").write_text(json.dumps(base | change))
    with pytest.raises(ConfigError, match=named):
        huggingface.read_config(tmp_path)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        # Published (Llama 3.1): base 500,000, 128 channels. Of 64 pairs: the first is left, the
        # last divided by 8; pair 32 turns 8192 / (2 pi 500000^(1/2)) = 1.84384 times, so that
        # (1.84384 - 1) / 3 = 0.281280 of it is left and the rest divided.
        ({"rope_scaling": LLAMA3}, {0: 1.0, 32: 0.281280 + 0.718720 / 8, 63: 1 / 8}),
        ({"rope_parameters": LLAMA3 | {"rope_theta": 500_000.0}}, {28: 1.0, 35: 1 / 8}),
        ({"rope_scaling": {"type": "linear", "factor": 2.5}}, {0: 0.4, 32: 0.4, 63: 0.4}),
        ({"rope_scaling": None}, {0: 1.0, 63: 1.0}),
    ],
)
def test_frequencies_are_the_published_ones(tmp_path, change, expected):
    config = LLAMA | {"rope_theta": 500_000.0, "head_dim": 128} | change
    (tmp_path / "config.json").write_text(json.dumps(config))
    c = huggingface.read_config(tmp_path).config
    found = rope.frequencies(c.head_channels, theta=c.rope_theta, scaling=c.rope_scaling)
    for pair, share in expected.items():
        assert found[pair] == pytest.approx(share * 500_000.0 ** (-pair / 64), rel=2e-5)


def test_a_window_longer_than_every_row_is_none(tmp_path):
    for config in (
        MISTRAL | {"sliding_window": 4096, "max_position_embeddings": 4096},
        QWEN2 | {"use_sliding_window": False, "sliding_window": 8, "max_window_layers": 0},
        QWEN2 | {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2},
    ):
        (tmp_path / "config.json").write_text(json.dumps(config))
        assert huggingface.read_config(tmp_path).config.mixer == "attention"
    left_out = {k: v for k, v in MISTRAL.items() if k != "sliding_window"}
    (tmp_path / "config.json").write_text(json.dumps(left_out))
    with pytest.raises(ConfigError, match="sliding_window is 4096"):  # transformers' default
        huggingface.read_config(tmp_path)
