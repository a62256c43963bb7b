"""Where an export's tensors come from: a training run, a Hugging Face folder or a packed model.

Trits and scales are made once from master weights; a packed model's are taken as they are.
"""

import dataclasses
import functools
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mmfree_jax.config import ModelConfig
from mmfree_jax.errors import ConfigError
from mmfree_jax.model import functional
from mmfree_jax.model.weights import can_pack
from mmfree_jax.pallas_kernels.packed_matmul import api as packed_matmul
from mmfree_jax.pallas_kernels.ternary_matmul.api import ternarize
from mmfree_jax.saved import load
from mmfree_jax.saved import packed as pack

Path_ = tuple[str, ...]


@dataclass(frozen=True)
class Source:
    """A model's tensors, read one parameter at a time.

    Attributes:
      config: of the model; MatMul-free throughout.
      name: of the folder that they come from.
      dense: gives the parameter at a path in float32, bfloat16 or int8, as it is kept.
      trits: gives the ternary weights at a path, [..., N, K] int8, and scales [..., 1, 1] float32.
      embedding_scale: gives the row scales [V, 1] of an embedding kept in int8.
      tokenizer: file or folder, if the model has one.
      folder: that they are read from; None: they are in memory.
    """

    config: ModelConfig
    name: str
    dense: Callable[[Path_], np.ndarray]
    trits: Callable[[Path_], tuple[np.ndarray, np.ndarray]]
    embedding_scale: Callable[[], np.ndarray]
    tokenizer: Path | None
    folder: Path | None = None

    def lower_bounds(self) -> np.ndarray:
        """The forget gates' lower bounds, [L, E] float32."""
        c = self.config
        if not c.use_lower_bound:
            return np.zeros((c.num_layers, c.state_size), np.float32)
        raw_LE = jnp.asarray(self.dense(("lower_bounds",)))
        return np.asarray(jax.jit(functional.forget_gate_lower_bounds)(raw_LE))


def open_source(path: str | os.PathLike[str], *, step: int | None = None) -> Source:
    """The tensors of a model folder.

    Args:
      path: a training run, a Hugging Face folder or a packed model.
      step: checkpoint of a training run; None: the newest.

    Raises:
      ConfigError: the model is not MatMul-free throughout, or has short convolutions; `step`
        for what is not a training run.
      CheckpointError: the folder is missing, damaged, or holds no model.
    """
    if step is not None and (pack.is_packed(path) or not load.is_run(path)):
        raise ConfigError(f"--step is {step}, but {path} is not a training run")
    name, tokenizer = Path(path).resolve().name, load.find_tokenizer(path)
    if pack.is_packed(path):
        reader, config, bits = pack.open_packed(path)
        check_supported(config)
        return Source(
            config,
            name,
            lambda leaf: reader.read("/".join(leaf)),
            functools.partial(_packed_trits, reader, pack.param_shapes(config), bits),
            lambda: reader.read("embedding/scale"),
            tokenizer,
            Path(path),
        )
    config, leaves = (
        load.run_leaves(path, step=step) if load.is_run(path) else load.folder_leaves(path)
    )
    check_supported(config)
    source = from_leaves(config, leaves, name=name, tokenizer=tokenizer)
    return dataclasses.replace(source, folder=Path(path))


def from_leaves(
    config: ModelConfig,
    load_leaf: Callable[[Path_], Any],
    *,
    name: str = "model",
    tokenizer: Path | None = None,
) -> Source:
    """The tensors of master weights; `load_leaf` as `pack.pack` takes it.

    Raises:
      ConfigError: the model is not MatMul-free throughout, or has short convolutions.
    """
    check_supported(config)

    def trits(leaf: Path_) -> tuple[np.ndarray, np.ndarray]:
        values, scale = _ternarize(jnp.asarray(load_leaf(leaf)))
        return np.asarray(values), np.asarray(scale)

    def no_scale() -> np.ndarray:
        raise ValueError("master weights have no int8 embedding")

    def dense(leaf: Path_) -> np.ndarray:
        return np.asarray(load_leaf(leaf), np.float32)

    return Source(config, name, dense, trits, no_scale, tokenizer)


_ternarize = jax.jit(ternarize)


def _packed_trits(
    reader: Any, shapes: dict[Path_, tuple[int, ...]], bits: str, leaf: Path_
) -> tuple[np.ndarray, np.ndarray]:
    shape, layer = shapes[leaf], "/".join(leaf[:-1])
    size = packed_matmul.packed_columns(shape[-1], bits)
    packed = reader.read(f"{layer}/packed", (*shape[:-1], size))
    scale = reader.read(f"{layer}/scale", (*shape[:-2], 1, 1))
    # One matrix at a time: unpacking takes 16 times the packed bytes.
    trits = np.empty((int(np.prod(shape[:-2])), *shape[-2:]), np.int8)
    for out_NK, packed_NQ in zip(trits, packed.reshape(-1, shape[-2], size), strict=True):
        out_NK[:] = _unpack(jnp.asarray(packed_NQ), shape[-1], bits=bits)
    return trits.reshape(shape), scale


_unpack = jax.jit(packed_matmul.unpack, static_argnums=1, static_argnames="bits")


def check_supported(config: ModelConfig) -> None:
    """Refuses what is not exported.

    Raises:
      ConfigError: names the setting.
    """
    if config.mixer != "mlgru":
        raise ConfigError(
            f"model.mixer is {config.mixer!r}: only MatMul-free models (mixer mlgru) are exported; "
            "for a Transformer++ use `mmfree export-hf` and its own tools"
        )
    if config.short_conv:
        raise ConfigError(
            f"model.short_conv is {config.short_conv}: models with short convolutions are not "
            "exported; train one without"
        )
    if not can_pack(config):
        raise ConfigError(
            f"the model is a {config.family} whose linear layers are not all BitLinear: only "
            "models that are MatMul-free throughout are exported"
        )
