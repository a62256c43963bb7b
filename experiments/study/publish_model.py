"""A measured model as a folder of the repository: weights, card, results, checksums.

`python -m mmfree_jax.experiments.study.publish_model --measured after --model 61M --twin
61M-transformer --out experiments/results/models/61M` takes what `measure_model` made, and refuses
a number whose provenance is missing, a file above 16 MB and more than 24 MB in all (10^6 bytes).
"""

import argparse
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from mmfree_jax.config_io import to_dict
from mmfree_jax.data.tokenizer import load_tokenizer
from mmfree_jax.errors import DataError, MMFreeError
from mmfree_jax.experiments.study.model_card import Card
from mmfree_jax.experiments.study.model_results import Measured, numbers_of, training_file
from mmfree_jax.files import copy_folder, sha256_file, write_text
from mmfree_jax.outputs import new_folder
from mmfree_jax.saved.kinds import PACKED_FILE, RESULTS, SUMS
from mmfree_jax.saved.packed import packed_files
from mmfree_jax.saved.run_directory import TOKENIZER, load_config
from mmfree_jax.text_files import parse_json, read_text

MOST_OF_A_FILE = 16_000_000
MOST_IN_ALL = 24_000_000
COMMAND = "publish_model"


def check_sizes(folder: Path) -> int:
    """The bytes of a folder's files.

    Raises:
      DataError: one is larger than MOST_OF_A_FILE, or all than MOST_IN_ALL.
    """
    sizes = {file: file.stat().st_size for file in sorted(folder.rglob("*")) if file.is_file()}
    for file, size in sizes.items():
        if size > MOST_OF_A_FILE:
            raise DataError(
                f"{file.relative_to(folder)} has {size:,} bytes, above {MOST_OF_A_FILE:,}: pack "
                "with --max-file-mb 16"
            )
    if (total := sum(sizes.values())) > MOST_IN_ALL:
        raise DataError(
            f"the files have {total:,} bytes, above {MOST_IN_ALL:,}: pack at 1.6 bits with "
            "--embedding bfloat16 or int8, or train a smaller model"
        )
    return total


def checksums(folder: Path) -> str:
    """A line for each file but the list itself, as sha256sum prints and checks them."""
    files = (f for f in sorted(folder.rglob("*")) if f.is_file() and f.name != SUMS)
    return "".join(f"{sha256_file(f)}  {f.relative_to(folder).as_posix()}\n" for f in files)


def publish(measured: Measured, out: Path, *, overwrite: bool = False) -> int:
    """Writes the folder, whole or not at all; returns its bytes.

    Args:
      measured: what was made of the model and its twin.
      out: folder to make.
      overwrite: replace an earlier folder of this function.

    Raises:
      DataError: a number's provenance is missing, the packed model was not made, or sizes are
        above the limits.
      CheckpointError: the packed model is damaged.
      OutputError: `out` is there and may not be replaced, or cannot be written.
    """
    if "pack" not in measured.steps:
        raise DataError(f"{measured.folder}: the model was not packed; run measure_model again")
    if not measured.sources():
        raise DataError(f"{measured.folder}: no held-out loss was measured of {measured.model}")
    packed = measured.folder / "packed"
    numbers, files = numbers_of(measured), packed_files(packed)
    load_tokenizer(packed / TOKENIZER)
    own_run = measured.folder / "runs" / measured.model
    samples = [
        parse_json(line)
        for line in (
            read_text(measured.folder / "samples.jsonl").splitlines()
            if "samples" in measured.steps
            else ()
        )
        if line
    ]
    card = Card(
        measured.model, measured.twin, numbers, measured.steps, to_dict(load_config(own_run)),
        samples,
    )  # fmt: skip
    record = {
        "model": measured.model,
        "twin": measured.twin,
        "packed_bytes": sum(file.stat().st_size for file in files),
        "failed_steps": measured.failed,
        "steps": measured.steps,
        "numbers": [number.to_dict() for number in numbers],
    }
    with new_folder(
        out, command=COMMAND, sources=[str(measured.folder)], overwrite=overwrite, last=PACKED_FILE
    ) as folder:
        for file in files:
            shutil.copyfile(file, folder / file.name)
        copy_folder(packed / TOKENIZER, folder / TOKENIZER)
        for name in (measured.model, measured.twin):
            run = measured.folder / "runs" / name / "config.yaml"
            if run.exists():
                shutil.copyfile(run, folder / training_file(name))
        write_text(folder / RESULTS, json.dumps(record, indent=1) + "\n")
        write_text(folder / "README.md", card.text())
        write_text(folder / SUMS, checksums(folder))
        return check_sizes(folder)


def main(argv: Sequence[str] | None = None) -> int:
    """Reads the arguments and writes the folder."""
    parser = argparse.ArgumentParser(description="Publish a measured model in the repository.")
    parser.add_argument("--measured", type=Path, required=True, help="folder of measure_model")
    parser.add_argument("--model", required=True, help="name of the model's run")
    parser.add_argument("--twin", required=True, help="name of its twin's")
    parser.add_argument("--out", type=Path, required=True, help="folder to make")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier one")
    given = parser.parse_args(argv)
    try:
        measured = Measured(given.measured, given.model, given.twin)
        size = publish(measured, given.out, overwrite=given.overwrite)
    except MMFreeError as e:
        print(f"publish_model: {e}", file=sys.stderr)
        return 2
    print(f"{given.out}: {size:,} bytes")
    if measured.failed:
        print("steps that failed and are not in it: " + ", ".join(measured.failed))
    return 0


if __name__ == "__main__":
    sys.exit(main())
