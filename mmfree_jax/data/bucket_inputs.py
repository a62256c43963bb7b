"""Inputs in buckets: their names as those of a folder, and the files one at a time.

What `inputs.py` knows of folders, globs and clones of data set repositories it reads from names and
from a few small files. So for an input by URL a folder of empty files is made that have the
objects' names; only those small files are downloaded into it. Nothing here imports JAX.
"""

import contextlib
import glob
import hashlib
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mmfree_jax.data.splits import README
from mmfree_jax.errors import DataError, naming
from mmfree_jax.fetched import check_file_names, refuse_half_written
from mmfree_jax.files import disk_errors
from mmfree_jax.object_cache import shared_cache
from mmfree_jax.prefixes import describe_missing
from mmfree_jax.storage import Url, download, find_object, is_url, list_below, parse_url

SAVED_SPLITS, SAVED_STATE = "dataset_dict.json", "state.json"
"""Of Hugging Face's `save_to_disk`."""
_DESCRIBING = (README, SAVED_SPLITS, SAVED_STATE)


@dataclass(frozen=True)
class Listed:
    """An input as files and folders of this machine."""

    path: str
    """That to look for."""
    urls: dict[Path, Url]
    """Of each file that only stands for an object; of a local input there are none."""


@contextlib.contextmanager
def listed(given: str) -> Iterator[Listed]:
    """An input, or for one by URL what has its names, while the block runs; errors name the URL.

    Raises:
      DataError: nothing is there.
      StorageError: the bucket is missing, refuses, or cannot be reached; or what lies there is
        half written, or has a name that no file can have.
      OutputError: the disk of temporary files cannot be written.
    """
    if not is_url(given):
        yield Listed(given, {})
        return
    url = parse_url(given, "input")
    with tempfile.TemporaryDirectory(prefix="mmfree-names-") as made:
        root = Path(made)
        with disk_errors(root, "make room there, or set TMPDIR to another folder"):
            urls = _lay_out(url, root)
        with naming(f"{url.scheme}://", f"{root}/"):
            yield Listed(str(root / url.bucket / url.key), urls)


def _lay_out(url: Url, root: Path) -> dict[Path, Url]:
    parts = url.key.split("/")
    plain = next((i for i, part in enumerate(parts) if glob.has_magic(part)), len(parts))
    top = Url(url.scheme, url.bucket, "/".join(parts[:plain]))
    objects = list_below(top)
    if not objects and (single := find_object(top)) is not None:
        objects = [single]
    if not objects:
        raise DataError(f"input {describe_missing(top)}")
    refuse_half_written(top, objects, "input")
    files = [found for found in objects if not found.url.key.endswith("/")]  # else a folder's own
    check_file_names(files)
    urls = {}
    for found in files:
        file = root / found.url.bucket / found.url.key
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            if found.url.name in _DESCRIBING:
                download(found.url, file)
            else:
                file.touch()
        except (FileExistsError, NotADirectoryError) as e:
            raise DataError(
                f"input {url} has objects of names that no files can have, such as {found.url}: "
                "rename them"
            ) from e
        urls[file] = found.url
    return urls


def has_object(given: str) -> bool:
    """Whether an object has that very URL."""
    return is_url(given) and find_object(parse_url(given, "input")) is not None


@contextlib.contextmanager
def local_file(place: Path | Url) -> Iterator[Path]:
    """A file of this machine with the contents of `place`, while the block runs.

    Raises:
      DataError: the object is gone.
      StorageError: it cannot be read.
      OutputError: the cache is too small for it, or its disk full.
    """
    if isinstance(place, Path):
        yield place
        return
    found = find_object(place)
    if found is None:
        raise DataError(f"{place} was deleted meanwhile: run the command again")
    key = hashlib.sha256(f"{place} {found.size} {found.version}".encode()).hexdigest()
    with shared_cache().use(
        key, found.size, str(place), lambda entry: download(place, entry / place.name)
    ) as folder:
        file = folder / place.name
        with naming(str(place), str(file)):
            yield file
