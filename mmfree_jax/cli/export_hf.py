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
) -> int:
    """Write a model as a Hugging Face folder that transformers (and the authors' package) loads.

    Args:
      source: Run directory, model folder or packed model, whose weights stay at 2 bits.
      target: New folder.
      dtype: Dtype of the stored weights; float32 keeps every bit.
      overwrite: Replace an earlier output of this command; nothing else is replaced.
    """
    with show_progress("exporting"):
        from mmfree_jax.saved import convert

        done = convert.export_hf(source, target, dtype=dtype, overwrite=overwrite)
    tokenizer = done.tokenizer or "not in the source"
    print(
        f"{done.folder}: {done.model_type}, {done.parameters:,} parameters, {dtype}, "
        f"tokenizer {tokenizer}"
    )
    return 0
