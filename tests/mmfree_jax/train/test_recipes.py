"""Recipes that change over a run: float first, quantisers that set in, stages of rate and decay."""

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from initial_params import initial_params
from whole_runs import replace, stop_at

from mmfree_jax.config import MeshConfig, OptimizerConfig, TrainConfig, replace_model
from mmfree_jax.config_io import from_dict, to_dict
from mmfree_jax.errors import ConfigError
from mmfree_jax.model import LanguageModel
from mmfree_jax.model.quantize import linear
from mmfree_jax.model.training_forms import config_of_form, weights_of_form
from mmfree_jax.model_config import BITLINEAR, DENSE, ModelConfig
from mmfree_jax.parallel.sharding import make_mesh
from mmfree_jax.presets import preset
from mmfree_jax.quantizer_config import AT_ONCE, QuantizerConfig
from mmfree_jax.saved.checkpoint import restore
from mmfree_jax.saved.history import read_history
from mmfree_jax.train.branch_source import branch_config
from mmfree_jax.train.loss import loss_sums
from mmfree_jax.train.optimizer import make_optimizer
from mmfree_jax.train.same_run import check_same_run
from mmfree_jax.train.schedule import make_schedule, schedule_values
from mmfree_jax.train.setup import open_run
from mmfree_jax.train.step import abstract_state, eval_step, init_sharded, train_step
from mmfree_jax.train.training import train

CONSTANT = OptimizerConfig(schedule="constant")
THREE_FORMS = QuantizerConfig(float_fraction=0.25, warmup_fraction=0.25)


def test_the_steps_of_each_form():
    forms = [THREE_FORMS.form_at(done, 12) for done in range(12)]
    assert forms == ["float"] * 3 + ["blended"] * 3 + ["ternary"] * 6
    strengths = [THREE_FORMS.strength(done, 12) for done in range(12)]
    assert strengths == pytest.approx([0, 0, 0, 0, 1 / 3, 2 / 3] + [1] * 6)
    assert THREE_FORMS.forms(0, 12, 12) == ("float", "blended", "ternary")
    assert THREE_FORMS.forms(3, 6, 12) == ("blended",)
    assert THREE_FORMS.forms(5, 7, 12) == ("blended", "ternary")
    assert QuantizerConfig(0.25).forms(0, 12, 12) == ("float", "ternary")
    assert AT_ONCE.forms(0, 12, 12) == ("ternary",)
    assert [AT_ONCE.strength(done, 12) for done in (0, 11)] == [1, 1]


@pytest.mark.parametrize(
    ("section", "values", "named"),
    [
        ("quantizer", {"float_fraction": 1.0}, "quantizer.float_fraction is 1.0"),
        (
            "quantizer",
            {"float_fraction": 0.5, "warmup_fraction": 0.5},
            "quantizer.warmup_fraction is 0.5: set --quantizer.warmup-fraction below 0.5",
        ),
        ("quantizer", {"float_fraction": 0.97}, "of 12 steps none is left"),
        (
            "optimizer",
            {"schedule": "paper", "second_stage_at": 0.5},
            "optimizer.second_stage_at is 0.5: leave it out: schedule paper halves the rate",
        ),
        (
            "optimizer",
            {"name": "schedule_free", "schedule": "constant", "second_stage_at": 0.5},
            "optimizer.second_stage_at is 0.5: leave it out for schedule_free",
        ),
        (
            "optimizer",
            {"weight_decay": 0.0, "weight_decay_until": 0.5},
            "optimizer.weight_decay_until is 0.5: leave it out, or set --optimizer.weight-decay",
        ),
    ],
)
def test_what_cannot_be_is_refused_by_name(section, values, named):
    with pytest.raises(ConfigError) as error:
        from_dict(TrainConfig, {"steps": 12, section: values})
    assert named in str(error.value)
    assert "\n" not in str(error.value)


def test_a_model_that_rounds_nothing_has_no_quantisers_to_set_in():
    dense = ModelConfig(mixer_linear=DENSE, glu_linear=DENSE, head_linear=DENSE)
    with pytest.raises(ConfigError, match=r"quantizer\.warmup_fraction is 0\.1: leave it out"):
        TrainConfig(model=dense, quantizer=QuantizerConfig(warmup_fraction=0.1))
    float_head = ModelConfig(head_linear=DENSE)
    assert TrainConfig(model=float_head, quantizer=THREE_FORMS).quantizer == THREE_FORMS


def test_the_second_stage_is_a_share_of_the_schedule():
    def rates(**more):
        config = OptimizerConfig(schedule="linear", learning_rate=0.1, **more)
        return np.asarray(make_schedule(config, 10)(np.arange(11)))

    expected = rates() * np.array([1] * 5 + [0.25] * 6)
    np.testing.assert_allclose(
        rates(second_stage_at=0.5, second_stage_rate=0.25), expected, rtol=1e-6
    )


@pytest.mark.parametrize("name", ["adamw", "muon", "lion", "adafactor", "schedule_free"])
def test_weight_decay_ends(name):
    """Of gradients that are zero: only the decay moves a weight."""
    config = OptimizerConfig(
        name=name, schedule="constant", learning_rate=0.1, weight_decay=0.5, weight_decay_until=0.3,
        b1=0.9,
    )  # fmt: skip
    params = {"head": {"weight": jnp.ones((2, 3))}}
    optimizer, values = make_optimizer(config), schedule_values(config, 10)
    state, seen = optimizer.init(params), []
    for _ in range(6):
        params, state = optimizer.update(
            jax.tree.map(jnp.zeros_like, params), state, params, values,
            scale=jnp.float32(1), norm=jnp.float32(0.1), apply=jnp.bool_(True),
        )  # fmt: skip
        moved = params if name != "schedule_free" else state.own.z
        seen.append(float(moved["head"]["weight"][0, 0]))
    ends_at = seen[2]
    assert ends_at < 0.9
    assert seen[3:] == pytest.approx([ends_at] * 3, rel=1e-6)
    if name != "schedule_free":
        assert seen[:3] == pytest.approx([0.95, 0.95**2, 0.95**3], rel=1e-6)


def _rounded(x, q, strength):
    return x + strength * (q - x)


def test_a_blended_layer_is_between_the_float_and_the_ternary_one():
    rng = np.random.default_rng(0)
    x, w = rng.normal(size=(5, 8)), rng.normal(size=(3, 8))
    strength, scale = 0.3, np.mean(np.abs(w))
    trits = np.clip(np.round(w / scale), -1, 1)
    peak = np.abs(x).max(axis=1, keepdims=True)
    levels = np.round(x * 127 / peak) * peak / 127
    expected = _rounded(x, levels, strength) @ _rounded(w, trits * scale, strength).T

    config = ModelConfig(hidden_size=8, num_layers=1, vocab_size=3)
    params = {"head": {"weight": jnp.asarray(w, jnp.float32)}}
    weights = weights_of_form("blended", params, config, jnp.float32(strength))
    options = config_of_form("blended", config).head_linear
    assert (options.ternary_weights, options.int8_activations, options.input_norm) == (
        False, True, True,
    )  # fmt: skip
    y = linear(
        jnp.asarray(x, jnp.float32), weights.params["head"]["weight"], None, eps=1e-6,
        ternary_weights=False, int8_activations=True, strength=weights.strength,
    )  # fmt: skip
    np.testing.assert_allclose(y, expected, rtol=2e-5, atol=1e-5)


def _config(**model):
    config = preset("tiny-transformer" if model.get("mixer") == "attention" else "tiny")
    sizes = {"num_layers": 1, "hidden_size": 32, "intermediate_size": 32, "vocab_size": 256}
    config = replace_model(config, scan_layers=False, **sizes | model)
    config = dataclasses.replace(config, batch_size=8, steps=12, loss_chunk=24)
    return replace(config, data__seq_len=8, quantizer=THREE_FORMS)


def _batch(config, rows=8):
    tokens = np.random.default_rng(0).integers(0, 250, (rows, config.data.seq_len + 1), np.int32)
    return {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "segment_ids": np.ones_like(tokens[:, 1:]),
    }


@functools.cache
def _params(config: ModelConfig):
    return initial_params(config)


def _loss(config, form, strength=0.0):
    """Nats a token."""
    params = _params(config.model)
    return float(_compiled(config.model, form)(params, _batch(config), jnp.float32(strength)))


@functools.cache
def _compiled(config: ModelConfig, form):
    def mean(params, batch, strength):
        model = LanguageModel(config_of_form(form, config))
        weights = weights_of_form(form, params, config, strength)
        sums = loss_sums(weights, batch, model=model, chunk=64)[1]
        return sums.loss / sums.tokens

    return jax.jit(mean)


@pytest.mark.parametrize("mixer", ["mlgru", "attention"])
def test_blended_models_begin_as_float_ones_and_end_as_ternary_ones(mixer):
    """With attention, queries and keys too, which the paper's Transformer++ rounds."""
    layers = ("mixer_linear", "glu_linear", "head_linear")
    config = _config(
        mixer=mixer, ternary_qk=mixer == "attention", **dict.fromkeys(layers, BITLINEAR)
    )
    whole, floats = _loss(config, "ternary"), _loss(config, "float")
    assert _loss(config, "blended", 0.0) == pytest.approx(floats, rel=1e-6)
    assert _loss(config, "blended", 1.0) == pytest.approx(whole, rel=1e-5)
    between = _loss(config, "blended", 0.5)
    assert abs(between - floats) > 1e-3
    assert abs(between - whole) > 1e-3
    assert abs(whole - floats) > 1e-3


@pytest.mark.parametrize(
    "model",
    [
        {"mixer": "rwkv4", "weight_scale": "learned"},
        {"mixer": "mingru", "glu_activation": "relu2"},
        {"mixer": "rglru"},
        {"mixer": "hgrn2"},
        {"mixer": "mlgru,attention", "num_layers": 2, "float_attention": True},
        {"mixer": "rglru,attention", "num_layers": 2, "ternary_qk": True},
    ],
    ids=lambda model: model["mixer"],
)
def test_forms_of_other_mixers_and_patterns_meet_at_their_ends(model):
    config = _config(num_heads=1, **model).model

    @jax.jit
    def losses(params):
        found = {}
        for form, strength in (
            ("float", 0),
            ("ternary", 0),
            *(("blended", s) for s in (0, 1, 0.5)),
        ):
            weights = weights_of_form(form, params, config, jnp.float32(strength))
            language_model = LanguageModel(config_of_form(form, config))
            sums = loss_sums(weights, _batch(_config()), model=language_model, chunk=64)[1]
            found[form, strength] = sums.loss / sums.tokens
        return tuple(found.values())

    floats, whole, begun, ended, between = map(float, losses(_params(config)))
    assert begun == pytest.approx(floats, rel=1e-6)
    assert ended == pytest.approx(whole, rel=1e-5)
    assert abs(between - floats) > 1e-4
    assert abs(between - whole) > 1e-4


def _stepped(config, form, done=4, mesh=None):
    """The loss of one step of that form, and what it makes of the parameters."""
    mesh = mesh or make_mesh(MeshConfig(), jax.devices()[:1])
    # Not Adam, to which the rounding of a gradient next to zero is a whole step.
    optimizer = make_optimizer(OptimizerConfig(name="lion", schedule="constant"))
    optimizer = optimizer._replace(update=_descend)
    state = dataclasses.replace(init_sharded(config, optimizer, mesh), step=jnp.int32(done))
    values = schedule_values(config.optimizer, config.steps, config.quantizer)
    with jax.set_mesh(mesh):
        step = functools.partial(train_step, config=config, optimizer=optimizer, form=form)
        state, metrics = jax.jit(step)(state, _batch(config), values)
    return float(metrics["loss"]), jax.tree.map(np.asarray, state.params)


def _descend(grads, state, params, values, *, scale, norm, apply):
    return jax.tree.map(lambda w, g: w - 0.1 * scale * g, params, grads), state


@pytest.mark.parametrize(
    "change",
    [
        {
            "mesh": MeshConfig(data=2, fsdp=2),
            "grad_accum": 2,
            "model__remat": "full",
            "model__scan_layers": True,
        },
        {"model__backward": "int8", "model__matmul_kernel": "xla_f32"},
    ],
    ids=["mesh", "int8"],
)
def test_a_blended_step_is_the_same_however_it_is_run(blended_step, change):
    """The int8 products of the backward pass, and the ternary product's kernels, need trits."""
    config, loss, params = blended_step
    changed = replace(config, **change)
    mesh = make_mesh(changed.mesh, jax.devices()[:4]) if "mesh" in change else None
    found, new = _stepped(changed, "blended", mesh=mesh)
    assert found == pytest.approx(loss, rel=2e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), new, params)


@pytest.fixture(scope="module")
def blended_step():
    config = _config()
    return config, *_stepped(config, "blended")


def test_the_strength_of_a_blended_step_is_that_of_its_number(blended_step):
    config, loss, _ = blended_step
    assert loss == pytest.approx(_loss(config, "blended", 1 / 3), rel=1e-5)


def test_evaluation_is_of_the_ternary_form():
    config = _config()
    batch, params = _batch(config), _params(config.model)
    found = jax.jit(functools.partial(eval_step, config=config))(params, batch)
    assert float(jnp.mean(found.loss_BT)) == pytest.approx(_loss(config, "ternary"), rel=1e-5)


def _arrays(config, step):
    run = open_run(config)
    folder = Path(config.run_dir) / "checkpoints" / str(step)
    return restore(folder, abstract_state(config, run.optimizer, run.mesh)).state


@pytest.mark.usefixtures("cached_compilation", "traced_once")
def test_a_run_goes_on_bit_by_bit_across_its_switches(small_run, tmp_path):
    """All four recipes together: a run interrupted before the switches, and a branch of one."""
    recipe = {
        "quantizer": THREE_FORMS,
        "optimizer__schedule": "wsd",
        "optimizer__weight_decay_until": 0.6,
        "optimizer__second_stage_at": 0.5,
        "batch_size": 16,
        "grad_accum": 2,
        "checkpoint__at_steps": (4,),
        "eval__batches": 0,
        "log__ternary_every_steps": 0,
    }
    whole = replace(small_run, run_dir=str(tmp_path / "whole"), **recipe)
    train(whole)
    broken = replace(whole, run_dir=str(tmp_path / "broken"))
    assert train(broken, on_step=stop_at(2))["step"] == 2
    train(broken)
    expected = _arrays(whole, 12)
    jax.tree.map(np.testing.assert_array_equal, _arrays(broken, 12), expected)

    records = read_history(tmp_path / "broken" / "metrics.jsonl")
    trained = [r for r in records if r["kind"] == "train"]
    assert [r["quantizer_strength"] for r in trained] == pytest.approx(
        [0, 0, 0, 0, 1 / 3, 2 / 3] + [1] * 6
    )
    switched = {r["step"]: r["event"] for r in records if "are trained are" in r.get("event", "")}
    assert switched == {
        3: "the layers that are trained are blended from here on",
        6: "the layers that are trained are ternary from here on",
    }

    branched = branch_config(f"{broken.run_dir}@4", str(tmp_path / "branch"))
    train(branched)
    jax.tree.map(np.testing.assert_array_equal, _arrays(branched, 12), expected)


@pytest.mark.parametrize(
    ("section", "values", "reason"),
    [
        ("quantizer", {"float_fraction": 0.1}, "quantizer would have set in elsewhere"),
        ("optimizer", {"weight_decay_until": 0.1}, "weight_decay_until would have ended the decay"),
        ("optimizer", {"second_stage_at": 0.1}, "schedule would have had other rates"),
    ],
)
def test_a_longer_run_may_not_have_switched_elsewhere(section, values, reason):
    changes = {f"{section}__{name}": value for name, value in values.items()}
    config = replace(TrainConfig(steps=100, optimizer=CONSTANT), **changes)
    longer = dataclasses.replace(config, steps=200)
    check_same_run(Path("run"), to_dict(config), longer, 10)
    with pytest.raises(ConfigError, match=f"steps 100 -> 200 .*{reason}"):
        check_same_run(Path("run"), to_dict(config), longer, 11)
