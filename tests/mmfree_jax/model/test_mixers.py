"""What every token mixer and every form of one has to do, beside computing what it is."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmfree_jax.config import CheckpointConfig, EvalConfig, MeshConfig, TrainConfig
from mmfree_jax.errors import ConfigError
from mmfree_jax.infer import generate
from mmfree_jax.model import LanguageModel, as_weights, init_state
from mmfree_jax.model.packing import pack
from mmfree_jax.model.parameters import param_shapes
from mmfree_jax.model_config import ModelConfig
from mmfree_jax.parallel.sharding import check_divisible, make_mesh, param_shardings, param_spec
from mmfree_jax.saved.open_model import open_model
from mmfree_jax.saved.pack import pack as pack_model
from mmfree_jax.saved.session import load_session, save_session
from mmfree_jax.train.flops import count_parameters
from mmfree_jax.train.training import train

BASE = ModelConfig(
    vocab_size=62,
    hidden_size=16,
    num_layers=2,
    intermediate_size=16,
    compute_dtype="float32",
    residual_dtype="float32",
    remat="none",
)
CONFIGS = {
    "rwkv4": dataclasses.replace(BASE, mixer="rwkv4"),
    "mingru": dataclasses.replace(BASE, mixer="mingru", glu_activation="relu2"),
    "rglru-hgrn2": dataclasses.replace(BASE, mixer="rglru,hgrn2", num_layers=4, state_expansion=8),
    # With other forms of both mixers.
    "hybrid": dataclasses.replace(
        BASE,
        mixer="mlgru,attention",
        num_layers=4,
        num_heads=2,
        output_gate="figure",
        candidate="tanh",
        ternary_qk=True,
    ),
}


@pytest.fixture(params=CONFIGS, scope="module")
def config(request):
    return CONFIGS[request.param]


@pytest.fixture(scope="module")
def params(config):
    """Weights so large that what a token was preceded by moves the logits by 0.4 and more."""
    init = jax.jit(LanguageModel(config).init)
    tree = init(jax.random.key(1), jnp.zeros((1, 2), jnp.int32))["params"]
    return jax.tree_util.tree_map_with_path(
        lambda path, x: x * (8 if path[-1].key == "weight" else 1), tree
    )


def test_parameters_are_counted_and_laid_out(config):
    shapes = param_shapes(config)
    assert count_parameters(config).total == sum(math.prod(x.shape) for x in shapes.values())
    ternary = sum(math.prod(x.shape) for name, x in shapes.items() if name.endswith("proj/weight"))
    assert count_parameters(config).ternary == ternary + 62 * 16
    for name, x in shapes.items():
        assert len(param_spec(name)) <= len(x.shape)


def test_tokens_one_by_one_give_what_whole_rows_give(config, params):
    """In both forms of the weights, through a piece of the prompt and rows of unequal length."""
    model = LanguageModel(config)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 62, (2, 9)), jnp.int32)
    expected = jax.jit(model.apply)({"params": params}, tokens)
    forms = [as_weights(params, config)]
    forms.append(pack(forms[0], config))
    for weights in forms:
        decode = jax.jit(lambda w, t, s, i=None: model.apply(w, t, s, i, method="decode"))
        # The first row reads four tokens and the second two; what pads it must leave no trace.
        state = init_state(config, 2, 12)
        held = jnp.asarray([[1, 1, 1, 1], [1, 1, 0, 0]], jnp.int32)
        logits, state = decode(weights, tokens[:, :4], state, held)
        places = [3, 1]
        for _ in range(5):
            for row, place in enumerate(places):
                np.testing.assert_allclose(logits[row], expected[row, place], atol=0.02)
            places = [place + 1 for place in places]
            now = jnp.stack([tokens[row, place] for row, place in enumerate(places)])
            logits, state = decode(weights, now[:, None], state)
        assert state.position_B.tolist() == [9, 7]


def test_documents_of_a_row_do_not_see_each_other(config, params):
    apply = jax.jit(LanguageModel(config).apply, static_argnames="method")
    tokens = jnp.asarray(np.random.default_rng(3).integers(0, 62, (2, 10)), jnp.int32)
    tokens = tokens.at[1, 4:].set(tokens[0, 4:])  # other first documents, the same second
    ids = jnp.asarray([[1, 1, 1, 1, 2, 2, 2, 2, 2, 0]] * 2)
    logits = apply({"params": params}, tokens, ids)
    if config.recurrent:  # attention sees positions, which go on
        alone = apply({"params": params}, tokens[:1, 4:9])
        np.testing.assert_allclose(logits[0, 4:9], alone[0], atol=0.02)
    else:  # and keeps what the second document, begun within the first call, must not see
        state = init_state(config, 2, 10)
        for start, last in ((0, 4), (5, 8)):
            piece = (tokens[:, start : start + 5], state, ids[:, start : start + 5])
            found, state = apply({"params": params}, *piece, method="decode")
            np.testing.assert_allclose(found, logits[:, last], atol=0.02)
    np.testing.assert_array_equal(logits[0, 4:9], logits[1, 4:9])
    assert np.abs(logits[0, :4] - logits[1, :4]).max() > 0.05


@pytest.mark.parametrize("name", ["rwkv4", "rglru-hgrn2", "hybrid", "own"])
def test_a_mesh_gives_the_loss_and_gradients_of_one_device(name):
    """Rows over data and fsdp, matrices over fsdp and tensor, documents that end within a row."""
    configs = CONFIGS | {"own": dataclasses.replace(BASE, mixer="page_mixer:LEAKY")}  # a page's
    config = dataclasses.replace(configs[name], remat="states")
    params = jax.jit(LanguageModel(config).init)(jax.random.key(2), jnp.zeros((1, 2), jnp.int32))
    rng = np.random.default_rng(4)
    tokens = jnp.asarray(rng.integers(0, 62, (4, 12)), jnp.int32)
    ids = jnp.asarray(1 + np.cumsum(rng.random((4, 12)) < 0.2, axis=1), jnp.int32)

    def loss(params):
        x_BTD, _ = LanguageModel(config).apply(params, tokens, ids, method="hidden")
        return jnp.mean(jnp.square(x_BTD) * (1 + tokens[..., None]))

    value, gradient = jax.jit(jax.value_and_grad(loss))(params)
    mesh = make_mesh(MeshConfig(fsdp=2, tensor=2), jax.devices()[:4])
    with jax.set_mesh(mesh):
        placed = jax.device_put(params["params"], param_shardings(mesh, params["params"]))
        on_mesh, its_gradient = jax.jit(jax.value_and_grad(loss))({"params": placed})
    # Sums in another order turn an int8 or two, also in the gradients (jax 0.12: 1.03e-5).
    np.testing.assert_allclose(on_mesh, value, rtol=1e-4)
    differences = jax.tree.map(
        lambda a, b: float(np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-6)),
        jax.tree.map(np.asarray, its_gradient),
        jax.tree.map(np.asarray, gradient),
    )
    assert max(jax.tree.leaves(differences)) < 0.02, differences


def test_a_run_goes_on_from_its_checkpoint_and_its_model_generates_packed(small_run, tmp_path):
    model = dataclasses.replace(small_run.model, mixer="hgrn2,attention", num_layers=2)
    config = dataclasses.replace(
        small_run,
        run_dir=str(tmp_path / "run"),
        model=model,
        steps=3,
        checkpoint=CheckpointConfig(every_steps=2),
        eval=EvalConfig(every_steps=0, sample_tokens=0),
    )
    train(dataclasses.replace(config, stop_at=2))
    train(config)
    assert (tmp_path / "run/checkpoints/3").is_dir()
    run = open_model(tmp_path / "run")
    pack_model(run, tmp_path / "packed")
    weights = (run.weights("ternary"), open_model(tmp_path / "packed").weights("packed"))
    module, prompts = LanguageModel(model), [[5, 6, 7], [8]]
    streams = [
        generate(module, w, prompts, max_new_tokens=6, temperature=0).tokens for w in weights
    ]
    assert streams[0] == streams[1]
    # The state of both mixers goes into a file of the trained model, and on from it in the packed.
    begun = generate(module, weights[0], prompts, max_new_tokens=2, temperature=0)
    save_session(tmp_path / "session", begun.session, weights[0], model)
    again = load_session(tmp_path / "session", weights[1], model)
    ended = generate(module, weights[1], [[], []], session=again, max_new_tokens=4, temperature=0)
    assert [a + b for a, b in zip(begun.tokens, ended.tokens, strict=True)] == streams[0]
    # Cut off within a piece of tokens, the recurrent state goes back with the cache.
    end = lambda row, new: 1 if len(new) > 1 else None  # noqa: E731
    cut = generate(module, weights[1], prompts, max_new_tokens=6, temperature=0, on_tokens=end)
    (found, expected) = (output.session.state for output in (cut, begun))
    np.testing.assert_array_equal(found.position_B, expected.position_B)
    outer, expected_outer = (state.layers["layer0"]["outer"] for state in (found, expected))
    np.testing.assert_allclose(outer, expected_outer, atol=1e-4)


def test_a_sequence_cannot_be_split_for_mixers_without_it():
    config = dataclasses.replace(TrainConfig(), model=CONFIGS["rwkv4"], batch_size=8)
    with pytest.raises(ConfigError, match=r"rwkv4 needs whole rows; set --mesh\.sequence 1"):
        check_divisible(config, make_mesh(MeshConfig(sequence=8)))
