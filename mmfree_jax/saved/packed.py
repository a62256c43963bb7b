"""Packed models: trits at 2 or 1.6 bits and one scale a matrix, made once from trained weights.

A packed model is a folder with `packed.safetensors` and, if the model has one, its
`tokenizer/`. The tensors are named by their parameter's path:

    blocks/mixer/i_proj/packed  [L, N, Q] uint8     the format of `packed_matmul/reference.py`
    blocks/mixer/i_proj/scale   [L, 1, 1] float32   W is about trits * scale
    embedding/weight            [V, D] bfloat16, or int8 with embedding/scale [V, 1] float32
    lower_bounds                [L, D] float32      always: the forget gate is sensitive
    all others                  bfloat16 (or float32, if asked)

Ternarising is not idempotent, so a packed model is never packed again.
"""

import dataclasses
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from mmfree_jax.config import ModelConfig
from mmfree_jax.config_io import from_dict, to_dict
from mmfree_jax.errors import CheckpointError, ConfigError
from mmfree_jax.files import disk_errors
from mmfree_jax.model import LanguageModel
from mmfree_jax.model.weights import (
    Packed,
    Ternary,
    can_pack,
    for_this_device,
    is_ternary,
    packed_from_tree,
)
from mmfree_jax.pallas_kernels.packed_matmul import api as packed_matmul
from mmfree_jax.pallas_kernels.ternary_matmul.api import ternarize
from mmfree_jax.saved.tensor_file import Reader, tensor_writer

FILE = "packed.safetensors"
FORMAT = "mmfree-packed"
VERSION = 1

Path_ = tuple[str, ...]
LoadLeaf = Callable[[Path_], Any]


@dataclass(frozen=True)
class PackReport:
    """What `pack` made.

    Attributes:
      file: the packed file.
      num_bytes: of the file.
      weights: ternary weights in it.
      embedding_error: relative RMS error of the stored embedding against the master's.
    """

    file: Path
    num_bytes: int
    weights: int
    embedding_error: float


def is_packed(path: str | os.PathLike[str]) -> bool:
    """Whether `path` is the folder of a packed model."""
    return (Path(path) / FILE).is_file()


def param_shapes(config: ModelConfig) -> dict[Path_, tuple[int, ...]]:
    """Path and shape of every parameter of a model."""
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    tree = jax.eval_shape(LanguageModel(config).init, jax.random.key(0), tokens)["params"]
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {tuple(key.key for key in path): leaf.shape for path, leaf in leaves}


def pack(
    config: ModelConfig,
    load_leaf: LoadLeaf,
    out: str | os.PathLike[str],
    *,
    bits: Literal["2", "1.6"] = "2",
    int8_embedding: bool = False,
    dense_dtype: Literal["bfloat16", "float32"] = "bfloat16",
    tokenizer: Path | None = None,
) -> PackReport:
    """Writes a packed model, holding one parameter at a time.

    Args:
      config: of the model.
      load_leaf: gives the master parameter at a path, for example
        ("blocks", "glu", "down_proj", "weight"); see `leaves_of` and `load.run_leaves`.
      out: folder to make.
      bits: a weight: "2", which kernels read directly, or "1.6", a fifth smaller on disk.
      int8_embedding: store the embedding in int8 with one scale a row.
      dense_dtype: of the norms and the embedding; float32 keeps them exactly.
      tokenizer: file or folder to copy beside the weights.

    Raises:
      ConfigError: the model has no ternary layer, or `out` holds a packed model.
      OutputError: `out` cannot be written to.
    """
    if bits not in packed_matmul.FORMATS:
        raise ConfigError(f"bits is {bits!r}: choose one of {', '.join(packed_matmul.FORMATS)}")
    folder = Path(out)
    if is_packed(folder):
        raise ConfigError(f"out is {folder}: it holds a packed model; choose another folder")
    shapes = param_shapes(config)
    if not any(is_ternary(config, path) for path in shapes):
        raise ConfigError("the model has no ternary layer: there is nothing to pack")
    dense = np.dtype(ml_dtypes.bfloat16 if dense_dtype == "bfloat16" else np.float32)

    tensors: list[tuple[str, tuple[int, ...], Any]] = []
    for path, shape in shapes.items():
        name = "/".join(path)
        layer = "/".join(path[:-1])
        if is_ternary(config, path):
            size = packed_matmul.packed_columns(shape[-1], bits)
            tensors.append((f"{layer}/packed", (*shape[:-1], size), np.uint8))
            tensors.append((f"{layer}/scale", (*shape[:-2], 1, 1), np.float32))
        elif path == ("embedding", "weight") and int8_embedding:
            tensors.append((name, shape, np.int8))
            tensors.append((f"{layer}/scale", (shape[0], 1), np.float32))
        else:
            tensors.append((name, shape, np.float32 if path == ("lower_bounds",) else dense))

    metadata = {"bits": bits, "model": json.dumps(to_dict(config))}
    embedding_error = 0.0
    with disk_errors(folder):
        with tensor_writer(
            folder / FILE, tensors, file_format=FORMAT, version=VERSION, metadata=metadata
        ) as write:
            pending = iter(tensors)
            for path, shape in shapes.items():
                master = load_leaf(path)
                if master.shape != shape:
                    raise CheckpointError(
                        f"parameter {'/'.join(path)} has shape {master.shape}, but the config "
                        f"needs {shape}: the weights are of another model"
                    )
                if is_ternary(config, path):
                    trits, scale = _ternarize_and_pack(jnp.asarray(master), bits=bits)
                    write(next(pending)[0], np.asarray(trits))
                    write(next(pending)[0], np.asarray(scale))
                    continue
                master = np.asarray(master, np.float32)
                if path == ("embedding", "weight") and int8_embedding:
                    values, scale = _quantize_rows(master)
                    stored = values.astype(np.float32) * scale
                    write(next(pending)[0], values)
                    write(next(pending)[0], scale)
                else:
                    name, _, dtype = next(pending)
                    write(name, master.astype(dtype))
                    stored = master.astype(dtype).astype(np.float32)
                if path == ("embedding", "weight"):
                    embedding_error = _relative_error(stored, master)
        if tokenizer is not None:
            _copy_tokenizer(tokenizer, folder)
    weights = sum(int(np.prod(shape)) for path, shape in shapes.items() if is_ternary(config, path))
    size = (folder / FILE).stat().st_size
    return PackReport(folder / FILE, size, weights, embedding_error)


@jax.jit
def _ternarize(master: jax.Array) -> tuple[jax.Array, jax.Array]:
    return ternarize(master)


def _ternarize_and_pack(master: jax.Array, *, bits: str) -> tuple[jax.Array, jax.Array]:
    trits, scale = _ternarize(master)
    return _pack(trits, bits=bits), scale


_pack = jax.jit(packed_matmul.pack, static_argnames="bits")
_unpack = jax.jit(packed_matmul.unpack, static_argnums=1, static_argnames="bits")


def _quantize_rows(table: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Each row to int8 by its largest magnitude, and the rows' scales [V, 1]."""
    scale = np.maximum(np.abs(table).max(-1, keepdims=True), 1e-12).astype(np.float32) / 127
    return np.clip(np.rint(table / scale), -127, 127).astype(np.int8), scale


def _relative_error(stored: np.ndarray, master: np.ndarray) -> float:
    size = float(np.sqrt(np.mean(np.square(master))))
    return float(np.sqrt(np.mean(np.square(stored - master)))) / size if size else 0.0


def _copy_tokenizer(source: Path, folder: Path) -> None:
    if source.is_dir():
        shutil.copytree(source, folder / "tokenizer", dirs_exist_ok=True)
    else:
        shutil.copy2(source, folder / source.name)


def leaves_of(params: dict[str, Any]) -> LoadLeaf:
    """`load_leaf` for a parameter tree in memory."""

    def load(path: Path_) -> Any:
        leaf: Any = params
        for name in path:
            leaf = leaf[name]
        return leaf

    return load


def open_packed(path: str | os.PathLike[str]) -> tuple[Reader, ModelConfig, str]:
    """The reader, the model's config and the bits of a packed model.

    Raises:
      CheckpointError: it is missing, damaged or too new.
    """
    reader = Reader(Path(path) / FILE, file_format=FORMAT, version=VERSION)
    try:
        config = from_dict(ModelConfig, json.loads(reader.metadata["model"]))
        bits = reader.metadata["bits"]
        packed_matmul.FORMATS[bits]
    except (KeyError, ValueError, ConfigError) as e:
        raise CheckpointError(f"packed model {path}: the header is damaged: {e}") from e
    return reader, config, bits


def load_packed(
    path: str | os.PathLike[str],
    *,
    compute_dtype: str | None = None,
    keep_packed: bool | None = None,
) -> tuple[LanguageModel, Packed | Ternary]:
    """A packed model for `generate`.

    Args:
      path: folder of the packed model.
      compute_dtype: in place of the trained model's ("float32", "bfloat16").
      keep_packed: True: the weights stay at 2 bits on the device, `Packed`; False: int8 trits,
        `Ternary`. None: packed on an accelerator, for every MatMul-free model; trits on the CPU,
        where they are faster.

    Raises:
      CheckpointError: the file is missing, truncated or tampered with.
      ConfigError: keep_packed=True for an architecture that is not MatMul-free throughout.
    """
    reader, config, bits = open_packed(path)
    if compute_dtype is not None:
        config = dataclasses.replace(
            config, compute_dtype=compute_dtype, residual_dtype=compute_dtype
        )
    # A packed model has no master weights for the plain program to ternarise.
    config = dataclasses.replace(config, bitlinear="fused", remat="none")
    supported = can_pack(config)
    if keep_packed and not supported:
        raise ConfigError(
            f"keep_packed is True, but the model is a {config.family}: only models that are "
            "MatMul-free throughout run packed"
        )
    if keep_packed is None:
        keep_packed = supported and jax.default_backend() != "cpu"

    dense: dict[str, Any] = {}
    ternary: dict[str, Any] = {}
    for leaf_path, shape in param_shapes(config).items():
        layer = "/".join(leaf_path[:-1])
        if is_ternary(config, leaf_path):
            size = packed_matmul.packed_columns(shape[-1], bits)
            packed = jnp.asarray(reader.read(f"{layer}/packed", (*shape[:-1], size)))
            scale = jnp.asarray(reader.read(f"{layer}/scale", (*shape[:-2], 1, 1)))
            if keep_packed:
                if bits != "2":
                    packed = _pack(_unpack(packed, shape[-1], bits=bits), bits="2")
                _put(dense, (*leaf_path[:-1], "packed"), packed)
                _put(dense, (*leaf_path[:-1], "scale"), scale)
            else:
                _put(ternary, (*leaf_path[:-1], "trits"), _unpack(packed, shape[-1], bits=bits))
                _put(ternary, (*leaf_path[:-1], "scale"), scale)
            continue
        value = jnp.asarray(reader.read("/".join(leaf_path), shape))
        if leaf_path == ("embedding", "weight") and value.dtype == jnp.int8:
            scale = jnp.asarray(reader.read(f"{layer}/scale", (shape[0], 1)))
            if keep_packed:
                _put(dense, (*leaf_path[:-1], "scale"), scale)
            else:
                value = value.astype(jnp.float32) * scale
        _put(dense, leaf_path, value)
    if not keep_packed:
        return LanguageModel(config), Ternary(dense, ternary)
    return LanguageModel(config), for_this_device(packed_from_tree(dense, config))


def _put(tree: dict[str, Any], path: Path_, value: Any) -> None:
    for name in path[:-1]:
        tree = tree.setdefault(name, {})
    tree[path[-1]] = value
