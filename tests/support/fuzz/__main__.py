"""`python -m fuzz`: runs seeded trials, and says how to repeat each that went wrong."""

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

from fuzz.report import fuzz
from fuzz.sources import SOURCES


def main() -> int:
    """Runs the trials; 1 if one went wrong."""
    parser = argparse.ArgumentParser(prog="python -m fuzz", description=__doc__)
    parser.add_argument("--seed", type=int, default=0, help="draws the cases")
    parser.add_argument("--count", type=int, default=500, help="cases of each source")
    parser.add_argument("--minutes", type=float, default=10.0, help="when to stop at the latest")
    parser.add_argument("--source", choices=SOURCES, help="only this one")
    parser.add_argument("--only", type=int, nargs="+", help="only the cases of these numbers")
    parser.add_argument("--keep", type=Path, help="folder for the files of what went wrong")
    parser.add_argument("--verbose", action="store_true", help="show every case as it ends")
    a = parser.parse_args()
    scratch = Path(tempfile.mkdtemp(prefix="mmfree-fuzz-"))
    keep = a.keep or scratch / "wrong"
    try:
        report = fuzz(
            {a.source: SOURCES[a.source]} if a.source else SOURCES,
            scratch=scratch,
            keep=keep,
            seed=a.seed,
            count=a.count,
            seconds=60 * a.minutes,
            only=a.only,
            verbose=a.verbose,
        )
    finally:
        for path in scratch.iterdir():
            if path != keep:
                shutil.rmtree(path, ignore_errors=True)
    print(report.text())
    return int(bool(report.wrong))


sys.exit(main())
