"""Packed models on disk: trits at 2 or 1.6 bits and one scale a matrix.

A packed model is a folder with `packed.safetensors` and, if the model has one, its
`tokenizer/`. The tensors are named by their parameter's path:

    blocks/mixer/i_proj/packed  [L, N, Q] uint8     the format of `packed_matmul/reference.py`
    blocks/mixer/i_proj/scale   [L, 1, 1] float32   W is about trits * scale; with
                                model.weight_scale "groups" [L, N, K / 128], one for each 128
                                inputs of each output
    embedding/weight            [V, D] float32, bfloat16, or int8 with
    embedding/scale             [V, 1] float32
    all others                  float32: they are few; in bfloat16, as earlier versions kept
                                the norms, they change the model's greedy text

With a largest size given, the tensors lie in several such files (`split_file.py`; version 2), of
which the others are `packed-00002-of-00003.safetensors` and so on.

The metadata may hold how far greedy streams agree with the unpacked model's (`StreamAgreement`).
`pack.py` writes them, `open_model` opens them.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from mmfree_jax.config_io import from_dict
from mmfree_jax.errors import CheckpointError, ConfigError
from mmfree_jax.model.packing import for_this_device, packed_from_tree, refuse_unpackable
from mmfree_jax.model.parameters import flatten, param_shapes, unflatten
from mmfree_jax.model.weights import Packed, Params, Ternary, is_ternary, scale_shape
from mmfree_jax.model_config import ModelConfig
from mmfree_jax.pallas_kernels.packed_matmul import api as packed_matmul
from mmfree_jax.pallas_kernels.ternary_matmul.api import scaled
from mmfree_jax.saved.kinds import PACKED_FILE
from mmfree_jax.saved.split_file import SplitReader
from mmfree_jax.saved.tensor_file import tensor_writer
from mmfree_jax.text_files import parse_json

EMBEDDING = "embedding/weight"
FORMAT = "mmfree-packed"
VERSION = 2

Bits = Literal["2", "1.6"]
EmbeddingDtype = Literal["float32", "bfloat16", "int8"]

_AGREEMENT = "agreement"

_pack = jax.jit(packed_matmul.pack, static_argnames="bits")
_unpack = jax.jit(packed_matmul.unpack, static_argnums=1, static_argnames="bits")


@dataclasses.dataclass(frozen=True)
class StreamAgreement:
    """How far two models' greedy continuations of the same prompts agree.

    Attributes:
      new_tokens: of each continuation.
      agreed: for each prompt the tokens before the first that differs; `new_tokens` where none
        does.
      prompts: what they were.
    """

    new_tokens: int
    agreed: tuple[int, ...]
    prompts: str

    @property
    def kept(self) -> int:
        """Prompts whose continuations are equal."""
        return sum(count == self.new_tokens for count in self.agreed)

    def __str__(self) -> str:
        text = (
            f"{self.kept} of {len(self.agreed)} prompts ({self.prompts}) keep the unpacked "
            f"model's {self.new_tokens} greedy tokens"
        )
        if self.kept == len(self.agreed):
            return text
        return f"{text}; the first to part does after {min(self.agreed)}"


@dataclasses.dataclass(frozen=True)
class PackedFile:
    """A packed model, opened.

    Attributes:
      reader: of its tensors.
      config: of the model; without what only master weights have a use for.
      bits: a weight, "2" or "1.6".
      agreement: with the model that it was made of; None: not measured.
    """

    reader: SplitReader
    config: ModelConfig
    bits: str
    agreement: StreamAgreement | None = None

    @property
    def embedding(self) -> EmbeddingDtype:
        """The dtype in which the embedding is kept, as the header says.

        Raises:
          CheckpointError: it is missing, or in another dtype than is written.
        """
        name = self.reader.dtype(EMBEDDING).name
        for dtype in get_args(EmbeddingDtype):
            if dtype == name:
                return dtype
        raise CheckpointError(f"packed model: {EMBEDDING} is in {name}: make it again")

    def matrix(self, name: str, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
        """The packed rows [.., N, Q] and scales [.., 1, 1] of the ternary weight `name`.

        Raises:
          CheckpointError: they are missing, of another shape, or damaged.
        """
        layer = name.rpartition("/")[0]
        size = packed_matmul.packed_columns(shape[-1], self.bits)
        return (
            self.reader.read(f"{layer}/packed", (*shape[:-1], size)),
            self.reader.read(f"{layer}/scale", scale_shape(shape, self.config)),
        )

    def ternary(self, name: str, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
        """The trits [.., N, K] int8 and scales of the ternary weight `name`; errors as `matrix`."""
        packed, scale = self.matrix(name, shape)
        # One matrix at a time: unpacking takes 16 times the packed bytes.
        trits = np.empty((int(np.prod(shape[:-2])), *shape[-2:]), np.int8)
        rows = packed.reshape(-1, *packed.shape[-2:])
        for out_NK, packed_NQ in zip(trits, rows, strict=True):
            out_NK[:] = _unpack(jnp.asarray(packed_NQ), shape[-1], bits=self.bits)
        return trits.reshape(shape), scale


def open_packed(folder: Path) -> PackedFile:
    """Opens a packed model.

    Raises:
      CheckpointError: it is missing, damaged or too new.
    """
    reader = SplitReader(folder / PACKED_FILE, file_format=FORMAT, version=VERSION)
    try:
        config = from_dict(ModelConfig, parse_json(reader.metadata["model"]))
        bits = reader.metadata["bits"]
        packed_matmul.FORMATS[bits]
        agreement = _read_agreement(reader)
    except (KeyError, ValueError, TypeError, ConfigError) as e:
        raise CheckpointError(f"packed model {folder}: the header is damaged: {e}") from e
    # There are no master weights for the plain program to ternarise, and no training.
    config = dataclasses.replace(config, bitlinear="fused", remat="none")
    return PackedFile(reader, config, bits, agreement)


def packed_files(folder: Path) -> list[Path]:
    """The files of a packed model's tensors, the one that is opened first.

    Raises:
      CheckpointError: one is missing or damaged.
    """
    return [folder / PACKED_FILE, *(folder / name for name in open_packed(folder).reader.parts)]


def _read_agreement(reader: SplitReader) -> StreamAgreement | None:
    if (text := reader.metadata.get(_AGREEMENT)) is None:
        return None
    values = parse_json(text)
    return StreamAgreement(values["new_tokens"], tuple(values["agreed"]), values["prompts"])


def agreement_metadata(agreement: StreamAgreement) -> dict[str, str]:
    """How it stands in a packed file's metadata."""
    return {_AGREEMENT: json.dumps(dataclasses.asdict(agreement))}


def record_agreement(file: Path, agreement: StreamAgreement) -> None:
    """Writes into a packed file, the first where it is split, how far it agrees with its model.

    Raises:
      CheckpointError: the file is damaged.
      OutputError: it cannot be written.
    """
    reader = SplitReader(file, file_format=FORMAT, version=VERSION)
    metadata = reader.written | agreement_metadata(agreement)
    with tensor_writer(
        file, reader.tensors(), file_format=FORMAT, version=reader.version, metadata=metadata
    ) as write:
        for name in reader.own_names():
            write(name, reader.read(name))


def read_ternary(file: PackedFile) -> Ternary:
    """All weights, the ternary ones as int8 trits; raises as `PackedFile.matrix`."""
    params: dict[str, Any] = {}
    ternary: dict[str, Any] = {}
    for name, shape in param_shapes(file.config).items():
        layer = name.rpartition("/")[0]
        if is_ternary(file.config, tuple(name.split("/"))):
            packed, scale = map(jnp.asarray, file.matrix(name, shape.shape))
            ternary[f"{layer}/trits"] = _unpack(packed, shape.shape[-1], bits=file.bits)
            ternary[f"{layer}/scale"] = scale
        else:
            value, row_scale = _read_dense(file, name, shape.shape)
            params[name] = value if row_scale is None else value.astype(jnp.float32) * row_scale
    return Ternary(unflatten(params), unflatten(ternary))


def read_packed(file: PackedFile) -> Packed:
    """All weights, at 2 bits, in the layout that this device's kernels read.

    Raises:
      CheckpointError: as `PackedFile.matrix`.
      ConfigError: it cannot run packed.
    """
    refuse_unpackable(file.config)
    tensors: dict[str, Any] = {}
    for name, shape in param_shapes(file.config).items():
        layer = name.rpartition("/")[0]
        if is_ternary(file.config, tuple(name.split("/"))):
            packed, scale = map(jnp.asarray, file.matrix(name, shape.shape))
            if file.bits != "2":
                packed = _pack(_unpack(packed, shape.shape[-1], bits=file.bits), bits="2")
            tensors |= {f"{layer}/packed": packed, f"{layer}/scale": scale}
        else:
            tensors[name], row_scale = _read_dense(file, name, shape.shape)
            if row_scale is not None:
                tensors[f"{layer}/scale"] = row_scale
    return for_this_device(packed_from_tree(unflatten(tensors), file.config))


def _read_dense(
    file: PackedFile, name: str, shape: tuple[int, ...]
) -> tuple[jax.Array, jax.Array | None]:
    """A parameter that is not ternary, as it is kept, and the row scales of an int8 one."""
    value = jnp.asarray(file.reader.read(name, shape))
    if value.dtype != jnp.int8:
        return value, None
    layer = name.rpartition("/")[0]
    return value, jnp.asarray(file.reader.read(f"{layer}/scale", (shape[0], 1)))


def read_master(file: PackedFile) -> Params:
    """Parameters that ternarise to the packed trits and scales; raises as `PackedFile.matrix`."""
    weights = read_ternary(file)
    params, ternary = flatten(weights.params), flatten(weights.ternary)
    for name in [name for name in ternary if name.endswith("/trits")]:
        layer = name.removesuffix("/trits")
        params[f"{layer}/weight"] = _unternarize(ternary[name], ternary[f"{layer}/scale"])
    # The bfloat16 of stored norms widens without loss.
    shapes = param_shapes(file.config)
    return unflatten({name: params[name].astype(shape.dtype) for name, shape in shapes.items()})


@jax.jit
def _unternarize(trits: jax.Array, scale: jax.Array) -> jax.Array:
    """Weights whose absmean is `scale` and which round to `trits`: s t / (share that is not 0)."""
    if scale.shape[-2:] != (1, 1):
        groups = trits.reshape(*scale.shape, -1)
        filled = jnp.mean(jnp.abs(groups.astype(jnp.float32)), axis=-1)
        return scaled(trits, scale / jnp.maximum(filled, 1e-9))
    filled = jnp.mean(jnp.abs(trits.astype(jnp.float32)), axis=(-2, -1), keepdims=True)
    return trits * (scale / jnp.maximum(filled, 1e-9))
