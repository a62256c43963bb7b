"""The one door to a model on disk: `open_model` says what a folder is and reads from it."""

import dataclasses
import functools
import os
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from mmfree_jax.data.tokenizer import Tokenizer, load_tokenizer
from mmfree_jax.errors import ConfigError, DataError
from mmfree_jax.fetched import copied
from mmfree_jax.model import LanguageModel
from mmfree_jax.model.kernel_choice import without_foreign_kernels
from mmfree_jax.model.packing import can_pack, pack
from mmfree_jax.model.parameters import flatten, param_shapes
from mmfree_jax.model.weights import Master, Packed, Ternary, Weights, as_weights, ternarise_matrix
from mmfree_jax.model_config import ModelConfig
from mmfree_jax.parallel.sharding import param_shardings
from mmfree_jax.places import locate
from mmfree_jax.ranges import Step
from mmfree_jax.saved import huggingface, model_folder, packed, run_model
from mmfree_jax.saved.checkpoint_copy import copy_parameters
from mmfree_jax.saved.kinds import Kind, kind_of
from mmfree_jax.saved.run_directory import METRICS, TOKENIZER, load_config
from mmfree_jax.saved.source_card import CARD, LEGAL_TEXTS, SOURCE_CARD
from mmfree_jax.saved.tensor_names import check_tied_head, known_extra, tensor_map
from mmfree_jax.saved.tensors import Slot, TensorFolder, TensorMap, read_params
from mmfree_jax.storage import Url

Shapes = Mapping[str, jax.ShapeDtypeStruct]
Form = Literal["master", "ternary", "packed"]


@dataclasses.dataclass(frozen=True)
class SavedModel:
    """A model in a folder. Its weights are read, and checked, when they are asked for.

    Attributes:
      path: the folder; of a model in a bucket, a copy of it, of a run without its checkpoints.
      place: what was opened: the folder, or its URL.
      kind: what it is.
      config: of the model.
      trained_length: of the rows that it was trained on (tokens); None: the folder does not say.
    """

    path: Path
    place: Path | Url
    kind: Kind
    config: ModelConfig
    trained_length: int | None
    _read: Callable[[Shapes, Mesh | None], dict[str, Any]]
    _packed: packed.PackedFile | None = None
    _checkpoint: Callable[[], Path] | None = None

    def checkpoint(self) -> Path | None:
        """The folder of the run's checkpoint that weights are read from; None: it is no run.

        Of a run in a bucket it is a copy without the optimiser's arrays (`checkpoint_copy.py`).

        Raises:
          CheckpointError: the run has none that is whole.
          StorageError: the bucket cannot be read.
        """
        return None if self._checkpoint is None else self._checkpoint()

    def model(self, compute_dtype: Any = None) -> LanguageModel:
        """The model, its weights apart, with kernels that run here.

        Args:
          compute_dtype: of activations: float32, bfloat16 or float16; None: as trained, float32
            for Hugging Face folders.

        Raises:
          ConfigError: another dtype.
        """
        config = without_foreign_kernels(self.config, jax.default_backend())
        return LanguageModel(_with_dtype(config, compute_dtype))

    @property
    def tokenizer_path(self) -> Path | None:
        """Where the tokenizer is: the folder `tokenizer/`, or a file beside the weights."""
        return find_tokenizer(self.path)

    def tokenizer(self) -> Tokenizer | None:
        """The model's tokenizer; None if it has none.

        Raises:
          DataError: it is damaged.
        """
        path = self.tokenizer_path
        return None if path is None else load_tokenizer(path)

    def fitting_tokenizer(self) -> Tokenizer | None:
        """`tokenizer`, which makes no id that the model does not have.

        Raises:
          DataError: it is damaged, or larger than the model's vocabulary.
        """
        found = self.tokenizer()
        if found is not None and found.vocab_size > self.config.vocab_size:
            raise DataError(
                f"model {self.place}: the tokenizer has {found.vocab_size} tokens, the model "
                f"{self.config.vocab_size}: put the tokenizer that the model was trained with "
                "into its folder"
            )
        return found

    @property
    def packed_embedding(self) -> packed.EmbeddingDtype | None:
        """The dtype in which a packed model keeps its embedding; None: it is not packed.

        Raises:
          CheckpointError: the packed file has no embedding.
        """
        return None if self._packed is None else self._packed.embedding

    def leaf(self, name: str) -> np.ndarray:
        """One parameter as it is kept; of a packed model, one tensor of its file.

        Args:
          name: of the parameter, for example "blocks/glu/down_proj/weight".

        Raises:
          CheckpointError: it is missing, misshapen or damaged.
        """
        if self._packed is not None:
            return self._packed.reader.read(name)
        shape = param_shapes(self.config)[name]
        return np.asarray(flatten(self._read({name: shape}, None))[name])

    def ternary(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """One ternary weight: trits [.., N, K] int8 and scales [.., 1, 1] float32.

        A packed model's are taken as they are; master weights are ternarised. Errors as `leaf`.
        """
        if self._packed is not None:
            return self._packed.ternary(name, param_shapes(self.config)[name].shape)
        own = None
        if self.config.weight_scale == "learned":
            own = jnp.asarray(self.leaf(f"{name.rpartition('/')[0]}/log_scale"))
        master = jnp.asarray(self.leaf(name))
        trits, scale = ternarise_matrix(master, self.config.weight_scale, own)
        return np.asarray(trits), np.asarray(scale)

    def weights(self, form: Form | None = None, mesh: Mesh | None = None) -> Weights:
        """All weights, in whatever form they are kept.

        Args:
          form: "master": a packed model has none and gives weights that ternarise to its trits and
            scales; "ternary": ternarised once (still `Master` where the model is set to ternarise
            in its own program, `bitlinear: plain`); "packed": at 2 bits, on one device. None: what
            decoding on this device reads, the same however the model is kept, so that a trained
            model and its packed file go through the same program: packed where the model can
            be, except on a CPU, where int8 trits are faster; otherwise ternary.
          mesh: to lay them out on by the sharding table, each device reading only its part; None:
            the default device.

        Raises:
          CheckpointError: they are missing or damaged, or do not fit the config.
          ConfigError: "packed" for a model that is not MatMul-free throughout, or with a mesh.
        """
        file = self._packed
        if form is None:
            # On packed weights a scan writes caches of keys and values whole for each token.
            packs = can_pack(self.config) and self.config.recurrent
            packs = packs and self.config.bitlinear == "fused" and mesh is None
            form = "packed" if packs and jax.default_backend() != "cpu" else "ternary"
        if form == "packed":
            return self._at_two_bits(mesh)
        if file is not None and form == "ternary" and mesh is None:
            return packed.read_ternary(file)
        params = self._read(param_shapes(self.config), mesh)
        return Master(params) if form == "master" else as_weights(params, self.config)

    def _at_two_bits(self, mesh: Mesh | None) -> Packed:
        if mesh is not None:
            raise ConfigError("packed weights are kept on one device: ask for another form")
        if self._packed is not None:
            return packed.read_packed(self._packed)
        config = dataclasses.replace(self.config, bitlinear="fused")
        weights = as_weights(self._read(param_shapes(config), None), config)
        assert isinstance(weights, Ternary)
        return pack(weights, config)


def find_tokenizer(folder: Path) -> Path | None:
    """A model's tokenizer: the folder `tokenizer/`, or a file beside the weights; None: none."""
    for name in (TOKENIZER, "tokenizer.json", "tokenizer.model"):
        if (folder / name).exists():
            return folder / name
    models = list(folder.glob("*.model"))
    return models[0] if len(models) == 1 else None


def open_model(path: str | os.PathLike[str], *, step: Step | None = None) -> SavedModel:
    """Opens the model in a folder: a training run, a packed model, a model folder of `mmfree
    import-hf`, or a Hugging Face folder (`huggingface.py`, in safetensors).

    What a folder is, one file in it says (`kinds.py`); with two such files it is refused.

    Args:
      path: the folder, or its URL in a bucket, of which a copy is taken (`fetched.py`).
      step: of a run's checkpoint; "best": that with the best `checkpoint.best_metric` of those that
        the run has kept; None: the newest that is whole.

    Raises:
      CheckpointError: it is no folder, or holds no model or two; a packed file is damaged.
      ConfigError: its config is missing, malformed or asks for something that is not implemented;
        or `step` for what is not a training run.
      StorageError: the bucket cannot be read, or holds nothing there.
    """
    with copied(path, "model", _is_of_model) as folder:
        return _open(folder, locate(path, "model"), step)


def _open(folder: Path, place: Path | Url, step: Step | None) -> SavedModel:
    kind = kind_of(folder)
    if kind == "run":
        return _open_run(folder, place, step)
    if step is not None:
        raise ConfigError(f"--step is {step}, but {place} is not a training run")
    if kind == "packed":
        return _open_packed(folder, place)
    if kind == "model folder":
        config = model_folder.read_config(folder)
        slots = {name: (Slot(name, x.shape),) for name, x in param_shapes(config).items()}
        read = _reader(folder, model_folder.PARAMS, slots, lambda _: False)
        return SavedModel(folder, place, kind, config, None, read)
    found = huggingface.read_config(folder)
    length = found.raw.get("max_position_embeddings")
    return SavedModel(
        folder,
        place,
        kind,
        found.config,
        length if isinstance(length, int) and length > 1 else None,
        _reader(
            folder,
            "model",
            tensor_map(found.config, tied=found.tied),
            functools.partial(known_extra, tied=found.tied),
            tied=found.tied,
        ),
    )


def _is_of_model(name: PurePosixPath) -> bool:
    """Whether an object of a folder may be read of a model."""
    kinds = (".json", ".jinja", ".model", ".safetensors", ".yaml")
    if name.parts[:-1]:
        return name.parts[:-1] == (TOKENIZER,)
    beside = (METRICS, CARD, SOURCE_CARD, *LEGAL_TEXTS)
    return not name.name.startswith(".") and (name.suffix in kinds or name.name in beside)


def _open_run(folder: Path, place: Path | Url, step: Step | None) -> SavedModel:
    config = load_config(folder)

    # Found when first read from: its files are then all compared with their checksums.
    @functools.cache
    def checkpoint() -> Path:
        if isinstance(place, Path):
            found = run_model.find_checkpoint(place, step)
            assert isinstance(found, Path)
            return found
        copy = functools.cache(copy_parameters)
        return copy(run_model.find_checkpoint(place, step, records=folder, check=copy))

    def read(shapes: Shapes, mesh: Mesh | None) -> dict[str, Any]:
        return run_model.read_params(checkpoint(), shapes, mesh)

    return SavedModel(
        folder, place, "run", config.model, config.data.seq_len, read, _checkpoint=checkpoint
    )


def _open_packed(folder: Path, place: Path | Url) -> SavedModel:
    file = packed.open_packed(folder)

    def read(shapes: Shapes, mesh: Mesh | None) -> dict[str, Any]:
        params = packed.read_master(file)
        return params if mesh is None else jax.device_put(params, param_shardings(mesh, params))

    return SavedModel(folder, place, "packed", file.config, None, read, file)


def _reader(
    folder: Path,
    stem: str,
    slots: TensorMap,
    is_extra: Callable[[str], bool],
    *,
    tied: bool = False,
) -> Callable[[Shapes, Mesh | None], dict[str, Any]]:
    """Reads some or all parameters from safetensors files."""

    def read(shapes: Shapes, mesh: Mesh | None) -> dict[str, Any]:
        wanted = {
            name: tuple(s for s in found if s.path in shapes) for name, found in slots.items()
        }
        with TensorFolder(folder, stem) as tensors:
            if tied and "head/weight" in shapes:
                check_tied_head(tensors, slots)
            return read_params(
                tensors,
                {name: found for name, found in wanted.items() if found},
                shapes,
                mesh=mesh,
                ignore=lambda name: name in slots or is_extra(name),
            )

    return read


def _with_dtype(config: ModelConfig, compute_dtype: Any) -> ModelConfig:
    if compute_dtype is None:
        return config
    try:
        name = jnp.dtype(compute_dtype).name
    except TypeError:
        name = str(compute_dtype)
    if name not in ("float32", "bfloat16", "float16"):
        raise ConfigError(
            f"compute_dtype is {name!r}: choose one of float32, bfloat16, float16, or None"
        )
    return dataclasses.replace(config, compute_dtype=name, residual_dtype=name)  # type: ignore[arg-type]
