"""`mmfree export-hf`."""

from pathlib import Path
from typing import Annotated, Literal

import tyro

from mmfree_jax.progress import show_progress


def export_hf(
    source: Annotated[Path, tyro.conf.Positional],
    target: Annotated[Path, tyro.conf.Positional],
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    overwrite: bool = False,
    scores: Path | None = None,
    model_license: str | None = None,
    data_license: str | None = None,
) -> int:
    """Write a model as a Hugging Face folder that transformers (and the authors' package) loads.

    Args:
      source: Run directory, model folder or packed model, whose weights stay at 2 bits.
      target: New folder.
      dtype: Dtype of the stored weights; float32 keeps every bit.
      overwrite: Replace an earlier output of this command; nothing else is replaced.
      scores: Folder of `mmfree eval --output` for the model card; default: eval, if it is there.
      model_license: Licence of the model, for the card: a Hub identifier such as apache-2.0.
      data_license: Licence of the training data, for the card; default: as far as it is known.
    """
    with show_progress("exporting"):
        from mmfree_jax.saved import convert

        done = convert.export_hf(
            source,
            target,
            dtype=dtype,
            overwrite=overwrite,
            scores=scores,
            model_license=model_license,
            data_license=data_license,
        )
    tokenizer = done.tokenizer or "not in the source"
    print(
        f"{done.folder}: {done.model_type}, {done.parameters:,} parameters, {dtype}, "
        f"tokenizer {tokenizer}"
    )
    return 0
