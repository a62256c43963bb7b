"""Saved sessions: bound to all weights of their model, in any form, and refused when damaged."""

import dataclasses
import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from initial_params import initial_params

from mmfree_jax.errors import CheckpointError
from mmfree_jax.infer import api
from mmfree_jax.infer.decode import init_session
from mmfree_jax.model import LanguageModel
from mmfree_jax.model.parameters import flatten, param_shapes, unflatten
from mmfree_jax.model.weights import as_weights
from mmfree_jax.model_config import DENSE, ModelConfig
from mmfree_jax.saved.open_model import open_model
from mmfree_jax.saved.pack import pack
from mmfree_jax.saved.session import load_session, save_session
from mmfree_jax.saved.tensor_file import tensor_writer

OLD = Path(__file__).parent / "old"
CONFIG = ModelConfig(
    vocab_size=61,
    hidden_size=38,
    num_layers=2,
    intermediate_size=47,
    compute_dtype="float32",
    residual_dtype="float32",
    remat="none",
)
PROMPTS = [[5, 9, 11], [7]]


@functools.cache
def params():
    tree = initial_params(CONFIG, 3)
    keys = iter(jax.random.split(jax.random.key(9), 64))
    # Norms and bounds away from their initial values, as training leaves them.
    return {
        name: x if name.endswith("weight") else x + 0.3 * jax.random.normal(next(keys), x.shape)
        for name, x in flatten(tree).items()
    }


def weights(**changes):
    """Ternary weights, some parameters changed by a function."""
    changed = {name.replace("__", "/"): change for name, change in changes.items()}
    assert changed.keys() <= params().keys()
    same = lambda x: x  # noqa: E731
    tree = {name: changed.get(name, same)(x) for name, x in params().items()}
    return as_weights(unflatten(tree), CONFIG)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A session of the model."""
    path = tmp_path_factory.mktemp("session") / "session"
    session = api.prefill(LanguageModel(CONFIG), weights(), PROMPTS)
    save_session(path, session, weights(), CONFIG)
    return path, session


def test_a_session_comes_back(saved):
    path, session = saved
    found = load_session(path, weights(), CONFIG)
    jax.tree.map(np.testing.assert_array_equal, found, session)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("embedding__weight", lambda x: 2 * x),
        ("embedding__weight", lambda x: x.at[3, 4].add(0.01)),
        ("head__weight", lambda x: -x),
        ("head__weight", lambda x: x[::-1]),
        ("head__weight", lambda x: x * 1.001),
        ("blocks__mixer__i_proj__weight", lambda x: -x),
        ("blocks__mixer__f_proj__weight", lambda x: x[:, :, ::-1]),
        ("blocks__mixer__g_proj__weight", lambda x: x.at[1].set(x[1, ::-1])),
        ("blocks__glu__down_proj__weight", lambda x: x[::-1]),
        ("blocks__glu__gate_up_proj__weight", lambda x: x.at[0, :2].set(x[0, 1::-1])),
        ("blocks__mixer_norm__scale", lambda x: 3 * x),
        ("blocks__glu_norm__scale", lambda x: x[:, ::-1]),
        ("blocks__mixer__gate_norm__scale", lambda x: 3 * x),
        ("blocks__mixer__o_proj__norm_scale", lambda x: x.at[1, 0].add(0.1)),
        ("final_norm__scale", lambda x: -x),
        ("head__norm_scale", lambda x: 3 * x),
        ("lower_bounds", lambda x: x.at[1].add(0.1)),
    ],
)
def test_a_model_of_the_same_shape_is_refused(saved, name, change):
    with pytest.raises(CheckpointError, match="other weights"):
        load_session(saved[0], weights(**{name: change}), CONFIG)


@pytest.mark.parametrize("options", [{}, {"bits": "1.6"}, {"embedding": "bfloat16"}])
def test_trained_ternary_and_packed_weights_share_a_session(saved, options, tmp_path, save_model):
    model = save_model(tmp_path / "model", CONFIG, unflatten(params()))
    pack(model, tmp_path / "packed", **options)
    forms = [open_model(tmp_path / "packed").weights(form) for form in ("packed", "ternary")]
    forms.append(model.weights("master"))
    for one in forms:
        load_session(saved[0], one, CONFIG)
        save_session(tmp_path / "again", saved[1], one, CONFIG)
        for other in forms:
            load_session(tmp_path / "again", other, CONFIG)


def test_an_int8_embedding_is_another_model(saved, tmp_path, save_model):
    model = save_model(tmp_path / "model", CONFIG, unflatten(params()))
    pack(model, tmp_path / "packed", embedding="int8")
    packed = open_model(tmp_path / "packed")
    with pytest.raises(CheckpointError, match="other weights"):
        load_session(saved[0], packed.weights("packed"), CONFIG)
    save_session(tmp_path / "own", saved[1], packed.weights("packed"), CONFIG)
    load_session(tmp_path / "own", packed.weights("ternary"), CONFIG)


def test_the_last_bits_of_a_scale_do_not_matter(saved):
    found = weights()
    scaled = jax.tree.map(lambda x: x * (1 + 2e-6) if x.dtype == jnp.float32 else x, found.ternary)
    load_session(saved[0], found.replace(ternary=scaled), CONFIG)


def test_an_old_session_loads_with_a_warning():
    run = open_model(OLD / "run")
    with pytest.warns(UserWarning, match="older version"):
        session = load_session(OLD / "session.safetensors", run.weights(), run.config)
    assert session.state.position_B.tolist() == [11]
    other = jax.tree.map(lambda x: 2 * x, run.weights("master"))
    with (
        pytest.warns(UserWarning, match="older version"),
        pytest.raises(CheckpointError, match="other weights"),
    ):
        load_session(OLD / "session.safetensors", other, run.config)


def rewrite(source, target, without="", **changes):
    """A copy of a session file with other tensors, each with its right checksum."""
    from safetensors import safe_open

    with safe_open(source, "np") as file:
        metadata = file.metadata()
        arrays = {name: file.get_tensor(name) for name in file.keys() if name != without}  # noqa: SIM118
    arrays |= {name.replace("__", "/"): array for name, array in changes.items()}
    architecture = {"architecture": metadata["architecture"]}
    with tensor_writer(
        target,
        [(name, x.shape, x.dtype) for name, x in arrays.items()],
        file_format="mmfree-session",
        version=2,
        metadata=architecture,
    ) as write:
        for name, array in arrays.items():
            write(name, array)


def test_a_cache_of_before_documents_began_within_rows_loads(tmp_path):
    config = dataclasses.replace(
        CONFIG, mixer="attention", mixer_linear=DENSE, glu_linear=DENSE, head_linear=DENSE
    )
    tree = unflatten({name: jnp.ones(x.shape) for name, x in param_shapes(config).items()})
    weights = as_weights(tree, config)
    session = init_session(config, 2, 3)
    save_session(tmp_path / "new", session, weights, config)
    rewrite(tmp_path / "new", tmp_path / "old", without="layers/start")
    found = load_session(tmp_path / "old", weights, config)
    jax.tree.map(np.testing.assert_array_equal, found, session)


@pytest.mark.parametrize(
    "changes",
    [
        {"layers__h": np.zeros((2, 3, 38), np.float32)},
        {"layers__h": np.zeros((2, 2, 37), np.float32)},
        {"layers__x": np.zeros(3, np.float32)},
        {"position": np.zeros((2, 1), np.int32)},
        {"position": np.array([3, -1], np.int32)},
        {"position": np.zeros(3, np.int32)},
        {"logits": np.zeros((2, 60), np.float32)},
        {"seen": np.zeros((2, 7), np.uint8)},
        {"weights__sums": np.zeros((2, 8), np.int32)},
    ],
    ids=lambda changes: f"{next(iter(changes))} {next(iter(changes.values())).shape}",
)
def test_other_shapes_are_refused(saved, tmp_path, changes):
    rewrite(saved[0], tmp_path / "changed", **changes)
    with pytest.raises(CheckpointError) as error:
        load_session(tmp_path / "changed", weights(), CONFIG)
    assert "\n" not in str(error.value)


@pytest.fixture(scope="module")
def packed_file(tmp_path_factory, save_model):
    folder = tmp_path_factory.mktemp("packed")
    pack(save_model(folder / "model", CONFIG, unflatten(params())), folder / "packed")
    return folder / "packed/packed.safetensors"


HEADERS = {
    "no metadata": lambda h: h.pop("__metadata__"),
    "metadata a list": lambda h: h.update(__metadata__=[1]),
    "no version": lambda h: h["__metadata__"].pop("version"),
    "version a list": lambda h: h["__metadata__"].update(version=[1]),
    "version a word": lambda h: h["__metadata__"].update(version="one"),
    "a tensor a number": lambda h: h.update({tensor(h): 3}),
    "no dtype": lambda h: h[tensor(h)].pop("dtype"),
    "a dtype of another": lambda h: h[tensor(h)].update(dtype="F64"),
    "a dtype a list": lambda h: h[tensor(h)].update(dtype=["F32"]),
    "shape a word": lambda h: h[tensor(h)].update(shape="12"),
    "shape negative": lambda h: h[tensor(h)].update(shape=[-1]),
    "shape huge": lambda h: h[tensor(h)].update(shape=[10**30]),
    "one offset": lambda h: h[tensor(h)].update(data_offsets=[1]),
    "offsets words": lambda h: h[tensor(h)].update(data_offsets=["a", "b"]),
    "offsets fractions": lambda h: h[tensor(h)].update(data_offsets=[0.5, 1.5]),
    "offsets reversed": lambda h: h[tensor(h)].update(data_offsets=[9, 3]),
}
PACKED_HEADERS = {
    "model a number": lambda h: h["__metadata__"].update(model="3"),
    "model a field of another type": lambda h: h["__metadata__"].update(
        model=json.dumps({"hidden_size": [1]})
    ),
    "model a linear of another type": lambda h: h["__metadata__"].update(
        model=json.dumps({"mixer_linear": 3})
    ),
    "model zero": lambda h: h["__metadata__"].update(model=json.dumps({"hidden_size": 0})),
    "model no text": lambda h: h["__metadata__"].update(model=3),
    "bits a list": lambda h: h["__metadata__"].update(bits=["2"]),
    "no bits": lambda h: h["__metadata__"].pop("bits"),
}
SESSION_HEADERS = {
    "architecture a number": lambda h: h["__metadata__"].update(architecture="3"),
    "architecture no text": lambda h: h["__metadata__"].update(architecture=3),
    "architecture a list": lambda h: h["__metadata__"].update(architecture="[1, 2]"),
    "no architecture": lambda h: h["__metadata__"].pop("architecture"),
}


def tensor(header):
    return sorted(header.keys() - {"__metadata__"})[0]


def change_header(source, target, change):
    data = source.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header["__metadata__"].pop("sha256")  # as in files of older versions
    change(header)
    text = json.dumps(header).encode()
    target.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


@pytest.mark.parametrize("kind", [*HEADERS, *SESSION_HEADERS])
def test_a_malformed_session_header_is_one_line(saved, tmp_path, kind):
    change_header(saved[0], tmp_path / "bad", (HEADERS | SESSION_HEADERS)[kind])
    with pytest.raises(CheckpointError) as error:
        load_session(tmp_path / "bad", weights(), CONFIG)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", [*HEADERS, *PACKED_HEADERS])
def test_a_malformed_packed_header_is_one_line(packed_file, tmp_path, kind):
    target = tmp_path / "packed.safetensors"
    change_header(packed_file, target, (HEADERS | PACKED_HEADERS)[kind])
    with pytest.raises(CheckpointError) as error:
        open_model(tmp_path).weights("ternary")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("old", "new"), [(b'eps\\": 1e-0', b'eps\\": 1e-9'), (b'"bits": "2"', b'"bits": "3"')]
)
def test_a_changed_character_of_a_header_is_found(packed_file, tmp_path, old, new):
    data = packed_file.read_bytes()
    assert old in data
    (tmp_path / "packed.safetensors").write_bytes(data.replace(old, new, 1))
    with pytest.raises(CheckpointError, match="header does not match its checksum"):
        open_model(tmp_path)


def test_a_file_of_an_older_version_has_no_checksum_of_its_header(saved, tmp_path):
    change_header(saved[0], tmp_path / "old", lambda header: None)
    session = load_session(tmp_path / "old", weights(), CONFIG)
    assert session.state.position_B.size


@pytest.mark.parametrize("keep", [0, 3, 8, 40, -1])
def test_a_short_file_is_one_line(saved, packed_file, tmp_path, keep):
    for source, target in ((saved[0], "session"), (packed_file, "packed.safetensors")):
        (tmp_path / target).write_bytes(source.read_bytes()[:keep])
    for load in (
        lambda: load_session(tmp_path / "session", weights(), CONFIG),
        lambda: open_model(tmp_path),
    ):
        with pytest.raises(CheckpointError) as error:
            load()
        assert "\n" not in str(error.value)
