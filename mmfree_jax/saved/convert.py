"""Whole folders from and to the Hugging Face format: config, weights and tokenizer."""

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np

from mmfree_jax.data.tokenizer import load_tokenizer
from mmfree_jax.errors import ConfigError
from mmfree_jax.files import write_text
from mmfree_jax.model.parameters import param_count
from mmfree_jax.model.weights import Master, Ternary
from mmfree_jax.outputs import check_target, new_folder
from mmfree_jax.places import locate
from mmfree_jax.ranges import Step
from mmfree_jax.saved import huggingface
from mmfree_jax.saved.end_tokens import end_ids, write_end_ids
from mmfree_jax.saved.evaluations import read_evaluations
from mmfree_jax.saved.exported_tensors import exported_tensors
from mmfree_jax.saved.huggingface_tokenizer import FILES, write_tokenizer
from mmfree_jax.saved.kinds import MODEL_CONFIG
from mmfree_jax.saved.model_card import model_card
from mmfree_jax.saved.model_folder import write_model
from mmfree_jax.saved.open_model import find_tokenizer, open_model
from mmfree_jax.saved.remote_code import write_code
from mmfree_jax.saved.run_directory import TOKENIZER
from mmfree_jax.saved.source_card import CARD, copy_source_card
from mmfree_jax.saved.writing import SHARD_BYTES, write_tensors
from mmfree_jax.storage import Url

DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Converted:
    """What was written.

    Attributes:
      folder: with the model, or its URL.
      parameters: number of them.
      tokenizer: kind of the tokenizer beside the weights; None: there is none.
      model_type: of the Hugging Face side.
    """

    folder: Path | Url
    parameters: int
    tokenizer: str | None
    model_type: str


def import_hf(
    source: str | os.PathLike[str], target: str | os.PathLike[str], *, overwrite: bool = False
) -> Converted:
    """Writes a Hugging Face folder as a model folder of ours, weights in float32.

    Args:
      source: folder with config.json and safetensors.
      target: new folder, or its URL; see `new_folder`.
      overwrite: replace an earlier output of the same command.

    Raises:
      ConfigError, CheckpointError: as `open_model`, or `source` is of another kind.
      OutputError: `target` may not be replaced (see `outputs.py`), or cannot be written.
      StorageError: the bucket refuses, or cannot be reached.
    """
    check_target(target, command="import-hf", sources=[source], overwrite=overwrite)
    saved = open_model(source)
    if saved.kind != "huggingface":
        raise ConfigError(f"{source} is not a Hugging Face folder: it has no {huggingface.CONFIG}")
    weights = saved.weights("master")
    assert isinstance(weights, Master)
    saved.tokenizer()  # one that is damaged is refused before anything is written
    with new_folder(
        target, command="import-hf", sources=[source], overwrite=overwrite, last=MODEL_CONFIG
    ) as folder:
        write_model(folder, saved.config, weights.params)
        for name in FILES:
            if (saved.path / name).is_file():
                (folder / TOKENIZER).mkdir(exist_ok=True)
                shutil.copyfile(saved.path / name, folder / TOKENIZER / name)
        if ends := end_ids(saved.path):
            write_end_ids(folder, ends)
        copy_source_card(saved.path, saved.kind, folder)
        tokenizer = _tokenizer_kind(folder)
    model_type = huggingface.read_config(saved.path).model_type
    return Converted(locate(target, "target"), param_count(saved.config), tokenizer, model_type)


def export_hf(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    step: Step | None = None,
    dtype: str = "float32",
    overwrite: bool = False,
    shard_bytes: int = SHARD_BYTES,
    scores: str | os.PathLike[str] | None = None,
    model_license: str | None = None,
    data_license: str | None = None,
    repository: str | None = None,
) -> Converted:
    """Writes a model as a Hugging Face folder that transformers loads.

    A MatMul-free one has its PyTorch code with it (`remote_code.py`) and the authors' names, so
    that their package loads it too. In float32 every weight is written bit for bit; those of a
    packed model stay at 2 bits, which only the code with it reads.

    Args:
      source: folder of a model (see `open_model`).
      target: new folder, or its URL; see `new_folder`.
      step: of a run's checkpoint, as `open_model` takes it.
      dtype: of the stored weights; of a packed model's, those that are not at 2 bits.
      overwrite: replace an earlier output of the same command.
      shard_bytes: most bytes in one file; a larger model gets several and an index.
      scores: folder of `mmfree eval --output`, for the model card; None: `eval`, if there is one.
      model_license: of the model, for the card: an identifier of the Hub; None: none is named.
      data_license: of the training data, for the card, in words; None: not known.
      repository: of the Hub, that the card names to load from; None: a folder.

    Raises:
      ConfigError: no Hugging Face architecture computes this model, `dtype` is unknown, a licence
        is malformed, or `scores` has none of this model.
      CheckpointError: as `open_model`, or `dtype` does not hold a weight.
      DataError: the tokenizer is damaged, or makes ids that the model does not have.
      OutputError: `target` may not be replaced (see `outputs.py`), or cannot be written.
      StorageError: the bucket refuses, or cannot be reached.
    """
    check_target(target, command="export-hf", sources=[source], overwrite=overwrite)
    if dtype not in DTYPES:
        raise ConfigError(f"dtype is {dtype!r}: choose one of {', '.join(DTYPES)}")
    if jax.process_count() > 1:
        raise ConfigError(f"there are {jax.process_count()} processes: export with one")
    saved = open_model(source, step=step)
    packed = saved.kind == "packed"
    config, tokenizer = saved.config, saved.fitting_tokenizer()
    fields = huggingface.write_config(
        config,
        dtype=dtype,
        packed=packed,
        max_length=saved.trained_length or 2048,
        bos_id=getattr(tokenizer, "bos_id", None),
        eos_ids=_ends(saved.path, tokenizer),
    )
    evaluations = read_evaluations(saved, scores)
    card = model_card(
        _name(target), saved, fields, tokenizer, evaluations,
        model_license=model_license, data_license=data_license, repository=repository,
    )  # fmt: skip
    weights = saved.weights("ternary" if packed else "master")
    assert isinstance(weights, (Master, Ternary))
    stored_dtype = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    with new_folder(
        target,
        command="export-hf",
        sources=[source],
        overwrite=overwrite,
        last=huggingface.CONFIG,
    ) as folder:
        _write_json(folder / huggingface.CONFIG, fields)
        write_end_ids(
            folder,
            _ends(saved.path, tokenizer),
            _from_model_config=True,
            bos_token_id=fields["bos_token_id"],
        )
        write_text(folder / CARD, card)
        copy_source_card(saved.path, saved.kind, folder)
        tensors = exported_tensors(config, weights, stored_dtype)
        write_tensors(folder, tensors, shard_bytes=shard_bytes)
        if "auto_map" in fields:
            write_code(folder)
        if tokenizer is not None:
            kept = saved.path / TOKENIZER
            write_tokenizer(
                folder,
                tokenizer,
                fields["max_position_embeddings"],
                originals=None if saved.kind == "run" else kept if kept.is_dir() else saved.path,
            )
        kind = _tokenizer_kind(folder)
    return Converted(locate(target, "target"), param_count(config), kind, fields["model_type"])


def _name(target: str | os.PathLike[str]) -> str:
    place = locate(target, "target")
    return place.resolve().name if isinstance(place, Path) else place.name


def _ends(source: Path, tokenizer: Any) -> tuple[int, ...]:
    """Ids that end a text: the tokenizer's, then others that the model's folder names."""
    own = getattr(tokenizer, "eos_id", None)
    return tuple(dict.fromkeys([*([] if own is None else [own]), *end_ids(source)]))


def _tokenizer_kind(folder: Path) -> str | None:
    found = find_tokenizer(folder)
    return None if found is None else load_tokenizer(found).kind


def _write_json(file: Path, value: Any) -> None:
    write_text(file, json.dumps(value, indent=2) + "\n")
