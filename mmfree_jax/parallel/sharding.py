"""The mesh, and the one table that says how each parameter is laid out on it."""

import bisect
import math
import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from mmfree_jax.config import MeshConfig, TrainConfig
from mmfree_jax.errors import ConfigError
from mmfree_jax.model_config import GROUP

# Outermost first: what lies further out may cross a slower network. Between slices or hosts
# only the data axis should, then fsdp; a row's pieces and a matrix's are exchanged in every
# layer, and stay within a host.
AXES = ("data", "fsdp", "sequence", "tensor")

# A batch [B, T] is split over every axis that holds tokens of its own.
_ROWS = ("data", "fsdp")
BATCH = P(_ROWS, "sequence")

# Parameter path -> layout. Matrices are [out, in], those of blocks with a leading layer axis; of a
# pattern of mixers each layer of its period has a name.
# Tensor parallelism splits the outputs of the projections that read the residual stream and
# the inputs of those that write it, so that each pair needs one reduction. Where no matrix is
# split over tensor, fsdp splits outputs throughout (`fitting_spec`).
_TABLE: tuple[tuple[str, P], ...] = (
    (r"embedding/weight", P("tensor", "fsdp")),
    (r"lower_bounds", P()),
    (r"blocks/(layer\d+/)?(mixer|glu)_norm/scale", P()),
    # By how mixers call them, those outside the package too (docs/adding-a-mixer.md).
    (r"blocks/(layer\d+/)?mixer/o_proj/weight", P(None, "fsdp", "tensor")),
    (r"blocks/(layer\d+/)?mixer/\w+_proj/weight", P(None, "tensor", "fsdp")),
    (r"blocks/(layer\d+/)?mixer/(\w+|\w+_norm/scale)", P()),
    (r"blocks/(layer\d+/)?mixer/(conv|i_conv|f_conv)/kernel", P()),
    (r"blocks/(layer\d+/)?mixer/[qkvo]_proj/bias", P()),
    (r"blocks/(layer\d+/)?glu/gate_up_proj/weight", P(None, "tensor", "fsdp")),
    (r"blocks/(layer\d+/)?glu/down_proj/weight", P(None, "fsdp", "tensor")),
    (r"blocks/(layer\d+/)?(mixer|glu)/\w+_proj/(norm|log)_scale", P()),
    (r"final_norm/scale", P()),
    (r"head/weight", P("tensor", "fsdp")),
    (r"head/(norm|log)_scale", P()),
)


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """Arranges devices on the axes data, fsdp, sequence and tensor, neighbours innermost.

    Devices of several slices (TPU) or hosts (GPU) are arranged so that as little as possible
    crosses the network between them: the data axis first, then fsdp.

    Args:
      config: the axes' sizes; data = -1 takes what the others leave.
      devices: to arrange; None: all.

    Raises:
      ConfigError: the sizes do not multiply to the number of devices, or cannot be divided
        over the slices.

    Example:
      >>> import jax
      >>> from mmfree_jax import MeshConfig
      >>> from mmfree_jax.train import make_mesh
      >>> dict(make_mesh(MeshConfig(), jax.devices()[:1]).shape)
      {'data': 1, 'fsdp': 1, 'sequence': 1, 'tensor': 1}
    """
    devices = jax.devices() if devices is None else devices
    shape = mesh_shape(config, len(devices))
    return Mesh(_arrange(devices, shape), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def mesh_shape(config: MeshConfig, count: int) -> tuple[int, ...]:
    """The sizes of `AXES` on `count` devices.

    Raises:
      ConfigError: they do not multiply to it.
    """
    inner = config.fsdp * config.sequence * config.tensor
    if config.data == -1 and count % inner:
        raise ConfigError(
            f"mesh.fsdp x mesh.sequence x mesh.tensor is {config.fsdp} x {config.sequence} x "
            f"{config.tensor} = {inner}: set --mesh.fsdp, --mesh.sequence and --mesh.tensor so "
            f"that it divides the {count} devices"
        )
    data = count // inner if config.data == -1 else config.data
    shape = (data, config.fsdp, config.sequence, config.tensor)
    if math.prod(shape) != count:
        raise ConfigError(
            f"mesh is {' x '.join(map(str, shape))} = {math.prod(shape)} devices but there are "
            f"{count}: set --mesh.data -1, or sizes whose product is {count}"
        )
    return shape


def _arrange(devices: Sequence[Any], shape: tuple[int, ...]) -> np.ndarray:
    """The devices in an array of `shape`, the network between slices on the outermost axes."""
    slices = {getattr(d, "slice_index", 0) for d in devices}
    if len(slices) == 1:
        if devices[0].platform == "tpu" and len(devices) == jax.device_count():
            return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
        return np.array(devices).reshape(shape)
    left, between = len(slices), []
    for size in shape:
        between.append(math.gcd(size, left))
        left //= between[-1]
    if left > 1:
        raise ConfigError(
            f"mesh is {' x '.join(map(str, shape))} on {len(slices)} slices or hosts: make "
            f"--mesh.data, or its product with --mesh.fsdp, a multiple of {len(slices)}"
        )
    within = [size // parts for size, parts in zip(shape, between, strict=True)]
    return mesh_utils.create_hybrid_device_mesh(
        within, between, devices, allow_split_physical_axes=True
    )


def check_divisible(config: TrainConfig, mesh: Mesh) -> None:
    """Checks, before anything compiles, that batch and model divide evenly over the mesh.

    Raises:
      ConfigError: one does not; the message names the field and the divisor.
    """
    rows = mesh.shape["data"] * mesh.shape["fsdp"]
    micro_batch = config.batch_size // config.grad_accum
    if micro_batch % rows:
        whole = -(-micro_batch // rows) * rows * config.grad_accum
        raise ConfigError(
            f"batch_size / grad_accum is {micro_batch} rows, not a multiple of {rows}, the "
            f"devices on mesh.data x mesh.fsdp: set --batch-size {whole}, or these axes"
        )
    model, pieces = config.model, mesh.shape["sequence"]
    if config.data.seq_len % pieces:
        raise ConfigError(
            f"data.seq_len is {config.data.seq_len}, not a multiple of mesh.sequence ({pieces}): "
            f"set --data.seq-len {-(-config.data.seq_len // pieces) * pieces}, or --mesh.sequence 1"
        )
    if pieces > 1 and model.mixer != "mlgru":
        raise ConfigError(
            f"mesh.sequence is {pieces}: {model.mixer} needs whole rows; set --mesh.sequence 1, or "
            "--model.mixer mlgru"
        )
    sizes = {
        "model.vocab_size": model.vocab_size,
        "model.hidden_size": model.hidden_size,
        "model.intermediate_size": model.glu_size,
        "model.expand_ratio * hidden_size": model.state_size,
    }
    if model.weight_scale == "groups":
        # A group lies on the device that holds its weights: whole groups on each.
        split = {"fsdp": {"hidden_size": model.hidden_size}}
        split["tensor"] = {"intermediate_size": model.glu_size}
        split["tensor"]["expand_ratio * hidden_size"] = model.state_size
        for axis, widths in split.items():
            for name, size in widths.items():
                if size // GROUP % mesh.shape[axis]:
                    raise ConfigError(
                        f"model.{name} is {size}, {size // GROUP} groups of {GROUP} inputs that "
                        f"share a scale: set --mesh.{axis} to a divisor of these "
                        f"({mesh.shape[axis]} is none), or --model.weight-scale matrix"
                    )
    for axis in ("fsdp", "tensor"):
        for name, size in sizes.items():
            if name == "model.vocab_size" and axis == "fsdp":
                continue
            if size % mesh.shape[axis]:
                raise ConfigError(
                    f"{name} is {size}: set --mesh.{axis} to a divisor of it "
                    f"({mesh.shape[axis]} is none)"
                )
    if "attention" in model.period and model.kv_heads % mesh.shape["tensor"]:
        name = "num_heads" if model.num_kv_heads is None else "num_kv_heads"
        raise ConfigError(
            f"model.{name} is {model.kv_heads}: set --mesh.tensor to a divisor of it "
            f"({mesh.shape['tensor']} is none)"
        )
    if "hgrn2" in model.period and model.state_heads % mesh.shape["tensor"]:
        raise ConfigError(
            f"model.state_expansion is {model.head_expansion}, which makes {model.state_heads} "
            f"heads: set --mesh.tensor to a divisor of that ({mesh.shape['tensor']} is none)"
        )


def param_spec(path: str) -> P:
    """The layout of the parameter at `path`, names joined by slashes.

    Raises:
      KeyError: the table has no line for it. A new parameter needs one.
    """
    for pattern, spec in _TABLE:
        if re.fullmatch(pattern, path):
            return spec
    raise KeyError(f"parameter {path!r} has no line in the sharding table: add one")


def fitting_spec(path: str, shape: Sequence[int], mesh: Mesh | AbstractMesh) -> P:
    """The layout on `mesh` of the parameter at `path`, of this shape.

    That of `param_spec`; but without a tensor axis a matrix [.., out, in] is split by its rows,
    where these divide. What devices send each other is then a part of the matrix as it lies in
    memory: a part of its columns would be turned round before and after every exchange.

    Raises:
      ConfigError: the shape does not divide over the mesh.
    """
    spec = param_spec(path)
    if "fsdp" in spec and mesh.shape["tensor"] == 1 and shape[-2] % mesh.shape["fsdp"] == 0:
        return P(*[None] * (len(shape) - 2), "fsdp", None)
    for size, axis in zip(shape, spec, strict=False):
        if axis is not None and size % mesh.shape[axis]:
            raise ConfigError(
                f"{path} has {size} rows or columns to split over mesh.{axis} "
                f"({mesh.shape[axis]}): set --mesh.{axis} to a divisor of it"
            )
    return spec


def param_shardings(mesh: Mesh, params: Any) -> Any:
    """A sharding for each leaf of a parameter tree (arrays or shapes)."""
    return jax.tree_util.tree_map_with_path(
        lambda path, x: NamedSharding(mesh, fitting_spec(_join(path), x.shape, mesh)), params
    )


def state_shardings(mesh: Mesh, state: Any) -> Any:
    """A sharding for each leaf of a training state.

    Optimiser moments follow their parameters: a leaf whose path ends in a parameter's path and
    whose shape is the parameter's takes its layout. The rest (counters) is replicated.
    """
    shapes = {_join(path): leaf.shape for path, leaf in _flatten(state.params)}

    def sharding(path: Any, leaf: Any) -> NamedSharding:
        names = _join(path).split("/")
        for start in range(len(names)):
            name = "/".join(names[start:])
            if shapes.get(name) == leaf.shape and name in shapes:
                return NamedSharding(mesh, fitting_spec(name, leaf.shape, mesh))
        return NamedSharding(mesh, P())

    return jax.tree_util.tree_map_with_path(sharding, state)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Layout of the arrays of a batch, [B, T]."""
    return NamedSharding(mesh, BATCH)


def row_sharding(mesh: Mesh) -> NamedSharding:
    """Layout of arrays [B, ...] of which every device of a row has all."""
    return NamedSharding(mesh, P(_ROWS))


def process_rows(mesh: Mesh, shape: tuple[int, int]) -> tuple[int, ...]:
    """Rows of a batch of `shape` [B, T] that this process's devices hold any part of."""
    found = batch_sharding(mesh).addressable_devices_indices_map(shape)
    rows: set[int] = set()
    for index in found.values():
        assert index is not None
        rows.update(range(*index[0].indices(shape[0])))
    return tuple(sorted(rows))


def place_batch(
    mesh: Mesh, batch: dict[str, np.ndarray], rows: tuple[int, ...], size: int
) -> dict[str, jax.Array]:
    """The global batch, of which this process has read `rows`.

    Args:
      mesh: to lay it out on.
      batch: [len(rows), T] each.
      rows: as `process_rows` gives them for [size, T].
      size: rows of the global batch.
    """
    sharding = batch_sharding(mesh)

    def place(local: np.ndarray) -> jax.Array:
        def piece(index: Any) -> np.ndarray:
            # A device's rows are neighbours, in the global batch and so in `rows`.
            wanted = range(*index[0].indices(size))
            at = bisect.bisect_left(rows, wanted[0])
            return local[at : at + len(wanted), index[1]]

        return jax.make_array_from_callback((size, *local.shape[1:]), sharding, piece)

    return {name: place(local) for name, local in batch.items()}


def _ambient() -> AbstractMesh | None:
    """The mesh that `jax.set_mesh` set, if it is one of ours; else None."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty or not set(AXES) <= set(mesh.axis_names) else mesh


def token_axes(shape: tuple[int, ...]) -> tuple[str, ...]:
    """Mesh axes that split the leading axis of [B, ..., K]; none where that does not divide.

    Kernels that work token by token take these to run on each device's own rows.
    """
    mesh = _ambient()
    if mesh is None or mesh.size == 1:
        return ()
    return () if shape[0] % (mesh.shape["data"] * mesh.shape["fsdp"]) else _ROWS


def flat_token_axes(shape: tuple[int, ...]) -> tuple[str, ...]:
    """Mesh axes that split the tokens that `flatten_tokens` gives, [N, ...].

    None where an axis splits the matrices that they meet, or the shape does not divide.
    """
    mesh = _ambient()
    if mesh is None or mesh.size == 1 or mesh.shape["tensor"] > 1:
        return ()
    axes = _ROWS if mesh.shape["sequence"] == 1 else (*_ROWS, "sequence")
    return () if shape[0] % math.prod(mesh.shape[a] for a in axes) else axes


def flatten_tokens(x: jax.Array) -> jax.Array:
    """[B, T, ...] -> [B T, ...], every device's own tokens together.

    Where the sequence is split that is another order than a reshape's, which would move
    tokens between devices; what is summed over tokens does not mind.
    """
    B, T, *rest = x.shape
    flat = (B * T, *rest)
    if (split := _split_of_tokens(B, T)) is None:
        return x.reshape(flat)
    rows, pieces = split
    parts = x.reshape(rows, B // rows, pieces, T // pieces, *rest).swapaxes(1, 2)
    return jax.lax.with_sharding_constraint(parts.reshape(flat), P((*_ROWS, "sequence")))


def unflatten_tokens(x: jax.Array, shape: tuple[int, int]) -> jax.Array:
    """[B T, ...] in the order of `flatten_tokens` -> [B, T, ...]; `shape` is (B, T)."""
    (B, T), rest = shape, x.shape[1:]
    if (split := _split_of_tokens(B, T)) is None:
        return x.reshape(B, T, *rest)
    rows, pieces = split
    parts = x.reshape(rows, pieces, B // rows, T // pieces, *rest).swapaxes(1, 2)
    return parts.reshape(B, T, *rest)


def _split_of_tokens(B: int, T: int) -> tuple[int, int] | None:
    """Parts that rows and time are in where the sequence is split; None: it is not."""
    mesh = _ambient()
    if mesh is None or mesh.shape["sequence"] == 1:
        return None
    rows, pieces = mesh.shape["data"] * mesh.shape["fsdp"], mesh.shape["sequence"]
    return None if B % rows or T % pieces else (rows, pieces)


def channel_partition(shape: tuple[int, ...]) -> P | None:
    """How element-wise work on [B, T, D] is split: rows, time, and channels over tensor.

    Returns:
      The layout; None where no mesh of several devices is set, or the shape does not divide
      over it (a single row that initialises a model, say) and the compiler had better decide.
    """
    mesh = _ambient()
    if mesh is None or mesh.size == 1:
        return None
    sizes = (mesh.shape["data"] * mesh.shape["fsdp"], mesh.shape["sequence"], mesh.shape["tensor"])
    if any(length % size for length, size in zip(shape, sizes, strict=True)):
        return None
    return P(_ROWS, "sequence" if sizes[1] > 1 else None, "tensor")


def constrain_batch(x: jax.Array) -> jax.Array:
    """Pins [B, T, ...] to the batch's layout where a mesh is set; elsewhere the identity."""
    return x if _ambient() is None else jax.lax.with_sharding_constraint(x, BATCH)


def constrain_parameter(path: str, x: jax.Array) -> jax.Array:
    """Pins what is made of the parameter at `path`, with its rows, where a mesh is set."""
    if (mesh := _ambient()) is None:
        return x
    return jax.lax.with_sharding_constraint(x, fitting_spec(path, x.shape, mesh))


def whole_rows(table_VD: jax.Array) -> jax.Array:
    """A table to look rows up in, its channels together: the fsdp axis gathers the table.

    Left to itself the compiler gathers what was looked up instead, on every device all of it.
    """
    if _ambient() is None:
        return table_VD
    return jax.lax.with_sharding_constraint(table_VD, P("tensor", None))


def _flatten(tree: Any) -> list[tuple[Any, Any]]:
    return jax.tree_util.tree_flatten_with_path(tree)[0]


def _join(path: Any) -> str:
    return "/".join(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path)
