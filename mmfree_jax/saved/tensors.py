"""Folders of safetensors files: checked whole, read shard by shard.

A stored tensor is known by its name; a `Slot` says which part of which parameter it is.
Reading fills the stacked parameters layer by layer on their devices, so that the host never
holds more than the model (where the devices are the host's own) and one stored tensor.
"""

import contextlib
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, Sharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P
from safetensors import SafetensorError, safe_open

from mmfree_jax.errors import CheckpointError
from mmfree_jax.model.parameters import unflatten
from mmfree_jax.parallel.sharding import fitting_spec
from mmfree_jax.saved.kinds import PICKLED
from mmfree_jax.text_files import open_file, read_json

_MOST_NAMED = 100
"""Of the problems of a folder, in one message."""
_FLOATS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclass(frozen=True)
class Slot:
    """Where a stored tensor lies in the parameter tree.

    Attributes:
      path: of the parameter, names joined by slashes.
      shape: of the stored tensor.
      layer: index of the leading layer axis; None: the parameter has none.
      row: first row of the stored tensor within the parameter's (or the layer's) rows.
    """

    path: str
    shape: tuple[int, ...]
    layer: int | None = None
    row: int = 0

    @property
    def param_shape(self) -> tuple[int, ...]:
        """The part's shape in the parameter, which has no axes of length 1 in the middle."""
        return (self.shape[0], *(n for n in self.shape[1:-1] if n != 1), *self.shape[1:][-1:])


TensorMap = Mapping[str, tuple[Slot, ...]]


class TensorFolder:
    """The tensors of one or more safetensors files, opened but not read.

    Attributes:
      folder: that holds the files.
      names: of all tensors.
    """

    def __init__(self, folder: Path, stem: str = "model") -> None:
        self.folder = folder
        self._files: dict[str, Any] = {}
        self._stack = contextlib.ExitStack()
        index = folder / f"{stem}.safetensors.index.json"
        single = folder / f"{stem}.safetensors"
        self.problems: list[str] = []
        if single.is_file():
            self._open(single, None)
        elif index.is_file():
            for file, names in _read_index(index).items():
                self._open(folder / file, names)
        else:
            raise CheckpointError(_nothing_found(folder, stem))

    def _open(self, file: Path, listed: set[str] | None) -> None:
        try:
            open_file(file).close()  # the library would wait for ever for a pipe
        except FileNotFoundError as e:
            raise CheckpointError(
                f"{file} is missing, though the index beside it names it: fetch it again"
            ) from e
        except OSError as e:
            raise CheckpointError(f"{file} cannot be read ({e.strerror}): make it readable") from e
        try:
            handle = self._stack.enter_context(safe_open(str(file), "numpy"))
        except (SafetensorError, OSError) as e:
            reason = " ".join(str(e).split())
            raise CheckpointError(
                f"{file} is damaged or no safetensors file ({reason}): fetch it again"
            ) from e
        for name in handle.keys():  # noqa: SIM118 (not a mapping)
            if name in self._files:
                self.problems.append(f"{name}: stored twice")
            elif listed is not None and name not in listed:
                self.problems.append(f"{name}: in {file.name} but not in the index")
            self._files[name] = handle

    def close(self) -> None:
        """Closes the files."""
        self._stack.close()

    def __enter__(self) -> "TensorFolder":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    @property
    def names(self) -> set[str]:
        """Names of all tensors."""
        return set(self._files)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return tuple(self._files[name].get_slice(name).get_shape())

    def dtype(self, name: str) -> str:
        """Dtype of a tensor as safetensors names it ("F32", ...)."""
        return str(self._files[name].get_slice(name).get_dtype())

    def read(self, name: str, index: tuple[slice, ...] | None = None) -> np.ndarray:
        """A tensor, or the part of it that `index` selects."""
        stored = self._files[name]
        if index is None or not self.shape(name):
            return stored.get_tensor(name)
        return np.asarray(stored.get_slice(name)[index])


def _read_index(file: Path) -> dict[str, set[str]]:
    """File names and the tensors in each, from an index whose names are checked."""
    try:
        weight_map = read_json(file)["weight_map"]
        items = [(str(name), str(target)) for name, target in weight_map.items()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise CheckpointError(f"{file} is damaged ({e}): fetch it again") from e
    files: dict[str, set[str]] = {}
    for name, target in items:
        # A bare name: anything with a folder in it may lead out of this one.
        if Path(target).name != target or "\\" in target or target in ("", ".", ".."):
            raise CheckpointError(
                f"{file} places {name} in {target!r}, which is not a file name: paths that leave "
                "the folder are refused"
            )
        if not target.endswith(".safetensors"):
            raise CheckpointError(
                f"{file} places {name} in {target!r}: only .safetensors files are read"
            )
        files.setdefault(target, set()).add(name)
    if not files:
        raise CheckpointError(f"{file} lists no tensors: fetch it again")
    return files


def _nothing_found(folder: Path, stem: str) -> str:
    pickled = sorted(p.name for p in folder.iterdir() if p.suffix in PICKLED)
    if pickled:
        return (
            f"{folder} has only pickled weights ({', '.join(pickled[:3])}), which can run code "
            "when they are read: convert them to safetensors first"
        )
    return f"{folder} has no {stem}.safetensors and no {stem}.safetensors.index.json"


def read_params(
    tensors: TensorFolder,
    mapping: TensorMap,
    shapes: Mapping[str, jax.ShapeDtypeStruct],
    *,
    mesh: Mesh | None = None,
    ignore: Callable[[str], bool] = lambda name: False,
) -> dict[str, Any]:
    """Reads a parameter tree onto its devices.

    Args:
      tensors: the stored tensors.
      mapping: stored name to the slots that it fills.
      shapes: every parameter's shape and dtype, by path.
      mesh: to lay parameters out on by the sharding table; None: the default device.
      ignore: whether a stored tensor that no slot wants is known and left out.

    Raises:
      CheckpointError: tensors are missing, extra, misshapen, not floating-point, or hold
        values that are not finite; the message lists all of them, up to `_MOST_NAMED`.
      ConfigError: a parameter does not divide evenly over the mesh.
    """
    problems = list(tensors.problems)
    problems += [f"{name}: missing" for name in sorted(mapping.keys() - tensors.names)]
    for name in sorted(tensors.names):
        if name not in mapping:
            if not ignore(name):
                problems.append(f"{name}: not part of this model")
            continue
        expected = mapping[name][0].shape
        if tensors.shape(name) != expected:
            problems.append(f"{name}: shape {list(tensors.shape(name))}, expected {list(expected)}")
        if tensors.dtype(name) not in _FLOATS:
            problems.append(f"{name}: dtype {tensors.dtype(name)}, expected F32, F16 or BF16")
    if problems:
        # Nothing will be loaded: look through the rest too, so that one message tells all.
        for name in sorted(tensors.names & mapping.keys()):
            if tensors.dtype(name) in _FLOATS and not _finite(tensors.read(name)):
                problems.append(f"{name}: values that are not finite")
        raise _problems_error(tensors.folder, problems)

    shardings = {path: _sharding(path, shape, mesh) for path, shape in shapes.items()}
    leaves: dict[str, jax.Array] = {}
    not_finite = []
    for name in sorted(mapping):
        for slot in mapping[name]:
            shape, sharding = shapes[slot.path], shardings[slot.path]
            value, is_finite = _read_slot(tensors, name, slot, shape.dtype, sharding)
            if not is_finite:
                not_finite.append(f"{name}: values that are not finite")
            if value.shape != shape.shape:
                leaf = leaves.pop(slot.path, None)
                leaf = _zeros(shape.shape, shape.dtype, sharding) if leaf is None else leaf
                value = _fill(leaf, value, slot, sharding)
            leaves[slot.path] = value
    if not_finite:
        raise _problems_error(tensors.folder, not_finite)
    return unflatten(leaves)


def _problems_error(folder: Path, problems: Sequence[str]) -> CheckpointError:
    count, shown = len(problems), "; ".join(problems[:_MOST_NAMED])
    if count > _MOST_NAMED:
        shown += f"; and {count - _MOST_NAMED} more"
    return CheckpointError(
        f"{folder} does not fit its config in {count} {'place' if count == 1 else 'places'}: "
        f"{shown}: check that the folder is complete and its config.json is its own"
    )


def _finite(array: np.ndarray) -> bool:
    return bool(np.isfinite(array).all())


def _sharding(path: str, shape: jax.ShapeDtypeStruct, mesh: Mesh | None) -> Sharding:
    if mesh is None:
        (device,) = jnp.zeros(()).devices()
        return SingleDeviceSharding(device)
    return NamedSharding(mesh, fitting_spec(path, shape.shape, mesh))


@functools.lru_cache
def _zeros_program(shape: tuple[int, ...], dtype: Any, sharding: Sharding) -> Callable[[], Any]:
    return jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=sharding)


def _zeros(shape: tuple[int, ...], dtype: Any, sharding: Sharding) -> jax.Array:
    return _zeros_program(tuple(shape), dtype, sharding)()


@functools.lru_cache
def _fill_program(sharding: Sharding) -> Callable[..., jax.Array]:
    def fill(leaf: jax.Array, value: jax.Array, start: tuple[jax.Array, ...]) -> jax.Array:
        return jax.lax.dynamic_update_slice(leaf, value, start)

    return jax.jit(fill, donate_argnums=0, out_shardings=sharding)


def _fill(leaf: jax.Array, value: jax.Array, slot: Slot, sharding: Sharding) -> jax.Array:
    start = [0] * leaf.ndim
    axis = 0
    if slot.layer is not None:
        start[0], axis = slot.layer, 1
    start[axis] = slot.row
    # Numbers enter as arrays, so that one program serves every layer.
    return _fill_program(sharding)(leaf, value, tuple(jnp.int32(s) for s in start))


def _read_slot(
    tensors: TensorFolder, name: str, slot: Slot, dtype: Any, sharding: Sharding
) -> tuple[jax.Array, bool]:
    """The stored tensor laid out as its part of the parameter, and whether it is finite."""
    is_finite = True
    lead = 0 if slot.layer is None else 1
    shape = (1,) * lead + slot.param_shape
    cache: dict[Any, np.ndarray] = {}

    def read(index: Any) -> np.ndarray:
        nonlocal is_finite
        key = tuple((s.start, s.stop) for s in index)
        if key not in cache:
            if slot.param_shape == slot.shape:
                part = tensors.read(name, tuple(index[lead:])).astype(dtype)
            else:
                part = tensors.read(name).astype(dtype).reshape(slot.param_shape)
                part = part[tuple(index[lead:])]
            is_finite = is_finite and _finite(part)
            cache[key] = part.reshape((1,) * lead + part.shape)
        return cache[key]

    if isinstance(sharding, NamedSharding) and not _divides(shape, sharding):
        sharding = NamedSharding(sharding.mesh, P())  # part of a parameter that divides as a whole
    return jax.make_array_from_callback(shape, sharding, read), is_finite


def _divides(shape: tuple[int, ...], sharding: NamedSharding) -> bool:
    sizes = [1 if axis is None else sharding.mesh.shape[axis] for axis in sharding.spec]
    return all(length % size == 0 for length, size in zip(shape, sizes, strict=False))
