"""`mmfree import-hf`."""

from typing import Annotated

import tyro

from mmfree_jax.places import PlaceOrUrl
from mmfree_jax.progress import show_progress


def import_hf(
    source: Annotated[PlaceOrUrl, tyro.conf.Positional],
    target: Annotated[PlaceOrUrl, tyro.conf.Positional],
    overwrite: bool = False,
) -> int:
    """Turn a Hugging Face folder (hgrn_bit or llama) into a model folder of ours.

    Args:
      source: Folder with config.json and model.safetensors, or its sharded index; or its URL.
      target: New folder, or its URL.
      overwrite: Replace an earlier output of this command; nothing else is replaced.
    """
    with show_progress("importing"):
        from mmfree_jax.saved import convert

        done = convert.import_hf(source, target, overwrite=overwrite)
    print(
        f"{done.folder}: {done.model_type}, {done.parameters:,} parameters, "
        f"tokenizer {done.tokenizer or 'not in the source'}"
    )
    return 0
