"""Saving a session and taking it up again: prompt caching, and conversations that go on.

A file holds the state, the pending logits and which tokens have occurred; for a MatMul-free
model it has the same size after any number of tokens. It is bound to its model by the
architecture and by the mean magnitude of each weight matrix, which a packed model keeps as
its scales: a session may be saved from the trained model and continued with the packed one.
"""

import json
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mmfree_jax.config import NOT_THE_FUNCTION, ModelConfig
from mmfree_jax.config_io import to_dict
from mmfree_jax.errors import CheckpointError
from mmfree_jax.model import Session, State
from mmfree_jax.model.weights import Packed, Weights, matrix_scales
from mmfree_jax.saved.tensor_file import Reader, tensor_writer

FORMAT = "mmfree-session"
VERSION = 1

# Sums over a matrix differ by this much between devices; a training step changes far more.
_TOLERANCE = 1e-5


def _architecture(config: ModelConfig) -> dict[str, Any]:
    values = {k: v for k, v in to_dict(config).items() if k not in NOT_THE_FUNCTION}
    return values | {"intermediate_size": config.glu_size}


def fingerprint(weights: Weights) -> np.ndarray:
    """float32 numbers that tell models apart: the scale of every ternary matrix.

    A model without ternary layers: the mean magnitude of every matrix.
    """
    scales: list[Any] = matrix_scales(weights)
    if not scales and not isinstance(weights, Packed):
        matrices = [x for x in jax.tree.leaves(weights.params) if x.ndim >= 2]
        scales = [jnp.mean(jnp.abs(x.astype(jnp.float32)), axis=(-2, -1)) for x in matrices]
    return np.concatenate([np.asarray(scale, np.float32).ravel() for scale in scales])


def save_session(
    path: str | os.PathLike[str], session: Session, weights: Weights, config: ModelConfig
) -> None:
    """Writes a session, whole or not at all.

    Args:
      path: of the file.
      session: to save; all of its rows.
      weights: of the model that made it (`as_weights`).
      config: of that model.

    Raises:
      OutputError: the file cannot be written.
    """
    arrays = {
        "position": np.asarray(session.state.position_B, np.int32),
        "logits": np.asarray(session.logits_BV, np.float32),
        "seen": np.packbits(np.asarray(session.seen_BV), axis=1),
        "fingerprint": fingerprint(weights),
        **{f"layers/{name}": np.asarray(x) for name, x in session.state.layers.items()},
    }
    with tensor_writer(
        Path(path),
        [(name, x.shape, x.dtype) for name, x in arrays.items()],
        file_format=FORMAT,
        version=VERSION,
        metadata={"architecture": json.dumps(_architecture(config), sort_keys=True)},
    ) as write:
        for name, array in arrays.items():
            write(name, array)


def load_session(path: str | os.PathLike[str], weights: Weights, config: ModelConfig) -> Session:
    """Reads a session for the model whose `weights` and `config` are given.

    Raises:
      CheckpointError: the file is missing, damaged, or of another model.
    """
    reader = Reader(Path(path), file_format=FORMAT, version=VERSION)
    try:
        saved = json.loads(reader.metadata["architecture"])
    except (KeyError, ValueError) as e:
        raise CheckpointError(f"session file {path}: the header is damaged") from e
    wanted = _architecture(config)
    differing = sorted(k for k in saved.keys() | wanted.keys() if saved.get(k) != wanted.get(k))
    if differing:
        raise CheckpointError(
            f"session file {path} is of another model ({differing[0]} is "
            f"{saved.get(differing[0])!r} there, {wanted.get(differing[0])!r} here): load it with "
            "the model that saved it"
        )
    found, here = reader.read("fingerprint"), fingerprint(weights)
    if found.shape != here.shape or not np.allclose(found, here, rtol=_TOLERANCE, atol=0):
        raise CheckpointError(
            f"session file {path} is of a model with other weights: load it with the model that "
            "saved it"
        )
    position_B = reader.read("position")
    layers = {
        name.partition("/")[2]: jnp.asarray(reader.read(name))
        for name in reader.names()
        if name.startswith("layers/")
    }
    seen_BV = np.unpackbits(reader.read("seen"), axis=1, count=config.vocab_size)
    return Session(
        State(jnp.asarray(position_B), layers),
        jnp.asarray(reader.read("logits", (len(position_B), config.vocab_size))),
        jnp.asarray(seen_BV.astype(bool)),
    )
