"""Patterns of mixers: what they are, what they compute, what they cost."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh

from mmfree_jax.cli.main import main
from mmfree_jax.config import MeshConfig, TrainConfig
from mmfree_jax.errors import ConfigError
from mmfree_jax.export.supported import check_supported
from mmfree_jax.mixer_pattern import period_of
from mmfree_jax.model import LanguageModel, init_state
from mmfree_jax.model.packing import not_packed, pack
from mmfree_jax.model.parameters import param_shapes, unflatten
from mmfree_jax.model.state import cache_places, state_bytes, with_places
from mmfree_jax.model.unstacked import unstack
from mmfree_jax.model.weights import as_weights
from mmfree_jax.model_config import DENSE, ModelConfig
from mmfree_jax.parallel.sharding import AXES, check_divisible
from mmfree_jax.saved import huggingface
from mmfree_jax.train.flops import count_flops, count_parameters
from mmfree_jax.train.memory import estimate_memory
from mmfree_jax.train.same_run import other_model

M, A = "mlgru", "attention"
SIZES = {"vocab_size": 41, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2}
FLOAT = ModelConfig(
    mixer="mlgru:2,attention", num_layers=6, mixer_linear=DENSE, glu_linear=DENSE,
    head_linear=DENSE, compute_dtype="float32", residual_dtype="float32", **SIZES,
)  # fmt: skip


@pytest.mark.parametrize(
    ("text", "layers", "canonical", "period"),
    [
        ("mlgru:3,attention", 8, "mlgru:3,attention", (M, M, M, A)),
        (" mlgru , mlgru:2, attention:1", 4, "mlgru:3,attention", (M, M, M, A)),
        ("mlgru,attention,mlgru,attention", 4, "mlgru,attention", (M, A)),
        ("mlgru:5", 6, "mlgru", (M,)),
        # Cut off at the depth, which makes all layers one period.
        ("attention,mlgru:2", 7, "attention,mlgru:2", (A, M, M, A, M, M, A)),
    ],
)
def test_one_model_has_one_text(text, layers, canonical, period):
    config = ModelConfig(mixer=text, num_layers=layers)
    assert (config.mixer, config.period) == (canonical, period)
    assert len(config.layer_mixers) == layers
    assert config.recurrent == (A not in period)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mixer": "mlgru:3,atention"}, "is 'mlgru:3,atention': choose one of mlgru, attention,"),
        ({"mixer": "mlgru:3,"}, "a pattern of layers such as mlgru:3,attention"),
        ({"mixer": "mlgru*3,attention"}, "choose one of mlgru"),
        ({"mixer": "mlgru:0,attention"}, "write a number of layers behind mlgru:"),
        ({"mixer": "mlgru:,attention"}, "write a number of layers behind mlgru:"),
        ({"mixer": "mlgru:99999"}, "set at most 10,000 layers"),
        ({"mixer": "mlgru:4,attention", "num_layers": 4}, "num_layers is 4: mixer mlgru:4,attent"),
        ({"float_attention": True}, "float_attention is True: mixer mlgru is no pattern"),
        ({"mixer": "mlgru,attention", "num_kv_heads": 3}, "num_kv_heads is 3: set"),
        ({"mixer": "rwkv4,attention", "candidate": "tanh"}, "candidate is 'tanh': it is the MLGRU"),
    ],
)
def test_malformed_patterns_are_told_of(changes, message):
    with pytest.raises(ConfigError, match=rf"model\..*{message}"):
        ModelConfig(**changes)


def loss_by_equations(p, tokens, ids):
    """`FLOAT` written out: what each token has of the logits of the next, summed."""

    def norm(x, scale):
        return x / jnp.sqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6) * scale

    def sigmoid(x):
        return 1 / (1 + jnp.exp(-x))

    def silu(x):
        return x * sigmoid(x)

    def mlgru(q, bound, u):
        i, f, g = (u @ q[f"{name}_proj"]["weight"].T for name in "ifg")
        f = bound + (1 - bound) * sigmoid(f)
        h, out = jnp.zeros_like(f[:, 0]), []
        for t in range(u.shape[1]):
            fresh = t == 0 or ids[:, t, None] != ids[:, t - 1, None]
            h = jnp.where(fresh, 0, h) * f[:, t] + (1 - f[:, t]) * silu(i[:, t])
            out.append(h)
        gated = norm(g, q["gate_norm"]["scale"]) * silu(jnp.stack(out, axis=1))
        return gated @ q["o_proj"]["weight"].T

    def attention(q, u):
        B, T, _ = u.shape
        angle = jnp.arange(T)[:, None] * 10_000.0 ** (-jnp.arange(4) / 4)

        def turn(x):
            a, b = x[..., :4], x[..., 4:]
            cos, sin = jnp.cos(angle)[:, None], jnp.sin(angle)[:, None]
            return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)

        query, key, value = ((u @ q[f"{n}_proj"]["weight"].T).reshape(B, T, 2, 8) for n in "qkv")
        scores = jnp.einsum("bthk,bshk->bhts", turn(query), turn(key)) / np.sqrt(8)
        seen = np.tril(np.ones((T, T), bool)) & (ids[:, :, None] == ids[:, None])
        shares = jax.nn.softmax(jnp.where(seen[:, None], scores, -jnp.inf), axis=-1)
        out = jnp.einsum("bhts,bshk->bthk", shares, value).reshape(B, T, 16)
        return out @ q["o_proj"]["weight"].T

    bounds = jnp.cumsum(jax.nn.softmax(p["lower_bounds"], axis=0), axis=0)
    bounds = bounds - bounds[0]
    x, mlgrus = p["embedding"]["weight"][tokens], 0
    for layer in range(6):
        q = jax.tree.map(lambda w, layer=layer: w[layer // 3], p["blocks"][f"layer{layer % 3}"])
        u = norm(x, q["mixer_norm"]["scale"])
        if layer % 3 == 2:
            x = x + attention(q["mixer"], u)
        else:
            x, mlgrus = x + mlgru(q["mixer"], bounds[mlgrus], u), mlgrus + 1
        u = norm(x, q["glu_norm"]["scale"]) @ q["glu"]["gate_up_proj"]["weight"].T
        x = x + (silu(u[..., :16]) * u[..., 16:]) @ q["glu"]["down_proj"]["weight"].T
    logits = norm(x, p["final_norm"]["scale"]) @ p["head"]["weight"].T
    return jnp.sum(jnp.sin(logits))


def test_a_hybrid_is_its_equations_with_all_gradients():
    """Scanned with blocks that are made again, and unrolled with all kept."""
    rng = np.random.default_rng(2)
    tokens = rng.integers(0, 41, (2, 7), dtype=np.int32)
    ids = np.asarray([[1, 1, 1, 2, 2, 2, 2], [1, 1, 2, 3, 3, 3, 3]], np.int32)
    p = jax.tree.map(
        lambda x: jnp.asarray(rng.normal(size=x.shape) * 0.3 + (x.ndim < 3), jnp.float32),
        unflatten(param_shapes(FLOAT)),
    )
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda x: jnp.asarray(np.asarray(x, np.float64)), p)
        of_equations = jax.jit(jax.value_and_grad(lambda p: loss_by_equations(p, tokens, ids)))
        expected = jax.tree.map(np.asarray, of_equations(wide))

    def ours(p, model):
        return jnp.sum(jnp.sin(model.apply({"params": p}, tokens, jnp.asarray(ids))))

    for changes in ({"remat": "gates"}, {"remat": "none", "scan_layers": False}):
        model = LanguageModel(dataclasses.replace(FLOAT, **changes))
        found = jax.jit(jax.value_and_grad(ours), static_argnums=1)(p, model)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-4), found, expected
        )


def test_layers_by_themselves_and_float_attention_in_a_pattern_that_is_cut_off():
    config = ModelConfig(
        mixer="mlgru,attention", num_layers=3, float_attention=True, remat="none",
        compute_dtype="float32", residual_dtype="float32", **SIZES,
    )  # fmt: skip
    shapes = param_shapes(config)
    assert shapes["blocks/layer0/mixer/i_proj/norm_scale"].shape == (1, 16)
    assert "blocks/layer1/mixer/q_proj/norm_scale" not in shapes
    assert shapes["lower_bounds"].shape == (2, 16)  # of the MLGRUs alone
    model, tokens = LanguageModel(config), jnp.asarray([[5, 1, 7, 3, 2]])
    weights = as_weights(jax.jit(model.init)(jax.random.key(0), tokens)["params"], config)
    assert "mixer" not in weights.ternary["blocks"]["layer1"]
    expected = jax.jit(model.apply)(weights, tokens)
    apart = unstack(weights, config)
    logits, state = jax.jit(lambda w, s: model.apply(w, tokens, s, method="decode"))(
        apart, init_state(config, 1, 8)
    )
    np.testing.assert_allclose(logits, expected[:, -1], atol=1e-5)
    assert set(state.layers) == {"layer0", "layer1", "layer2"}
    assert cache_places(with_places(state.layers, config, 5), config) == 5
    assert not_packed(config) == ["model.float_attention"]
    with pytest.raises(ConfigError, match=r"hybrid that cannot run packed for its model\.float_at"):
        pack(weights, config)


def test_parameters_operations_and_state_by_hand():
    sizes = {"vocab_size": 100, "hidden_size": 16, "num_layers": 8, "intermediate_size": 24}
    config = ModelConfig(mixer="mlgru:3,attention", num_heads=2, float_attention=True, **sizes)
    counted = count_parameters(config)
    # Four matrices each; six lower bounds.
    assert counted.mixer == 8 * 4 * 256 + 6 * 16
    assert counted.ternary == 6 * 4 * 256 + 8 * 3 * 16 * 24 + 1600
    # Block norms, BitLinears' own, the MLGRUs' gate norms, the last and the head's.
    assert counted.norms == 8 * (32 + 16 + 24) + 6 * (4 * 16 + 16) + 16 + 16
    flops = count_flops(config, seq_len=9)
    assert flops.mixer == 2 * 8 * 4 * 256
    # The first MLGRU has no lower bound; attention reads five keys of nine on average.
    assert flops.mixing == 16 * (10 + 5 * 12) + 2 * 4 * 16 * 5
    # Six states in float32; of two layers where a document begins, keys and values in bfloat16.
    assert state_bytes(config) == (6 * 16 * 4 + 2 * 4, 2 * 2 * 16 * 2)
    assert state_bytes(dataclasses.replace(config, mixer="mlgru", float_attention=False))[1] == 0
    assert config.family == "hybrid"


def test_memory_of_what_is_kept_is_each_layers_own():
    def kept(mixer):
        model = ModelConfig(mixer=mixer, num_layers=8, hidden_size=64, remat="none")
        config = TrainConfig(model=model, batch_size=8)
        return estimate_memory(config, MeshConfig(data=1)).activations

    assert kept("mlgru") != kept("attention")
    assert kept("mlgru:3,attention") == 0.75 * kept("mlgru") + 0.25 * kept("attention")


def test_what_takes_no_pattern_says_so(tmp_path):
    model = ModelConfig(mixer="mlgru:3,attention", num_layers=4)
    config = TrainConfig(model=model, batch_size=8)
    with pytest.raises(ConfigError, match=r"num_heads is 16: set --mesh\.tensor to a divisor"):
        check_divisible(config, AbstractMesh((1, 1, 1, 64), AXES))
    with pytest.raises(ConfigError, match=r"mlgru:3,attention needs whole rows; set --mesh\.s"):
        check_divisible(config, AbstractMesh((1, 1, 8, 1), AXES))
    with pytest.raises(ConfigError, match=r"model\.mixer is 'mlgru:3,attention': only MatMul-"):
        check_supported(model)
    with pytest.raises(ConfigError, match=r"hybrid \(mixer 'mlgru:3,attention'"):
        huggingface.write_config(model, dtype="float32")


def test_another_text_of_the_same_model_is_no_other_model():
    there = dataclasses.replace(FLOAT, mixer="mlgru,mlgru:1,attention")
    assert other_model(there, FLOAT) == []
    assert other_model(there, dataclasses.replace(FLOAT, mixer="mlgru,attention")) == [
        "model.mixer is 'mlgru,attention', there 'mlgru:2,attention'"
    ]
    assert period_of(FLOAT.mixer) == (M, M, A)


def test_info_tells_the_pattern_and_the_state(capsys):
    argv = ["info", "--preset", "tiny", "--model.mixer", "mlgru,attention", "--devices", "1"]
    assert main(argv) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "hybrid: 2 layers (mlgru,attention)" in shown
    assert "state of a row: 0.3 KiB and 0.5 KiB a token" in shown
    assert main([*argv[:3], "--model.mixer", "mlgru:9,attention"]) == 2
    assert "model.num_layers is 2: mixer mlgru:9,attention has 10 layers" in capsys.readouterr().err
