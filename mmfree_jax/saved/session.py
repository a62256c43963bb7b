"""Saving a session and taking it up again: prompt caching, and conversations that go on.

A file holds the state, the pending logits and which tokens have occurred; for a MatMul-free
model it has the same size after any number of tokens. It is bound to its model by the
architecture and by a fingerprint of all weights (`fingerprint.py`): a session may be saved from
the trained model and continued with the packed one.
"""

import json
import os
import warnings
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mmfree_jax.config_io import model_identity
from mmfree_jax.errors import CheckpointError
from mmfree_jax.model import Session, State, init_state
from mmfree_jax.model.parameters import flatten, unflatten
from mmfree_jax.model.weights import (
    Packed,
    Weights,
    as_weights,
    matrix_scales,
    with_plain_scale,
)
from mmfree_jax.model_config import RUN_SETTINGS, ModelConfig
from mmfree_jax.saved.fingerprint import Fingerprint, fingerprint
from mmfree_jax.saved.tensor_file import Reader, tensor_writer
from mmfree_jax.text_files import parse_json

FORMAT = "mmfree-session"
VERSION = 2


def _architecture(config: ModelConfig) -> dict[str, Any]:
    values = {
        k: v for k, v in model_identity(with_plain_scale(config)).items() if k not in RUN_SETTINGS
    }
    return values | {"intermediate_size": config.glu_size}


def save_session(
    path: str | os.PathLike[str],
    session: Session,
    weights: Weights,
    config: ModelConfig,
    *,
    known: Fingerprint | None = None,
) -> None:
    """Writes a session, whole or not at all.

    Args:
      path: of the file.
      session: to save; all of its rows.
      weights: of the model that made it.
      config: of that model.
      known: the fingerprint of `weights`, for whoever saves many; None: made here.

    Raises:
      OutputError: the file cannot be written.
    """
    arrays = {
        "position": np.asarray(session.state.position_B, np.int32),
        "logits": np.asarray(session.logits_BV, np.float32),
        "seen": np.packbits(np.asarray(session.seen_BV), axis=1),
        **{f"layers/{name}": np.asarray(x) for name, x in flatten(session.state.layers).items()},
    }
    found = (known or fingerprint(weights, config)).tensors()
    arrays |= {f"weights/{name}": x for name, x in found.items()}
    with tensor_writer(
        Path(path),
        [(name, x.shape, x.dtype) for name, x in arrays.items()],
        file_format=FORMAT,
        version=VERSION,
        metadata={"architecture": json.dumps(_architecture(config), sort_keys=True)},
    ) as write:
        for name, array in arrays.items():
            write(name, array)


def load_session(
    path: str | os.PathLike[str],
    weights: Weights,
    config: ModelConfig,
    *,
    known: Fingerprint | None = None,
) -> Session:
    """Reads a session for the model whose `weights` and `config` are given.

    A file of version 1 knows its model by the scales of its matrices alone: it is loaded with a
    warning. `known` is the fingerprint of `weights`, for whoever loads many.

    Raises:
      CheckpointError: the file is missing, damaged, or of another model.
    """
    reader = Reader(Path(path), file_format=FORMAT, version=VERSION)
    try:
        saved = dict(parse_json(reader.metadata["architecture"]))
    except (KeyError, ValueError, TypeError) as e:
        raise CheckpointError(f"session file {path}: the header is damaged") from e
    wanted = _architecture(config)
    differing = sorted(k for k in saved.keys() | wanted.keys() if saved.get(k) != wanted.get(k))
    if differing:
        raise CheckpointError(
            f"session file {path} is of another model ({differing[0]} is "
            f"{saved.get(differing[0])!r} there, {wanted.get(differing[0])!r} here): load it with "
            "the model that saved it"
        )
    if not _same_weights(path, reader, weights, config, known):
        raise CheckpointError(
            f"session file {path} is of a model with other weights: load it with the model that "
            "saved it"
        )
    return _read_session(path, reader, config)


def _same_weights(
    path: str | os.PathLike[str],
    reader: Reader,
    weights: Weights,
    config: ModelConfig,
    known: Fingerprint | None,
) -> bool:
    if reader.version > 1:
        here = known or fingerprint(weights, config)
        return here.matches({name: reader.read(f"weights/{name}") for name in here.tensors()})
    warnings.warn(
        f"session file {path} is of an older version, which may take another model for its own: "
        "save the session again",
        stacklevel=3,
    )
    weights = as_weights(weights, config)
    scales: list[Any] = matrix_scales(weights)
    if not scales and not isinstance(weights, Packed):
        matrices = [x for x in jax.tree.leaves(weights.params) if x.ndim >= 2]
        scales = [jnp.mean(jnp.abs(x.astype(jnp.float32)), axis=(-2, -1)) for x in matrices]
    means = np.concatenate([np.asarray(scale, np.float32).ravel() for scale in scales])
    found = reader.read("fingerprint")
    return found.shape == means.shape and np.allclose(found, means, rtol=1e-5, atol=0)


def _read_session(path: str | os.PathLike[str], reader: Reader, config: ModelConfig) -> Session:
    position_B = reader.read("position")
    layers = {
        name.removeprefix("layers/"): reader.read(name)
        for name in reader.names()
        if name.startswith("layers/")
    }
    caches = [x for name, x in layers.items() if name.split("/")[-1] == "k" and x.ndim == 5]
    places = caches[0].shape[2] if caches else 1
    rows = position_B.size
    wanted = flatten(jax.eval_shape(lambda: init_state(config, rows, places)).layers)
    for name, x in wanted.items():
        if name.split("/")[-1] == "start" and name not in layers:
            # Files of before: none began a document within a row.
            layers[name] = np.zeros(x.shape, x.dtype)
    shapes = {name: x.shape for name, x in layers.items()}
    right = shapes == {name: x.shape for name, x in wanted.items()}
    if not right or position_B.shape != (rows,) or (position_B < 0).any():
        raise CheckpointError(
            f"session file {path}: its state has not the shapes of the model's: it is damaged; "
            "make it again"
        )
    seen = reader.read("seen", (rows, -(-config.vocab_size // 8)))
    seen_BV = np.unpackbits(seen, axis=1, count=config.vocab_size)
    return Session(
        State(jnp.asarray(position_B), jax.tree.map(jnp.asarray, unflatten(layers))),
        jnp.asarray(reader.read("logits", (rows, config.vocab_size))),
        jnp.asarray(seen_BV.astype(bool)),
    )
