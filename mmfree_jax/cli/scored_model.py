"""The model that `mmfree eval`, `eval mqar` and `eval needle` score, and where results go."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmfree_jax.config import MeshConfig
from mmfree_jax.errors import DataError
from mmfree_jax.places import locate
from mmfree_jax.progress import show_progress
from mmfree_jax.storage import Url, check_bucket


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
        from mmfree_jax.infer.text import check_tokenizer

        tokenizer = self.saved.tokenizer()
        if tokenizer is None:
            raise DataError(
                f"model {self.saved.place} has no tokenizer: put tokenizer.json into its folder"
            )
        check_tokenizer(self.model, tokenizer)
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
