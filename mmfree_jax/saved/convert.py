"""Whole folders from and to the Hugging Face format: config, weights and tokenizer."""

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mmfree_jax.errors import CheckpointError, ConfigError, DataError
from mmfree_jax.files import check_target, new_folder, write_text
from mmfree_jax.model.parameters import flatten
from mmfree_jax.saved import huggingface
from mmfree_jax.saved.end_tokens import end_ids, write_end_ids
from mmfree_jax.saved.huggingface_tokenizer import FILES, write_tokenizer
from mmfree_jax.saved.pretrained import MODEL_CONFIG, PARAMS, load_pretrained, model_folder_config
from mmfree_jax.saved.writing import SHARD_BYTES, write_tensors

TOKENIZER = "tokenizer"
DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Converted:
    """What was written.

    Attributes:
      folder: with the model.
      parameters: number of them.
      tokenizer: kind of the tokenizer beside the weights; None: there is none.
      model_type: of the Hugging Face side.
    """

    folder: Path
    parameters: int
    tokenizer: str | None
    model_type: str


def import_hf(
    source: str | os.PathLike[str], target: str | os.PathLike[str], *, overwrite: bool = False
) -> Converted:
    """Writes a Hugging Face folder as a model folder of ours, weights in float32.

    Args:
      source: folder with config.json and safetensors (see `load_pretrained`).
      target: new folder; it appears only when all of it is written.
      overwrite: replace an earlier output of the same command.

    Raises:
      ConfigError, CheckpointError: as `load_pretrained`.
      OutputError: `target` may not be replaced (see `check_target`) or cannot be written.
    """
    source, target = Path(source), Path(target)
    check_target(target, command="import-hf", sources=[source], overwrite=overwrite)
    found = huggingface.read_config(source)
    model, params = load_pretrained(source)
    leaves = flatten(params)
    with new_folder(target, command="import-hf", sources=[source], overwrite=overwrite) as folder:
        write_text(folder / MODEL_CONFIG, model_folder_config(model.config))
        write_tensors(
            folder,
            ((name, x.shape, lambda x=x: np.asarray(x)) for name, x in leaves.items()),
            dtype=np.float32,
            stem=PARAMS,
        )
        for name in FILES:
            if (source / name).is_file():
                (folder / TOKENIZER).mkdir(exist_ok=True)
                shutil.copyfile(source / name, folder / TOKENIZER / name)
        if ends := end_ids(source):
            write_end_ids(folder, ends)
    return Converted(target, _count(leaves), _tokenizer_kind(target), found.model_type)


def export_hf(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    dtype: str = "float32",
    overwrite: bool = False,
    shard_bytes: int = SHARD_BYTES,
) -> Converted:
    """Writes a model as a Hugging Face folder that its authors' packages load.

    In float32 every weight is written bit for bit.

    Args:
      source: run directory or model folder (see `load_pretrained`).
      target: new folder; it appears only when all of it is written.
      dtype: of the stored weights.
      overwrite: replace an earlier output of the same command.
      shard_bytes: most bytes in one file; a larger model gets several and an index.

    Raises:
      ConfigError: no Hugging Face architecture computes this model, or `dtype` is unknown.
      OutputError: `target` may not be replaced (see `check_target`) or cannot be written.
      CheckpointError: as `load_pretrained`, or a packed model, which has no weights to export.
    """
    source, target = Path(source), Path(target)
    check_target(target, command="export-hf", sources=[source], overwrite=overwrite)
    if dtype not in DTYPES:
        raise ConfigError(f"dtype is {dtype!r}: choose one of {', '.join(DTYPES)}")
    if jax.process_count() > 1:
        raise ConfigError(f"there are {jax.process_count()} processes: export with one")
    from mmfree_jax.saved.load import is_run
    from mmfree_jax.saved.packed import is_packed

    if is_packed(source):
        raise CheckpointError(
            f"{source} is a packed model, whose weights cannot be restored: export the run or "
            "model folder that it was made from"
        )
    model, params = load_pretrained(source)
    tokenizer = _load_tokenizer(source)
    fields = huggingface.write_config(
        model.config,
        dtype=dtype,
        max_length=trained_length(source) or 2048,
        bos_id=getattr(tokenizer, "bos_id", None),
        eos_ids=_ends(source, tokenizer),
    )
    leaves = flatten(params)
    stored_dtype = _bfloat16() if dtype == "bfloat16" else np.dtype(dtype)

    def value(slot: huggingface.Slot) -> np.ndarray:
        tensor = huggingface.stored_tensor(leaves[slot.path], slot)
        with np.errstate(over="ignore"):
            stored = tensor.astype(stored_dtype)
        if not np.isfinite(stored).all():
            raise CheckpointError(
                f"{slot.path} holds values that {dtype} cannot: export float32 or bfloat16, and "
                "check that the run did not diverge"
            )
        return stored

    def tensors() -> Any:
        for name, (slot,) in huggingface.tensor_map(model.config).items():
            yield name, slot.shape, lambda slot=slot: value(slot)
        if model.config.short_conv and not model.config.share_short_conv:
            # The authors' module creates this convolution and never calls it.
            c = model.config
            for layer in range(c.num_layers):
                name = f"model.layers.{layer}.attn.q_conv1d.weight"
                shape = (c.state_size, 1, c.short_conv)
                yield name, shape, lambda shape=shape: np.zeros(shape, stored_dtype)

    with new_folder(target, command="export-hf", sources=[source], overwrite=overwrite) as folder:
        _write_json(folder / huggingface.CONFIG, fields)
        write_end_ids(
            folder,
            _ends(source, tokenizer),
            _from_model_config=True,
            bos_token_id=fields["bos_token_id"],
        )
        write_tensors(folder, tensors(), dtype=stored_dtype, shard_bytes=shard_bytes)
        if tokenizer is not None:
            originals = source / TOKENIZER if (source / TOKENIZER).is_dir() else source
            write_tokenizer(
                folder,
                tokenizer,
                fields["max_position_embeddings"],
                originals=None if is_run(source) else originals,
            )
    return Converted(
        target, _count(leaves), _tokenizer_kind(target), huggingface.model_type_of(model.config)
    )


def trained_length(folder: Path) -> int | None:
    """Length of the rows that a model was trained on (tokens), where its folder says it."""
    from mmfree_jax.saved.load import is_run
    from mmfree_jax.saved.run_directory import load_config

    if is_run(folder):
        return load_config(folder).data.seq_len
    if huggingface.is_huggingface(folder):
        length = huggingface.read_config(folder).raw.get("max_position_embeddings")
        return length if isinstance(length, int) and length > 1 else None
    return None


def _ends(source: Path, tokenizer: Any) -> tuple[int, ...]:
    """Ids that end a text: the tokenizer's, then others that the model's folder names."""
    own = getattr(tokenizer, "eos_id", None)
    return tuple(dict.fromkeys([*([] if own is None else [own]), *end_ids(source)]))


def _bfloat16() -> Any:
    import ml_dtypes

    return np.dtype(ml_dtypes.bfloat16)


def _count(leaves: dict[str, Any]) -> int:
    return sum(x.size for x in leaves.values())


def _load_tokenizer(folder: Path) -> Any:
    """The tokenizer in a model's folder; None if it has none."""
    from mmfree_jax.data.tokenizer import load_tokenizer

    try:
        return load_tokenizer(folder)
    except DataError:
        if (folder / TOKENIZER).is_dir() or (folder / "tokenizer.json").is_file():
            raise
        return None


def _tokenizer_kind(folder: Path) -> str | None:
    if (folder / "tokenizer_config.json").is_file() or (folder / TOKENIZER).is_dir():
        return getattr(_load_tokenizer(folder), "kind", None)
    return None


def _write_json(file: Path, value: Any) -> None:
    write_text(file, json.dumps(value, indent=2) + "\n")
