"""Parameter, operation and memory counts against hand counts and the compiler."""

import dataclasses
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from mmfree_jax.config import MeshConfig
from mmfree_jax.errors import ConfigError
from mmfree_jax.model import LanguageModel
from mmfree_jax.model.parameters import param_shapes, unflatten
from mmfree_jax.model.weights import training_weights
from mmfree_jax.model_config import DENSE, ModelConfig
from mmfree_jax.parallel.sharding import make_mesh
from mmfree_jax.presets import PRESETS, preset
from mmfree_jax.train.flops import count_flops, count_parameters, find_device, utilisation
from mmfree_jax.train.memory import (
    _block_bytes_per_token,
    check_fits,
    device_memory,
    estimate_memory,
)


@pytest.mark.parametrize(("name", "billions"), [("370M", 0.374), ("1.3B", 1.364), ("2.7B", 2.70)])
def test_paper_sizes(name, billions):
    """The parameter counts that the authors publish."""
    total = count_parameters(preset(name).model).total / 1e9
    assert total == pytest.approx(billions, rel=2e-3)


def test_components_by_hand():
    config = ModelConfig(vocab_size=100, hidden_size=16, num_layers=3, intermediate_size=24)
    counted = count_parameters(config)
    assert counted.embedding == counted.head == 1600
    assert counted.mixer == 3 * (4 * 256 + 16)
    assert counted.glu == 3 * 3 * 16 * 24
    # two block norms and the gate's; four inputs of the mixer; gate_up's and down's input
    assert counted.norms == 3 * (3 * 16 + 4 * 16 + 16 + 24) + 16 + 16
    assert counted.ternary == 3 * 1024 + 3 * 1152 + 1600
    assert counted.non_embedding == counted.total - 3200
    dense = dataclasses.replace(config, glu_linear=DENSE)
    assert count_parameters(dense).ternary == 3 * 1024 + 1600
    assert count_parameters(config).norms - count_parameters(dense).norms == 3 * (16 + 24)


@pytest.mark.parametrize("name", ["tiny", "tiny-transformer"])
def test_counts_are_those_of_the_model(name):
    model = pytest.importorskip("mmfree_jax.train.step")
    config = preset(name)
    for change in (
        {},
        {"use_lower_bound": False},
        {"head_linear": DENSE},
        {"glu_linear": DENSE},
        {"attention_bias": "qkv", "head_dim": 24},
        {"attention_bias": "qkvo", "head_dim": 24, "num_heads": 4, "num_kv_heads": 2},
        {"qk_norm": True, "head_dim": 24},
    ):
        changed = dataclasses.replace(config, model=dataclasses.replace(config.model, **change))
        from mmfree_jax.train.optimizer import make_optimizer

        optimizer = make_optimizer(config.optimizer)
        state = jax.eval_shape(
            lambda key, c=changed, o=optimizer: model.init_state(c, o, key), jax.random.key(0)
        )
        counted = count_parameters(changed.model)
        params = state.params
        assert counted.total == sum(x.size for x in jax.tree.leaves(params))
        assert counted.embedding == params["embedding"]["weight"].size
        assert counted.glu == sum(x["weight"].size for x in params["blocks"]["glu"].values())


def test_flops_by_hand():
    config = ModelConfig(vocab_size=100, hidden_size=16, num_layers=3, intermediate_size=24)
    flops = count_flops(config, seq_len=8)
    assert flops.mixer == 2 * 3 * 4 * 256
    assert flops.glu == 2 * 3 * 3 * 16 * 24
    assert flops.head == 2 * 1600
    assert flops.mixing == 16 * (10 + 12 + 12)
    assert flops.training == 3 * flops.forward
    attention = dataclasses.replace(config, mixer="attention")
    # A causal row of 8 has 36 pairs; 2 d for the score and 2 d for the sum of each.
    assert count_flops(attention, seq_len=8).mixing == pytest.approx(3 * 36 * 4 * 16 / 8)
    # Queries of 4 heads of 10 channels, keys and values of 2.
    heads = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 10, "attention_bias": "qkvo"}
    wider = count_flops(dataclasses.replace(attention, **heads), seq_len=8)
    assert wider.mixer == 2 * 3 * 16 * (40 + 20 + 20 + 40)
    assert wider.mixing == pytest.approx(3 * 36 * 4 * 40 / 8)


@pytest.mark.parametrize("name", ["370M", "1.3B", "1.3B-transformer"])
def test_training_flops_are_about_six_per_matrix_parameter(name):
    config = preset(name)
    parameters = count_parameters(config.model)
    flops = count_flops(config.model, 2048)
    products = flops.training - 3 * flops.mixing
    matrices = parameters.total - parameters.embedding - parameters.norms
    assert products == pytest.approx(6 * matrices, rel=1e-3)


@pytest.mark.parametrize(
    ("kind", "tera"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989.4),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA B200", 2250),
        ("TPU v4", 275),
        ("TPU v5 lite", 197),
        ("TPU v5p", 459),
        ("TPU v6 lite", 918),
    ],
)
def test_device_table(kind, tera):
    device = find_device(kind)
    assert device is not None
    assert device.bf16_flops == tera * 1e12


def test_unknown_devices_have_no_utilisation():
    model = preset("370M").model
    assert utilisation(model, 2048, 1e5, "cpu", 1) is None
    known = utilisation(model, 2048, 1e5, "NVIDIA H100 80GB HBM3", 2)
    assert known == pytest.approx(count_flops(model, 2048).training * 1e5 / (2 * 989.4e12))


def test_memory_splits_over_the_mesh():
    config = dataclasses.replace(preset("1.3B"), batch_size=8)
    one = estimate_memory(config, MeshConfig(data=1))
    fsdp = estimate_memory(config, MeshConfig(data=1, fsdp=8))
    data = estimate_memory(config, MeshConfig(data=8))
    assert fsdp.parameters == one.parameters / 8
    assert data.optimizer == one.optimizer == 8 * count_parameters(config.model).total
    assert fsdp.activations == data.activations == one.activations / 8
    with pytest.raises(ConfigError, match=r"multiple of mesh\.data x mesh\.fsdp"):
        estimate_memory(config, MeshConfig(data=3))
    with pytest.raises(ConfigError, match=r"mesh\.data"):
        estimate_memory(config, MeshConfig())


def test_remat_saves_memory():
    sizes = {}
    for remat in ("none", "dots", "full"):
        config = preset("370M")
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, remat=remat))
        sizes[remat] = estimate_memory(config, MeshConfig(data=1)).activations
    assert sizes["full"] < sizes["dots"] < sizes["none"]


@pytest.mark.parametrize(
    ("mixer", "remat", "channels"),
    [
        # Beside the block's input and the stream, both float32 of 64: what the names say.
        ("mlgru", "gated", 2 * 64),
        ("attention", "gates", 0),
        ("rwkv4", "gates", 4 * 64),
        ("mingru", "gates", 3 * 64),
        ("rglru", "states", 64),
        ("rglru", "gates", 5 * 64),
        ("hgrn2", "gates", 4 * 64),
        ("attention", "projections", 3 * 64 + 320),
    ],
)
def test_what_is_kept_of_a_layer_is_what_is_counted(mixer, remat, channels, capsys):
    config = dataclasses.replace(
        preset("tiny").model, mixer=mixer, remat=remat, hidden_size=64, intermediate_size=160,
        vocab_size=96, num_layers=2,
    )  # fmt: skip
    counted = _block_bytes_per_token(config, mixer)[remat]
    assert counted == 4 * (64 + 64 + channels)

    def total(params, tokens):
        weights = training_weights(params, config)
        return LanguageModel(config).apply(weights, tokens, method="hidden")[0].sum()

    tokens = jax.ShapeDtypeStruct((2, 96), jnp.int32)
    jax.ad_checkpoint.print_saved_residuals(total, unflatten(param_shapes(config)), tokens)
    # Stacked over two layers; narrower ones are a norm's few scalars.
    shapes = re.findall(r"^f32\[2,2,96,(\d+)\]", capsys.readouterr().out, re.MULTILINE)
    assert 4 * sum(size for size in map(int, shapes) if size >= 64) == counted


@pytest.mark.parametrize(("name", "planned"), [("370M", 8.66), ("1.3B", 23.16)])
def test_memory_is_near_the_compilers_plan(name, planned):
    # `planned`: GiB of arguments and scratch of the step compiled for one H100 (jax 0.11.2).
    config = dataclasses.replace(preset(name), batch_size=8)
    total = estimate_memory(config, MeshConfig(data=1)).total / 2**30
    assert total == pytest.approx(planned, rel=0.1)


def test_every_preset_is_counted():
    for name, config in PRESETS.items():
        assert count_parameters(config.model).total > 0, name
        assert estimate_memory(config, MeshConfig(data=1)).total > 0, name


@pytest.mark.parametrize(
    ("changes", "model"),
    [({"batch_size": 10**9}, {}), ({}, {"hidden_size": 10**8}), ({}, {"vocab_size": 2**31 - 1})],
)
def test_what_is_far_from_fitting_is_refused(changes, model):
    mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
    tiny = preset("tiny")
    check_fits(tiny, mesh)
    config = dataclasses.replace(tiny, model=dataclasses.replace(tiny.model, **model), **changes)
    with pytest.raises(ConfigError, match=r"needs about [\d,]+ GiB on each device, which has"):
        check_fits(config, mesh)


def test_a_cpu_has_no_more_than_the_process_may_take():
    assert 2**30 < device_memory(jax.devices()[0]) < 2**50
    code = (
        "import resource, jax; from mmfree_jax.train.memory import device_memory;"
        "resource.setrlimit(resource.RLIMIT_AS, (12 << 30, 12 << 30));"
        "assert device_memory(jax.devices()[0]) <= 12 << 30"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
