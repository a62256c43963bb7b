"""What kind of folder holds a model. Nothing here imports JAX.

Each kind has one file that marks it. A folder with the marks of two kinds is refused, whichever
they are: which model it stands for is its owner's to say.
"""

import os
from pathlib import Path
from typing import Literal

from mmfree_jax.errors import CheckpointError
from mmfree_jax.places import check_local

Kind = Literal["run", "packed", "model folder", "huggingface"]

RUN_CONFIG = "config.yaml"
PACKED_FILE = "packed.safetensors"
MODEL_CONFIG = "model.yaml"
HUGGINGFACE_CONFIG = "config.json"
SUMS = "SHA256SUMS"
"""Beside a published model: the digest of each of its files."""
RESULTS = "results.json"
"""Beside a published model: what was measured of it."""

_MARKS: dict[Kind, tuple[str, str]] = {
    "run": (RUN_CONFIG, "a training run"),
    "packed": (PACKED_FILE, "a packed model"),
    "model folder": (MODEL_CONFIG, "a model folder of ours"),
    "huggingface": (HUGGINGFACE_CONFIG, "a Hugging Face model"),
}
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")


def other_models(kind: Kind) -> dict[str, str]:
    """The files that mark a model's folder as another kind than this, and what it is then."""
    return {mark: what for other, (mark, what) in _MARKS.items() if other != kind}


def kind_of(path: str | os.PathLike[str]) -> Kind:
    """The kind of a model's folder.

    Raises:
      CheckpointError: it is not a folder, holds no model, or is marked as two kinds.
      ConfigError: it is a URL.
    """
    check_local(path, "model")
    folder = Path(path)
    if not folder.is_dir():
        if folder.suffix in PICKLED and folder.is_file():
            raise CheckpointError(
                f"{folder} is pickled, which can run code when it is read: convert it to "
                "safetensors and give its folder"
            )
        raise CheckpointError(
            f"model {folder} is not a folder: give a training run, a packed model, a model folder "
            "or a Hugging Face model"
        )
    found: list[Kind] = [kind for kind, (mark, _) in _MARKS.items() if (folder / mark).is_file()]
    if not found:
        marks = ", ".join(f"{mark} ({what})" for mark, what in _MARKS.values())
        raise CheckpointError(f"{folder} holds no model: it has none of {marks}")
    if len(found) > 1:
        marks = " and ".join(f"{_MARKS[kind][0]} ({_MARKS[kind][1]})" for kind in found)
        raise CheckpointError(
            f"{folder} holds {marks}, two models: move one of them to a folder of its own"
        )
    return found[0]
