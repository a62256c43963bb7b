"""The fixed-point model against the float one, its switches, and `mmfree eval --numerics`."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmfree_jax.cli.main import main
from mmfree_jax.errors import ConfigError
from mmfree_jax.evaluate.scoring import Query, Scorer
from mmfree_jax.experiments.accelerator.evaluate import FixedForward
from mmfree_jax.experiments.accelerator.numerics import (
    PRECISE,
    Numerics,
    format_numerics,
    ladder,
    parse_numerics,
)
from mmfree_jax.experiments.accelerator.quantized import check_supported, quantize, self_written
from mmfree_jax.model import LanguageModel, init_state
from mmfree_jax.model.weights import as_weights
from mmfree_jax.model_config import LinearConfig
from mmfree_jax.presets import preset
from mmfree_jax.saved.pack import pack

from .conftest import CONFIG, random_params

EXACT = "fixed:w16a16,eps=model,norms=double,sigmoid=exact,rsqrt=exact"
APPROXIMATE = "fixed:w8a16,norms=double,eps=model"


@given(
    st.builds(
        Numerics,
        st.sampled_from((8, 16)),
        st.sampled_from((8, 16)),
        st.sampled_from((None, 1e-3, 1e-5)),
        st.booleans(),
        st.sampled_from((0, 8, 16, 32, 64)),
        st.integers(-1, 5),
    )
)
def test_text_round_trip(numerics):
    assert parse_numerics(format_numerics(numerics)) == numerics


@pytest.mark.parametrize(
    "text", ["w8a16", "fixed:w4a16", "fixed:w8a16,sigmoid=9", "fixed:w8a16,eps=-1", "fixed:w8a8,x"]
)
def test_malformed_text_is_refused(text):
    with pytest.raises(ConfigError, match="fixed:w8a16 or fixed:w8a8"):
        parse_numerics(text)


def test_ladder_changes_one_switch_a_step():
    steps = ladder(parse_numerics("fixed:w8a8"))
    assert steps[0][1] == PRECISE
    assert steps[-1] == ("all together", parse_numerics("fixed:w8a8"))
    for _, numerics in steps[1:-1]:
        assert (
            sum(
                a != b for a, b in zip(vars(numerics).values(), vars(PRECISE).values(), strict=True)
            )
            == 1
        )


@pytest.fixture(scope="module")
def float_model():
    variables = as_weights(random_params(CONFIG), CONFIG)
    return LanguageModel(CONFIG), variables, self_written(CONFIG, variables, rows=2, length=24)


@functools.partial(jax.jit, static_argnames="forward")
def _run(forward, arrays, tokens_BT, segment_ids_BT):
    start = init_state(forward.config, tokens_BT.shape[0])
    x_BTD, state = forward.hidden(arrays, tokens_BT, segment_ids_BT, start)
    return forward.logits(arrays, x_BTD), state.layers["h"]


def _fixed_logits(q, tokens_BT, segment_ids_BT=None):
    if segment_ids_BT is None:
        segment_ids_BT = jnp.ones(tokens_BT.shape, jnp.int32)
    forward = FixedForward(q.config, q.numerics)
    logits, h_LBD = _run(forward, forward.variables(q.arrays), tokens_BT, segment_ids_BT)
    return np.asarray(logits), np.asarray(h_LBD)


def test_precise_integers_are_the_float_model(float_model):
    _, variables, tokens = float_model
    # The trained model rounds activations to int8 by token, which the integers do not.
    plain = LinearConfig(int8_activations=False)
    smooth = dataclasses.replace(
        CONFIG, mixer_linear=plain, glu_linear=plain, head_linear=plain, bitlinear="fused"
    )
    exact = np.asarray(LanguageModel(smooth).apply(variables, tokens))
    errors = {}
    for text in (EXACT, APPROXIMATE):
        q = quantize(variables, CONFIG, parse_numerics(text), tokens)
        got, _ = _fixed_logits(q, jnp.asarray(tokens))
        errors[text] = np.sqrt(np.mean((got - exact) ** 2) / np.mean(exact**2))
    assert errors[EXACT] < 3e-3
    assert errors[EXACT] < errors[APPROXIMATE] < 0.1


def test_documents_and_padding_are_kept_apart(float_model):
    _, variables, tokens = float_model
    q = quantize(variables, CONFIG, parse_numerics(APPROXIMATE), tokens)
    # Row 0: a document, another, padding; row 1: that other document alone.
    second = tokens[1, :4]
    rows = [[*tokens[0, :5], *second, *[7] * 15], [*second, *[7] * 20]]
    segments = [[1] * 5 + [2] * 4 + [0] * 15, [1] * 4 + [0] * 20]
    logits, h_LBD = _fixed_logits(q, jnp.asarray(rows), jnp.asarray(segments))
    np.testing.assert_array_equal(logits[0, 5:9], logits[1, :4])
    np.testing.assert_array_equal(h_LBD[:, 0], h_LBD[:, 1])


def test_scoring_carries_the_integer_state(float_model):
    model, variables, tokens = float_model
    q = quantize(variables, CONFIG, parse_numerics(APPROXIMATE), tokens)
    forward = FixedForward(CONFIG, q.numerics)
    text = np.random.default_rng(0).integers(0, 256, 24).tolist()
    scorer = Scorer(model, q.arrays, forward=forward, max_length=32, batch_tokens=32)
    (score,) = scorer.score([Query(tuple(text), 3)])
    assert {kind for kind, *_ in scorer.programs} == {"context", "score"}
    logits, _ = _fixed_logits(q, jnp.asarray([text, text]))
    log_p = np.asarray(jax.nn.log_softmax(logits, -1))
    expected = sum(log_p[0, t - 1, text[t]] for t in range(21, 24))
    assert score.log_likelihood == pytest.approx(expected, abs=1e-4)


def test_command_line_reports_every_step(tmp_path, byte_data, capsys, save_model):
    # One switch beside fixed point itself: three programs to compile.
    spec = "fixed:w16a16,eps=model,norms=double,rsqrt=exact"
    params = random_params(CONFIG)
    pack(save_model(tmp_path / "master", CONFIG, params), tmp_path / "model", embedding="float32")
    arguments = ["eval", "--model", str(tmp_path / "model"), "--data", str(byte_data)]
    arguments += ["--limit", "2", "--window", "16", "--output", str(tmp_path / "out")]
    assert main([*arguments, "--numerics", spec]) == 0
    printed = capsys.readouterr().out
    assert "+ sigmoid by 8 entries" in printed
    values = json.loads((tmp_path / "out/model/held_out_numerics.json").read_text())
    names = [row["name"] for row in values["numerics"]]
    assert names[:2] == ["as trained", "fixed point, 16-bit activations"]
    assert len(names) == 3
    losses = [row["loss"]["mean"] for row in values["numerics"]]
    assert len(set(losses)) == 3
    assert losses[1] == pytest.approx(losses[0], abs=0.02)
    assert losses[2] == pytest.approx(losses[0], abs=0.3)
    assert main([*arguments, "--numerics", "int8"]) == 2
    assert "fixed:w8a16" in capsys.readouterr().err


def test_other_models_are_refused():
    with pytest.raises(ConfigError, match="the model is a transformer"):
        check_supported(preset("tiny-transformer").model)
