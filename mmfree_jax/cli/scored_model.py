"""The model that `mmfree eval`, `eval mqar` and `eval needle` score, and where results go.

A folder holds one record of each name, the newest. One that is found there and answers another
question (of other data, another checkpoint, other settings) is kept beside it under a number.
"""

import itertools
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmfree_jax.config import MeshConfig
from mmfree_jax.errors import DataError
from mmfree_jax.files import check_file, write_bytes, write_text
from mmfree_jax.places import is_file, is_taken, locate
from mmfree_jax.prefixes import read_json as read_json_object
from mmfree_jax.progress import show_progress
from mmfree_jax.storage import Url, check_bucket, delete, read_bytes
from mmfree_jax.text_files import read_json


def results_folder(output: str) -> Path | Url:
    """The folder, or the bucket's, that `--output` names.

    Raises:
      ConfigError, OutputError: it cannot be one, or the bucket cannot be written to, which is found
        now and not after hours.
    """
    folder = locate(output, "output")
    if isinstance(folder, Url):
        check_bucket(folder)
    return folder


@dataclass(frozen=True)
class ScoredModel:
    """A model to score.

    Attributes:
      saved: where it comes from.
      model: its module.
      params: its weights.
      mesh: where they lie; None: on the default device.
      folder: of its results.
    """

    saved: Any
    model: Any
    params: Any
    mesh: Any
    folder: Path | Url

    def tokenizer(self) -> Any:
        """The model's own, which fits it.

        Raises:
          DataError: it has none.
        """
        tokenizer = self.saved.fitting_tokenizer()
        if tokenizer is None:
            raise DataError(
                f"model {self.saved.place} has no tokenizer: put tokenizer.json into its folder"
            )
        return tokenizer


def open_scored(
    place: str,
    results_in: Path | Url,
    *,
    step: Any,
    compute_dtype: str | None,
    mesh: MeshConfig,
    progress: bool,
    on_one_device: bool = False,
) -> ScoredModel:
    """Opens a model and reads its weights in the form that is scored.

    Args:
      place: of the model, or its URL.
      results_in: as `results_folder` gives it.
      step: of a training run's checkpoint; None: the newest.
      compute_dtype: of activations; None: the model's own.
      mesh: how several devices are arranged.
      progress: show what is happening, on the first process.
      on_one_device: whatever devices there are.
    """
    import jax

    from mmfree_jax.parallel.sharding import make_mesh
    from mmfree_jax.saved.open_model import open_model

    several = not on_one_device and (jax.device_count() > 1 or mesh != MeshConfig())
    devices = make_mesh(mesh) if several else None
    saved = open_model(place, step=step)
    model = saved.model(compute_dtype)
    # A packed model's trits are what scoring reads; over a mesh all are laid out as master weights.
    form = "ternary" if saved.kind == "packed" and devices is None else "master"
    with show_progress("reading the model", is_shown=progress and jax.process_index() == 0):
        params = saved.weights(form, devices)
    folder = results_in / (saved.path.resolve().name or "model")
    return ScoredModel(saved, model, params, devices, folder)


@dataclass(frozen=True)
class ResultFiles:
    """A record of what was measured, and the figure beside it.

    Attributes:
      folder: where they go.
      name: of both, without its end.
      has_figure: whether a figure is drawn.
    """

    folder: Path | Url
    name: str
    has_figure: bool = False

    def check(self, begins: str) -> None:
        """Refuses a record of this name that `mmfree eval` did not write.

        Args:
          begins: the first key of its records.

        Raises:
          OutputError: there is one.
        """
        record, figure = self._names()
        beside = [figure] if self.has_figure else []
        check_file(record, rf'\{{\s*"{re.escape(begins)}"', beside=beside)

    def write(
        self, asked: Mapping[str, Any], found: Mapping[str, Any], png: bytes | None = None
    ) -> list[str]:
        """Writes the record and the figure; an earlier record of another question is kept.

        Args:
          asked: what was measured, and under which settings; part of the record.
          found: the rest of it.
          png: the figure.

        Returns:
          Lines that say where things are.
        """
        record, figure = self._names()
        asked = json.loads(json.dumps(asked))  # as it is read again
        lines = [f"results: {record}"]
        if is_file(record):
            earlier = _read(record)
            if not isinstance(earlier, dict) or any(
                key not in earlier or earlier[key] != value for key, value in asked.items()
            ):
                lines.append(f"kept: {self._set_aside()} (of other data or settings)")
        write_text(record, json.dumps({**asked, **found}, indent=2) + "\n")
        if png is not None:
            write_bytes(figure, png)
            lines.append(f"figure: {figure}")
        return lines

    def _names(self, number: int | None = None) -> tuple[Path | Url, Path | Url]:
        stem = self.name if number is None else f"{self.name}_{number}"
        return self.folder / f"{stem}.json", self.folder / f"{stem}.png"

    def _set_aside(self) -> Path | Url:
        """Moves the record, and its figure, to the first number that is free."""
        free = next(n for n in itertools.count(1) if not any(map(is_taken, self._names(n))))
        for old, new in zip(self._names(), self._names(free), strict=True):
            if not is_taken(old):
                continue
            if isinstance(old, Url):
                write_bytes(new, read_bytes(old))
                delete(old)
            else:
                Path(old).rename(str(new))
        return self._names(free)[0]


def _read(file: Path | Url) -> Any:
    """What a record holds; None: it cannot be read."""
    try:
        return read_json_object(file) if isinstance(file, Url) else read_json(file)
    except (OSError, ValueError):
        return None
