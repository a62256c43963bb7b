"""All trials of all sources within a time, and what came of them."""

import os
import re
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fuzz import workplace
from fuzz.case import Case, Outcome, Source
from fuzz.trial import Trials


@dataclass(frozen=True)
class Wrong:
    """A case that went wrong."""

    source: str
    number: int
    case: Case
    outcome: Outcome
    faults: list[str]
    folder: Path


@dataclass
class Report:
    """What came of the trials."""

    seed: int
    wanted: int
    done: Counter[str] = field(default_factory=Counter)
    codes: Counter[tuple[str, int | None]] = field(default_factory=Counter)
    wrong: list[Wrong] = field(default_factory=list)
    seconds: float = 0.0

    def text(self) -> str:
        """For people: each fault with the command that shows it, then the counts."""
        lines = []
        for w in self.wrong:
            lines += [
                f"{w.source} {w.number}: {'; '.join(w.faults)}",
                f"  cd {w.folder} && {shell_line(w.case.argv)}",
                f"  {w.case.about}; {w.outcome.seconds:.1f} s",
                *(f"  | {line[:300]}" for line in w.outcome.err.splitlines()[-3:]),
            ]
        for source, done in self.done.items():
            codes = {code: n for (of, code), n in self.codes.items() if of == source}
            ends = ", ".join(f"{n} ended with {code}" for code, n in sorted(codes.items(), key=str))
            cut = "" if done >= self.wanted else f" of {self.wanted}: the time was over"
            lines.append(f"{source}: {done}{cut}; {ends}")
        lines.append(
            f"seed {self.seed}, {self.seconds:.0f} s: {len(self.wrong)} went wrong"
            if self.wrong
            else f"seed {self.seed}, {self.seconds:.0f} s: nothing went wrong"
        )
        return "\n".join(lines)


def shell_line(argv: Sequence[str]) -> str:
    """A command line to paste into bash, whatever bytes are in it."""
    return " ".join(["mmfree", *map(_quote, argv)])


def _quote(word: str) -> str:
    if re.fullmatch(r"[\w@%+=:,./-]+", word, re.ASCII):
        return word
    if word.isprintable():
        return "'" + word.replace("'", "'\\''") + "'"
    escaped = "".join(
        chr(byte) if 32 <= byte < 127 and chr(byte) not in "'\\" else f"\\x{byte:02x}"
        for byte in os.fsencode(word)
    )
    return f"$'{escaped}'"


def fuzz(
    sources: Mapping[str, Source],
    *,
    scratch: Path,
    keep: Path,
    seed: int,
    count: int,
    seconds: float,
    exports: bool = True,
    only: Sequence[int] | None = None,
    verbose: bool = False,
) -> Report:
    """Runs the cases of all sources, each source in an equal share of the time.

    Args:
      sources: by name.
      scratch: folder to work in, made if need be.
      keep: folder for the files of what goes wrong.
      seed, count: of each source's cases.
      seconds: when to stop at the latest; what is under way ends first.
      exports: put exports of the model into the workplace too.
      only: numbers of cases, the others are passed over.
      verbose: print every case as it ends.
    """
    start = time.monotonic()
    pristine = scratch / "pristine"
    workplace.make(pristine, exports=exports)
    report = Report(seed, len(only) if only else count)
    with Trials(pristine, scratch / "trials") as trials:
        for k, (name, source) in enumerate(sources.items()):
            left = seconds - (time.monotonic() - start)
            end = time.monotonic() + left / (len(sources) - k)
            for number, case in enumerate(source(seed, count, pristine)):
                if only and number not in only:
                    continue
                if time.monotonic() > end:
                    break
                outcome, faults = trials.run(case)
                report.done[name] += 1
                report.codes[name, outcome.code] += 1
                if verbose:
                    line = shell_line(case.argv)[:150]
                    print(
                        f"{number} {outcome.code} {outcome.seconds:.1f} s {line} {faults}",
                        flush=True,
                    )
                if faults:
                    folder = keep / f"{k}-{number}"
                    folder.parent.mkdir(parents=True, exist_ok=True)
                    trials.keep(case, folder)
                    report.wrong.append(Wrong(name, number, case, outcome, faults, folder))
    report.seconds = time.monotonic() - start
    return report
