"""`mmfree export-hf`."""

from pathlib import Path
from typing import Annotated, Literal

import tyro

from mmfree_jax.errors import ConfigError
from mmfree_jax.places import PlaceOrUrl
from mmfree_jax.progress import show_progress
from mmfree_jax.ranges import Step
from mmfree_jax.saved import hub
from mmfree_jax.storage import is_url


def export_hf(
    source: Annotated[PlaceOrUrl, tyro.conf.Positional],
    target: Annotated[PlaceOrUrl, tyro.conf.Positional],
    step: Step | None = None,
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    overwrite: bool = False,
    scores: Path | None = None,
    model_license: str | None = None,
    data_license: str | None = None,
    push_to_hub: str | None = None,
    private: bool = True,
    dry_run: bool = False,
) -> int:
    """Write a model as a Hugging Face folder that transformers (and the authors' package) loads.

    Args:
      source: Run directory, model folder or packed model, whose weights stay at 2 bits; or its URL.
      target: New folder, or its URL.
      step: Checkpoint of a training run: its step, or best; default: the newest.
      dtype: Dtype of the stored weights; float32 keeps every bit.
      overwrite: Replace an earlier output of this command; nothing else is replaced.
      scores: Folder of `mmfree eval --output` for the model card; default: eval, if it is there.
      model_license: Licence of the model, for the card: a Hub identifier such as apache-2.0.
      data_license: Licence of the training data, for the card; default: as far as it is known.
      push_to_hub: Repository on the Hugging Face Hub, owner/name, to send the written folder to.
      private: Whether a repository that is made is seen by its owner alone.
      dry_run: With --push-to-hub: write the folder, list what would be sent, and send nothing.
    """
    if dry_run and push_to_hub is None:
        raise ConfigError("--dry-run is given: name the repository with --push-to-hub OWNER/NAME")
    if push_to_hub is not None:
        hub.check_repository(push_to_hub, sends=not dry_run)
    if push_to_hub is not None and is_url(target):
        raise ConfigError(
            f"--push-to-hub sends a folder of this machine, and target is {target}: write it to a "
            "local folder"
        )
    with show_progress("exporting"):
        from mmfree_jax.saved import convert

        done = convert.export_hf(
            source,
            target,
            step=step,
            dtype=dtype,
            overwrite=overwrite,
            scores=scores,
            model_license=model_license,
            data_license=data_license,
            repository=push_to_hub,
        )
    tokenizer = done.tokenizer or "not in the source"
    print(
        f"{done.folder}: {done.model_type}, {done.parameters:,} parameters, {dtype}, "
        f"tokenizer {tokenizer}"
    )
    if push_to_hub is None:
        return 0
    assert isinstance(done.folder, Path)
    files = hub.files_to_send(done.folder)
    for file in files:
        print(f"  {file.size:>16,}  {file.name}")
    size = sum(file.size for file in files)
    if dry_run:
        print(f"{push_to_hub}: {len(files)} files, {size:,} bytes; dry run: nothing is sent")
        return 0
    with show_progress(f"sending {size:,} bytes to {push_to_hub}"):
        address = hub.send(done.folder, push_to_hub, files, private=private)
    print(f"{address}: {len(files)} files, {size:,} bytes")
    return 0
