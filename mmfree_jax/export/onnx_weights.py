"""The data file of an ONNX export: tensors one behind another, written as they are made."""

import hashlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import onnx
from onnx import TensorProto

from mmfree_jax.export.onnx_graph import BLOCK, ZERO_CODE, ones_name, padded_columns
from mmfree_jax.model.packing import lower_bounds
from mmfree_jax.saved.open_model import SavedModel
from mmfree_jax.saved.pack import quantize_rows

Embedding = Literal["float32", "bfloat16", "int8"]

# Runtimes map the file into memory; a tensor that begins on a page is used from there.
_PAGE = 4096
_DTYPES = {
    np.dtype(np.float32): TensorProto.FLOAT,
    np.dtype(ml_dtypes.bfloat16): TensorProto.BFLOAT16,
    np.dtype(np.int8): TensorProto.INT8,
    np.dtype(np.uint8): TensorProto.UINT8,
}
_MIXER = ("i_proj", "f_proj", "g_proj", "o_proj")
_GLU = ("gate_up_proj", "down_proj")


class DataFile:
    """Appends tensors to a file; remembers where each lies, and the file's checksum."""

    def __init__(self, path: Path) -> None:
        self._path, self._file = path, path.open("wb")
        self._digest = hashlib.sha256()
        self.tensors: list[onnx.TensorProto] = []

    def write(self, name: str, array: np.ndarray) -> None:
        """Appends one tensor."""
        start = self._file.tell()
        if array.nbytes >= _PAGE:
            self._append(bytes(-start % _PAGE))
            start = self._file.tell()
        self._append(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
        tensor = TensorProto(name=name, data_type=_DTYPES[array.dtype], dims=array.shape)
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in (
            ("location", self._path.name),
            ("offset", start),
            ("length", array.nbytes),
        ):
            tensor.external_data.add(key=key, value=str(value))
        self.tensors.append(tensor)

    def _append(self, data: bytes | memoryview) -> None:
        self._file.write(data)
        self._digest.update(data)

    def close(self) -> dict[str, int | str]:
        """Ends the file; returns its size and checksum, as `export.json` lists them."""
        size = self._file.tell()
        self._file.close()
        return {"bytes": size, "sha256": self._digest.hexdigest()}


def two_bit_codes(trits_NK: np.ndarray, *, padded: bool) -> np.ndarray:
    """The operator's form of a matrix: [N, C, b / 4] uint8, four codes a byte, the first lowest.

    Args:
      trits_NK: int8 in {-1, 0, +1}.
      padded: one column of weight zero closes each block.
    """
    N, K = trits_NK.shape
    real = BLOCK - 1 if padded else BLOCK
    blocks = -(-K // real)
    codes_NCb = np.full((N, blocks * real), ZERO_CODE, np.uint8)
    codes_NCb[:, :K] = trits_NK + ZERO_CODE
    codes_NCb = codes_NCb.reshape(N, blocks, real)
    if padded:
        codes_NCb = np.pad(codes_NCb, ((0, 0), (0, 0), (0, 1)), constant_values=ZERO_CODE)
    four = codes_NCb.reshape(N, blocks, BLOCK // 4, 4)
    return four[..., 0] | four[..., 1] << 2 | four[..., 2] << 4 | four[..., 3] << 6


def write_weights(model: SavedModel, file: DataFile, *, padded: bool, embedding: Embedding) -> None:
    """Writes every tensor that the graphs of `onnx_graph` read, holding one parameter at a time."""
    c = model.config
    _write_embedding(model, file, embedding)
    raw_LD = jnp.asarray(model.leaf("lower_bounds")) if c.use_lower_bound else None
    for layer, bound_E in enumerate(np.asarray(lower_bounds(raw_LD, c))):
        file.write(f"layers.{layer}.lower_bound", bound_E)
    for name, path in (
        ("mixer_norm", "blocks/mixer_norm/scale"),
        ("glu_norm", "blocks/glu_norm/scale"),
        ("gate_norm", "blocks/mixer/gate_norm/scale"),
    ):
        for layer, scale_D in enumerate(_float32(model.leaf(path))):
            file.write(f"layers.{layer}.{name}", scale_D)
    file.write("final_norm", _float32(model.leaf("final_norm/scale")))
    shapes: set[tuple[int, int]] = set()
    for name, path in _linears():
        trits, scales = model.ternary(f"{path}/weight")
        norms = _float32(model.leaf(f"{path}/norm_scale"))
        N, K = trits.shape[-2:]
        trits, scales = trits.reshape(-1, N, K), scales.reshape(-1)
        names = [name] if name == "head" else [f"layers.{i}.{name}" for i in range(c.num_layers)]
        for layer, trits_NK, scale, norm_K in zip(
            names, trits, scales, norms.reshape(-1, K), strict=True
        ):
            file.write(f"{layer}.codes", two_bit_codes(trits_NK, padded=padded))
            file.write(f"{layer}.matrix_scale", np.array(scale, np.float32))
            file.write(f"{layer}.norm_scale", norm_K)
        shapes.add((N, padded_columns(K) if padded else K))
    for name, (N, K) in {ones_name(*shape): shape for shape in shapes}.items():
        file.write(name, np.ones(N * math.ceil(K / BLOCK), np.float32))


def _linears() -> Iterator[tuple[str, str]]:
    for group, names in (("mixer", _MIXER), ("glu", _GLU)):
        for name in names:
            yield name, f"blocks/{group}/{name}"
    yield "head", "head"


def _write_embedding(model: SavedModel, file: DataFile, embedding: Embedding) -> None:
    table_VD = model.leaf("embedding/weight")
    if embedding == "int8":
        if table_VD.dtype == np.int8:
            scale_V1 = model.leaf("embedding/scale")
        else:
            table_VD, scale_V1 = map(np.asarray, quantize_rows(jnp.asarray(_float32(table_VD))))
        file.write("embedding.scale", scale_V1)
    elif embedding == "bfloat16":
        table_VD = _float32_rows(model, table_VD).astype(ml_dtypes.bfloat16)
    else:
        table_VD = _float32_rows(model, table_VD)
    file.write("embedding", table_VD)


def _float32_rows(model: SavedModel, table_VD: np.ndarray) -> np.ndarray:
    if table_VD.dtype == np.int8:
        return table_VD.astype(np.float32) * model.leaf("embedding/scale")
    return _float32(table_VD)


def _float32(array: np.ndarray) -> np.ndarray:
    return array.astype(np.float32)
