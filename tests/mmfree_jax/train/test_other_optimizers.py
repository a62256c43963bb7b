"""The optimisers beside AdamW against their equations written out, and a user's own."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from mmfree_jax.config import MeshConfig, OptimizerConfig, replace_model
from mmfree_jax.errors import ConfigError
from mmfree_jax.parallel.sharding import make_mesh, state_shardings
from mmfree_jax.presets import preset
from mmfree_jax.saved.checkpoint import Checkpointer, restore
from mmfree_jax.train.memory import estimate_memory
from mmfree_jax.train.optimizer import make_optimizer
from mmfree_jax.train.schedule import schedule_values
from mmfree_jax.train.step import init_sharded, jit_train_step, state_shapes

NAMES = ("muon", "lion", "adafactor", "schedule_free")
ROOT = np.random.default_rng(0)
PARAMS = {
    "embedding": {"weight": jnp.asarray(ROOT.normal(size=(5, 4)), jnp.float32)},
    "blocks": {"mixer": {"i_proj": {
        "weight": jnp.asarray(ROOT.normal(size=(2, 6, 4)), jnp.float32),
        "norm_scale": jnp.ones((2, 4)),
    }}},
    "head": {"weight": jnp.asarray(ROOT.normal(size=(5, 4)), jnp.float32)},
}  # fmt: skip


def config_of(name, **changes):
    schedule = "constant" if name == "schedule_free" else "linear"
    return OptimizerConfig(name=name, schedule=schedule, learning_rate=0.1, **changes)


def gradients(count):
    rng = np.random.default_rng(1)
    return [
        jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), jnp.float32), PARAMS)
        for _ in range(count)
    ]


def run(config, grads, *, params=PARAMS, apply=True, steps=10):
    """The parameters and the state after each update."""
    optimizer, values = make_optimizer(config), schedule_values(config, steps)
    state = optimizer.init(params)
    for grad in grads:
        params, state = optimizer.update(
            grad, state, params, values,
            scale=jnp.float32(1), norm=jnp.float32(0.5), apply=jnp.bool_(apply),
        )  # fmt: skip
        yield params, state


def one_more(config, grad, params, state):
    return make_optimizer(config).update(
        grad, state, params, schedule_values(config, 10),
        scale=jnp.float32(1), norm=jnp.float32(0.5), apply=jnp.bool_(True),
    )  # fmt: skip


def last(config, grads, **options):
    *_, (params, state) = run(config, grads, **options)
    return params, state


def leaf(tree):
    return np.asarray(tree["blocks"]["mixer"]["i_proj"]["weight"], np.float64)


def test_lion_follows_its_equations():
    config = config_of("lion", b1=0.8, b2=0.6, weight_decay=0.5)
    grads = gradients(3)
    w, m = leaf(PARAMS), 0.0
    for i, grad in enumerate(grads):
        rate = 0.1 * (1 - i / 10)
        w = w - rate * (np.sign(0.8 * m + 0.2 * leaf(grad)) + 0.5 * w)
        m = 0.6 * m + 0.4 * leaf(grad)
    np.testing.assert_allclose(leaf(last(config, grads)[0]), w, rtol=1e-5, atol=1e-6)


def test_muon_makes_each_layers_matrix_orthogonal_and_leaves_the_rest_to_adam():
    config = config_of("muon", weight_decay=0.0)
    (grad,) = gradients(1)
    after, _ = last(config, [grad])
    for layer in range(2):
        step = (leaf(PARAMS)[layer] - leaf(after)[layer]) / 0.1
        # 0.2 sqrt(max(6, 4)) times a matrix whose singular values are all about 1.
        values = np.linalg.svd(step / (0.2 * np.sqrt(6)), compute_uv=False)
        assert np.all((values > 0.6) & (values < 1.3)), values
        left, _, right = np.linalg.svd(leaf(grad)[layer], full_matrices=False)
        assert np.sum(step * (left @ right)) / np.linalg.norm(step) / 2 > 0.97
    adam, _ = last(dataclasses.replace(config, name="adamw"), [grad])
    for own, other in [
        (after["embedding"], adam["embedding"]),
        (after["head"], adam["head"]),
        (after["blocks"]["mixer"]["i_proj"]["norm_scale"],
         adam["blocks"]["mixer"]["i_proj"]["norm_scale"]),
    ]:  # fmt: skip
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), own, other)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_adafactor_keeps_rows_and_columns(momentum):
    rng = np.random.default_rng(2)
    params = {"head": {"weight": jnp.asarray(rng.normal(size=(128, 130)), jnp.float32)}}
    grads = [
        {"head": {"weight": jnp.asarray(rng.normal(size=(128, 130)), jnp.float32)}}
        for _ in range(3)
    ]
    config = config_of("adafactor", b1=momentum, weight_decay=0.0)
    after, state = last(config, grads, params=params)
    w, row, column, m = np.asarray(params["head"]["weight"], np.float64), 0.0, 0.0, 0.0
    for i, grad in enumerate(grads):
        g = np.asarray(grad["head"]["weight"], np.float64)
        decay = 1 - (i + 1.0) ** -0.8
        row = decay * row + (1 - decay) * np.mean(g * g + 1e-30, axis=1)
        column = decay * column + (1 - decay) * np.mean(g * g + 1e-30, axis=0)
        u = g / np.sqrt(np.outer(row, column) / row.mean())
        u = u / max(1.0, np.sqrt(np.mean(u * u)))
        m = momentum * m + (1 - momentum) * u
        w = w - 0.1 * (1 - i / 10) * m
    np.testing.assert_allclose(after["head"]["weight"], w, rtol=1e-5, atol=1e-5)
    sizes = sorted(x.size for x in jax.tree.leaves(state) if x.size > 1)
    assert sizes == [128, 130] + [128 * 130] * (momentum > 0)


def test_schedule_free_averages_what_it_steps():
    config = config_of("schedule_free", b1=0.7, b2=0.9, warmup_steps=2, weight_decay=0.3)
    grads = gradients(4)
    x = z = leaf(PARAMS)
    v, weights = 0.0, 0.0
    optimizer, points = make_optimizer(config), []
    for i, grad in enumerate(grads):
        rate = 0.1 * min(1.0, i / 2)
        y = 0.3 * z + 0.7 * x
        points.append(y)
        v = 0.9 * v + 0.1 * leaf(grad) ** 2
        z = z - rate * (leaf(grad) / (np.sqrt(v / (1 - 0.9 ** (i + 1))) + 1e-8) + 0.3 * y)
        weights += rate**2
        share = rate**2 / weights if weights else 0.0
        x = (1 - share) * x + share * z
    made = list(run(config, grads))
    np.testing.assert_allclose(leaf(made[-1][0]), x, rtol=1e-5, atol=1e-5)
    for (params, state), point in zip(made, points[1:], strict=False):
        np.testing.assert_allclose(leaf(optimizer.point(params, state)), point, atol=1e-5)


@pytest.mark.parametrize("name", ["adamw", *NAMES])
def test_an_update_that_does_not_apply_leaves_everything(name):
    config = config_of(name)
    params, state = last(config, gradients(1), apply=False)
    before = make_optimizer(config).init(PARAMS)
    jax.tree.map(np.testing.assert_array_equal, (params, state), (PARAMS, before))


@pytest.mark.parametrize("name", ["adamw", "lion"])
def test_groups_have_rates_of_their_own(name):
    config = config_of(name, embedding_rate=0.0, matrix_rate=2.0, vector_rate=0.5, head_rate=3.0)
    (grad,) = gradients(1)
    plain, own = (last(c, [grad])[0] for c in (config_of(name), config))
    steps = [jax.tree.map(lambda a, b: a - b, after, PARAMS) for after in (plain, own)]
    factors = {"embedding": {"weight": 0.0}, "head": {"weight": 3.0},
               "blocks": {"mixer": {"i_proj": {"weight": 2.0, "norm_scale": 0.5}}}}  # fmt: skip
    jax.tree.map(
        lambda one, other, factor: np.testing.assert_allclose(other, factor * one, atol=1e-6),
        *steps, factors,
    )  # fmt: skip


def test_a_factory_makes_the_users_own(monkeypatch):
    asked = []

    def make(optimizer, model):
        asked.append((optimizer, model))
        return optax.trace(0.9)

    module = types.SimpleNamespace(momentum=make, number=lambda *_: 3)
    monkeypatch.setitem(__import__("sys").modules, "own_optimizers", module)
    config = OptimizerConfig(
        factory="own_optimizers:momentum", learning_rate=0.1, schedule="constant", weight_decay=0.0
    )
    grads = gradients(2)
    after, _ = last(config, grads)
    first, second = map(leaf, grads)
    np.testing.assert_allclose(
        leaf(after), leaf(PARAMS) - 0.1 * first - 0.1 * (second + 0.9 * first), rtol=1e-5, atol=1e-6
    )
    assert asked == [(config, None)]
    for factory, message in [
        ("own_optimizers:number", r"it returned int; make it return an optax"),
        ("own_optimizers:nothing", r"'own_optimizers:nothing': own_optimizers has no nothing"),
        ("not_there:make", r"not_there cannot be imported \(No module named 'not_there'\)"),
    ]:
        with pytest.raises(ConfigError, match=message):
            make_optimizer(dataclasses.replace(config, factory=factory))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "schedule_free"}, "optimizer.schedule is 'paper': set --optimizer.schedule con"),
        ({"name": "schedule_free", "schedule": "constant", "b1": 0.0}, "optimizer.b1 is 0.0: set"),
        ({"name": "lion", "second_moment_dtype": "bfloat16"}, "optimizer.second_moment_dtype is"),
        ({"name": "muon", "factory": "a:b"}, "optimizer.name is 'muon': leave it out"),
        ({"factory": "momentum"}, "optimizer.factory is 'momentum': set --optimizer.factory MOD"),
        ({"head_rate": -1.0}, "optimizer.head_rate is -1.0"),
    ],
)
def test_pairs_that_cannot_be_are_refused_by_name(changes, message):
    with pytest.raises(ConfigError, match=message):
        OptimizerConfig(**changes)


def small(name):
    config = replace_model(
        preset("tiny"), hidden_size=32, num_layers=1, intermediate_size=32, vocab_size=64
    )
    optimizer = config_of(name, moment_dtype="bfloat16" if name in ("muon", "lion") else "float32")
    data = dataclasses.replace(config.data, seq_len=16)
    return dataclasses.replace(config, batch_size=8, steps=10, optimizer=optimizer, data=data)


METADATA = {
    "config": {},
    "data": {"fingerprints": [], "tokens": [8], "paths": [], "tokenizer": {}},
}


@pytest.mark.parametrize("name", NAMES)
def test_updates_go_on_bit_for_bit_after_a_restart(name, tmp_path):
    config, grads = config_of(name), gradients(3)
    before = last(config, grads[:2])
    checkpointer = Checkpointer(tmp_path)
    checkpointer.save(2, before, METADATA)
    checkpointer.wait()
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), before
    )
    again = restore(tmp_path / "2", shapes).state
    ended, restarted = (one_more(config, grads[2], *start) for start in (before, again))
    jax.tree.map(np.testing.assert_array_equal, restarted, ended)


def test_muon_trains_on_shards():
    config = small("muon")
    optimizer = make_optimizer(config.optimizer, config.model)
    schedule = schedule_values(config.optimizer, config.steps)
    tokens = np.random.default_rng(0).integers(0, config.model.vocab_size, (8, 17), np.int32)
    ones = np.ones((8, 16), np.int32)
    batch = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "segment_ids": ones}
    mesh = make_mesh(MeshConfig(data=1, fsdp=2), jax.devices()[:2])
    with jax.set_mesh(mesh):
        state = init_sharded(config, optimizer, mesh)
        step, losses = jit_train_step(config, optimizer, mesh), []
        for _ in range(5):
            state, metrics = step(state, batch, schedule)
            losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0] - 0.5  # nats a token, on the rows that it trains on


def test_states_lie_as_their_parameters_do():
    mesh = make_mesh(MeshConfig(data=1, fsdp=4), jax.devices()[:4])
    for name in ("muon", "lion", "schedule_free"):
        config = small(name)
        shapes = state_shapes(config, make_optimizer(config.optimizer, config.model))
        layouts = state_shardings(mesh, shapes).opt_state
        found = {
            str(sharding.spec)
            for path, sharding in jax.tree_util.tree_flatten_with_path(layouts)[0]
            if "o_proj" in str(path) and "'weight'" in str(path)
        }
        assert found == {str(P(None, "fsdp", None))}, name


def test_the_estimate_of_memory_knows_what_each_keeps():
    config = small("lion")
    model_bytes = estimate_memory(config, MeshConfig(data=1)).parameters  # float32

    def kept(name, **changes):
        optimizer = config_of(name, **changes)
        changed = dataclasses.replace(config, optimizer=optimizer)
        return estimate_memory(changed, MeshConfig(data=1)).optimizer / model_bytes

    assert kept("adamw") == pytest.approx(2, rel=1e-3)
    assert kept("adamw", second_moment_dtype="bfloat16") == pytest.approx(1.5, rel=1e-3)
    assert kept("lion") == pytest.approx(1, rel=1e-3)
    assert kept("lion", moment_dtype="bfloat16") == pytest.approx(0.5, rel=1e-3)
    assert kept("schedule_free") == pytest.approx(2, rel=1e-3)  # weights and second moment
    assert 1 < kept("muon") < 2  # embedding, head and vectors have two moments
