"""`mmfree export stablehlo`: the model's two programs in XLA's portable form, beside its weights.

    step.stablehlo       one token: (weights, tokens [B, 1], state) -> (logits, state)
    prefill.stablehlo    a prompt's chunk: (weights, tokens [B, C], length [B], state) -> the same
    packed.safetensors   the weights, as `mmfree pack` writes them
    tokenizer/           if the model has one
    export.json          what is in it, and the order of the arguments; written last

Each program is lowered for CPU, CUDA and TPU in one file; the batch is symbolic. The weights are
arguments, not constants: a program stays a few dozen kilobytes at any size, the weights exist
once, and any safetensors reader gives them. They stay at two bits; each layer is unpacked where it
is used. `jax.export` keeps such files readable for at least six months of JAX releases; a file
records its version.

    from mmfree_jax.export.stablehlo import load
    program = load("folder")
    logits_BV, state = program.prefill(tokens_BC, length_B, program.start(batch))
    logits_BV, state = program.step(tokens_B1, state)

Without this package: `jax.export.deserialize(bytes).call(weights, ...)`, where `weights` is a dict
from the tensors' names to arrays.
"""

import dataclasses
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax import export as jax_export

from mmfree_jax.errors import CheckpointError, ConfigError
from mmfree_jax.export import manifest as manifests
from mmfree_jax.export.supported import check_supported
from mmfree_jax.export.tokens import check_tokens
from mmfree_jax.files import write_bytes
from mmfree_jax.model import State, packed_model
from mmfree_jax.model.packing import packed_from_tree
from mmfree_jax.model.parameters import unflatten
from mmfree_jax.model_config import ModelConfig
from mmfree_jax.outputs import new_folder
from mmfree_jax.places import locate
from mmfree_jax.ranges import Step
from mmfree_jax.saved.kinds import PACKED_FILE
from mmfree_jax.saved.open_model import SavedModel, open_model
from mmfree_jax.saved.pack import copy_text_files, write_again, write_packed
from mmfree_jax.saved.packed import open_packed, packed_files
from mmfree_jax.storage import Url

COMMAND = "export stablehlo"
PLATFORMS = ("cpu", "cuda", "tpu")
STEP, PREFILL = "step.stablehlo", "prefill.stablehlo"
CHUNK = 64

Weights = dict[str, jax.Array]


@dataclass(frozen=True)
class Program:
    """An exported model, loaded.

    Attributes:
      manifest: of the folder.
      weights: tensors by name.
      programs: by the names of their files.
    """

    manifest: dict[str, Any]
    weights: Weights
    programs: dict[str, jax_export.Exported]

    def start(self, batch: int = 1) -> jax.Array:
        """The state before the first token, [L, B, E] float32."""
        layers, _, width = self.manifest["state_shape"]
        return jnp.zeros((layers, batch, width), jnp.float32)

    def step(self, tokens_B1: Any, state: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Logits [B, V] after one token a row, and the new state.

        Raises:
          DataError: no whole numbers, or ids that the model does not have (looked at on the host).
        """
        tokens_B1 = jnp.asarray(self._checked(tokens_B1), jnp.int32)
        result: Any = self.programs[STEP].call(self.weights, tokens_B1, state)
        return result

    def prefill(
        self, tokens_BC: Any, length_B: Any, state: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """The same after the first `length` tokens of each row; the rest is padding."""
        tokens_BC = jnp.asarray(self._checked(tokens_BC), jnp.int32)
        length_B = jnp.asarray(length_B, jnp.int32)
        result: Any = self.programs[PREFILL].call(self.weights, tokens_BC, length_B, state)
        return result

    def _checked(self, tokens: Any) -> Any:
        return check_tokens(tokens, self.manifest["vocab_size"])


@dataclass(frozen=True)
class ExportReport:
    """What an export made.

    Attributes:
      folder: with it, or its URL.
      num_bytes: of its files.
    """

    folder: Path | Url
    num_bytes: int


def export_stablehlo(
    model: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    step: Step | None = None,
    chunk: int = CHUNK,
    overwrite: bool = False,
) -> ExportReport:
    """Writes the programs and the weights.

    Args:
      model: a training run, a Hugging Face folder, or a packed model.
      out: folder to make, or its URL; see `new_folder`.
      step: checkpoint of a training run, or "best"; None: the newest.
      chunk: tokens that one call of `prefill` reads.
      overwrite: replace an earlier export.

    Raises:
      ConfigError: the model is not MatMul-free throughout.
      CheckpointError: the model is missing or damaged.
      DataError: the tokenizer is damaged, or makes ids that the model does not have.
      OutputError: `out` may not be replaced (see `check_target`) or cannot be written.
      StorageError: the bucket refuses, or cannot be reached.
    """
    if chunk < 1:
        raise ConfigError(f"--chunk is {chunk}: set 1 or more")
    saved = open_model(model, step=step)
    check_supported(saved.config)
    saved.fitting_tokenizer()  # one that does not fit is refused before anything is written
    with new_folder(
        out, command=COMMAND, sources=[model], overwrite=overwrite, last=manifests.FILE
    ) as folder:
        _write_weights(saved, folder)
        config, weights = _read_weights(folder)
        programs = lower(config, weights, chunk=chunk)
        for name, program in programs.items():
            write_bytes(folder / name, program.serialize())
        names = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
        manifests.write(
            folder,
            manifests.STABLEHLO,
            {
                "vocab_size": config.vocab_size,
                "state_shape": [config.num_layers, 1, config.state_size],
                "chunk": chunk,
                "platforms": PLATFORMS,
                "jax": jax.__version__,
                "calling_convention": programs[STEP].calling_convention_version,
                "weights": [
                    {"name": name, "dtype": w.dtype.name, "shape": w.shape}
                    for name, w in weights.items()
                ],
                "files": {name: manifests.file_entry(folder / name) for name in names},
            },
        )
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return ExportReport(locate(out, "out"), size)


def lower(config: ModelConfig, weights: Weights, *, chunk: int) -> dict[str, jax_export.Exported]:
    """Both programs for all platforms, by the names of their files.

    Args:
      config: of the model.
      weights: arrays or their shapes, by name, sorted.
      chunk: tokens of a call of the second.
    """
    # What any platform runs: the choice of kernels is otherwise this machine's.
    config = dataclasses.replace(
        config, matmul_kernel="xla_int8", recurrence_kernel="xla", remat="none"
    )

    def run(
        weights: dict[str, jax.Array],
        tokens_BT: jax.Array,
        state: jax.Array,
        held_BT: jax.Array | None,
    ) -> tuple[jax.Array, jax.Array]:
        position_B = jnp.zeros(tokens_BT.shape[:1], jnp.int32)
        packed = packed_from_tree(unflatten(weights), config)
        logits_BV, after = packed_model.decode(
            packed, config, tokens_BT, State(position_B, {"h": state}), held_BT, kernels=False
        )
        return logits_BV, after.layers["h"]

    def step(
        weights: dict[str, jax.Array], tokens_B1: jax.Array, state: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        return run(weights, tokens_B1, state, None)

    def prefill(
        weights: dict[str, jax.Array], tokens_BC: jax.Array, length_B: jax.Array, state: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        held_BC = jnp.arange(chunk) < length_B[:, None]
        return run(weights, tokens_BC, state, held_BC.astype(jnp.int32))

    (B,) = jax_export.symbolic_shape("batch")
    shape = jax.ShapeDtypeStruct
    given = {name: shape(w.shape, w.dtype) for name, w in weights.items()}
    state = shape((config.num_layers, B, config.state_size), jnp.float32)
    tokens_B1, tokens_BC = shape((B, 1), jnp.int32), shape((B, chunk), jnp.int32)
    length_B = shape((B,), jnp.int32)

    def lowered(function: Callable[..., Any], *arguments: Any) -> jax_export.Exported:
        return jax_export.export(jax.jit(function), platforms=PLATFORMS)(given, *arguments)

    return {
        STEP: lowered(step, tokens_B1, state),
        PREFILL: lowered(prefill, tokens_BC, length_B, state),
    }


def load(folder: str | os.PathLike[str], *, checksums: bool = True) -> Program:
    """Loads an exported folder onto the default device.

    Args:
      folder: that `mmfree export stablehlo` wrote.
      checksums: compare every file with its checksum, not only its size.

    Raises:
      CheckpointError: a file is missing, truncated or altered, or of a JAX that this one does
        not read.
    """
    path = Path(folder)
    manifest = manifests.read(path, file_format=manifests.STABLEHLO)
    manifests.verify(path, manifest, checksums=checksums)
    _, weights = _read_weights(path)
    try:
        programs = {
            name: jax_export.deserialize(bytearray((path / name).read_bytes()))
            for name in (STEP, PREFILL)
        }
    except Exception as e:  # jax.export raises several kinds
        reason = " ".join(str(e).split())[:200]
        raise CheckpointError(
            f"{path}: the programs were written by jax {manifest['jax']}, and jax "
            f"{jax.__version__} does not read them ({reason}): export again"
        ) from e
    return Program(manifest, weights, programs)


def _write_weights(model: SavedModel, folder: Path) -> None:
    """The packed weights and the tokenizer."""
    if model.kind == "packed":
        if open_packed(model.path).bits != "2":  # which the programs read
            write_again(folder / PACKED_FILE, model)
        else:
            for file in packed_files(model.path):
                shutil.copyfile(file, folder / file.name)
    else:
        write_packed(folder / PACKED_FILE, model.config, model.leaf, embedding="float32")
    copy_text_files(model, folder)


def _read_weights(folder: Path) -> tuple[ModelConfig, Weights]:
    file = open_packed(folder)
    names = sorted(file.reader.names())
    return file.config, {name: jnp.asarray(file.reader.read(name)) for name in names}
