"""Are the prepared data those of the study?

`python -m mmfree_jax.experiments.study.check_data data/study` compares the folders there with the
record of them, `experiments/results/study2/data.json` of the working directory.
"""

import argparse
import sys
from pathlib import Path

from mmfree_jax.data.dataset import HELDOUT, TRAIN, open_dataset
from mmfree_jax.errors import MMFreeError
from mmfree_jax.text_files import read_json

RECORD = Path("experiments/results/study2/data.json")


def differences(folder: Path, record: Path = RECORD) -> list[str]:
    """A line for each split that is not the recorded one.

    Raises:
      DataError: a folder is missing or damaged.
    """
    lines = []
    for source, splits in read_json(record)["sources"].items():
        for split in (TRAIN, HELDOUT):
            found = open_dataset(folder / source, split)
            if found.fingerprint != splits[split]["fingerprint"]:
                lines.append(
                    f"{folder / source}, {split}: {found.num_tokens:,} tokens, fingerprint "
                    f"{found.fingerprint[:16]}; the study has {splits[split]['tokens']:,}, "
                    f"{splits[split]['fingerprint'][:16]}"
                )
    return lines


def main() -> int:
    """Prints the differences; 1 where there are any."""
    parser = argparse.ArgumentParser(description="Compare prepared data with the study's record.")
    parser.add_argument("folder", type=Path, help="holds a folder of each source")
    folder = parser.parse_args().folder
    try:
        found = differences(folder)
    except MMFreeError as e:
        found = [str(e)]
    print("\n".join(found) or "the data are the study's")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
