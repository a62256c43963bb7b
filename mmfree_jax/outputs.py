"""Folders that commands make, on a disk or in a bucket, and which of them may be replaced.

A command replaces only what the same command made. `new_folder` leaves the list of its files in
`MARKER`, and a folder is an earlier output if it has that list, of the same command, and holds
nothing else. Folders of older versions have no list: their user removes them.

On a disk a folder takes its place by one rename. For a bucket it is written in a temporary folder
(`TMPDIR`) and uploaded (`prefixes.upload_folder`), while a lease keeps other writers out. An upload
that did not end is known by its mark, which lists its files too: readers refuse it, and the same
command writes it again, without --overwrite. Nothing here imports JAX.
"""

import contextlib
import functools
import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mmfree_jax.errors import MMFreeError, OutputError
from mmfree_jax.files import (
    StrPath,
    disk_errors,
    folder_atomically,
    is_disk_error,
    is_leftover,
    owner,
    restore,
    write_text,
)
from mmfree_jax.leases import LEASE, lease
from mmfree_jax.places import locate
from mmfree_jax.prefixes import UPLOADING, names_below, read_json, upload_folder
from mmfree_jax.storage import MissingError, Url, check_bucket, find_object, is_url, parse_url
from mmfree_jax.text_files import read_json as read_json_file

MARKER = ".mmfree-output.json"


def _lies_in(path: Path, folder: Path) -> bool:
    """Whether `path` is `folder` or below it, by whatever name or mount; both are resolved."""
    return folder.exists() and any(p.exists() and p.samefile(folder) for p in (path, *path.parents))


def _entries(folder: Path) -> set[str]:
    """Relative names of the files and empty folders below `folder`, without leftovers."""
    names = set()
    for where, folders, files in os.walk(folder):
        links = [name for name in folders if os.path.islink(os.path.join(where, name))]
        names |= {os.path.relpath(os.path.join(where, n), folder) for n in files + links}
        if not folders and not files:
            names.add(os.path.relpath(where, folder))
    return {name for name in names - {"."} if not is_leftover(os.path.basename(name))}


def _check_is_ours(place: Path | Url, marker: Any, found: set[str], command: str) -> None:
    """Refuses what is no output of `command`: by its marker, and by the names found there."""
    try:
        writer, listed = marker["command"], {*marker["files"], MARKER, UPLOADING}
    except (TypeError, KeyError):
        raise OutputError(
            f"{place} is not replaced: it was not written by `mmfree {command}`; choose another "
            "folder, or remove it yourself"
        ) from None
    if writer != command:
        raise OutputError(
            f"{place} is not replaced: `mmfree {writer}` wrote it, not `mmfree {command}`; "
            "choose another folder, or remove it yourself"
        )
    if others := found - listed:
        raise OutputError(
            f"{place} is not replaced: it also holds {min(others)}, which `mmfree {command}` did "
            "not write; choose another folder, or move that away"
        )


def check_target(
    path: StrPath, *, command: str, sources: Sequence[StrPath] = (), overwrite: bool | None = None
) -> Path | Url:
    """The resolved path, or the URL, of a folder that `command` may make or replace.

    Args:
      path: the folder or its URL, there or not.
      command: the words after `mmfree`.
      sources: what the command reads; those that do not exist are passed over.
      overwrite: an earlier output of the command may be replaced; None: never, and it has no
        option that says so.

    Raises:
      OutputError: the folder is, holds or lies in a source, is no folder, cannot be renamed (a
        mount point, the current folder, a whole bucket), or holds what may not be replaced; see
        the module.
      ConfigError: it is a URL of what is no bucket.
      StorageError: the bucket is not there, refuses, or cannot be reached.
    """
    place = locate(path, "output")
    if isinstance(place, Url):
        _check_prefix(place, command, sources, overwrite=overwrite)
        return place
    target = Path(os.path.realpath(path))
    with disk_errors(path):
        restore(target)
        for source in sources:
            real = Path(os.path.realpath(source))
            if _lies_in(target, real) or _lies_in(real, target):
                raise _is_read(path, source)
        if target.exists() and not target.is_dir():
            raise OutputError(f"{path} is a file: choose another folder")
        if target.is_mount():
            raise OutputError(f"{path} is a mount point: name a new folder inside it")
        if _lies_in(Path.cwd(), target):
            raise OutputError(f"{path} is or holds the current folder: name a new folder inside it")
        if target.is_dir() and (found := _entries(target)):
            marker = None
            with contextlib.suppress(OSError, ValueError):
                marker = read_json_file(target / MARKER)
            _check_is_ours(target, marker, found, command)
            if not overwrite:
                raise _exists(path, overwrite)
    return target


def _is_read(path: StrPath | Url, source: StrPath) -> OutputError:
    return OutputError(
        f"{path} is, holds or lies in {source}, which is read: choose another folder"
    )


def _exists(path: StrPath | Url, overwrite: bool | None) -> OutputError:
    way_out = "remove it yourself" if overwrite is None else "pass --overwrite"
    return OutputError(f"{path} exists already: choose another folder, or {way_out}")


def _check_prefix(
    url: Url, command: str, sources: Sequence[StrPath], *, overwrite: bool | None
) -> set[str]:
    """Names of the objects below a URL, which `command` may replace; see `check_target`."""
    for source in sources:
        if is_url(source):
            read = parse_url(source)
            one, other = f"{url}/", f"{read}/"
            if one.startswith(other) or other.startswith(one):
                raise _is_read(url, source)
    if not url.key:
        raise OutputError(f"{url} is a whole bucket: name a new folder inside it")
    check_bucket(url)
    found = names_below(url) - {LEASE}
    if not found:
        if find_object(url) is not None:
            raise OutputError(f"{url} is an object: choose another folder")
        return found
    is_half = UPLOADING in found
    marker = None
    with contextlib.suppress(MissingError, ValueError):
        marker = read_json(url / (UPLOADING if is_half else MARKER))
    _check_is_ours(url, marker, found, command)
    if not (overwrite or is_half):
        raise _exists(url, overwrite)
    return found


@contextlib.contextmanager
def new_folder(
    path: StrPath,
    *,
    command: str,
    sources: Sequence[StrPath] = (),
    overwrite: bool | None = None,
    last: str | None = None,
) -> Iterator[Path]:
    """A folder to write into, which becomes `path` when the block ends without an error.

    Args:
      path, command, sources, overwrite: see `check_target`.
      last: the file by which readers know the folder; into a bucket it goes after the others.

    Raises:
      OutputError: as `check_target`, or the disk cannot be written; what was there is as it was.
      StorageError: the bucket refuses, or cannot be reached. What was there is as it was, or
        marked as half written.
    """
    place = locate(path, "output")
    if isinstance(place, Url):
        with _new_prefix(place, command, sources, overwrite=overwrite, last=last) as folder:
            yield folder
        return
    check = functools.partial(
        check_target, path, command=command, sources=sources, overwrite=overwrite
    )
    target = check()
    assert isinstance(target, Path)
    with folder_atomically(target, named=path, before_replacing=check) as folder:
        yield folder
        _list_files(folder, command)


def _list_files(folder: Path, command: str) -> None:
    marker = {"command": command, "files": sorted(_entries(folder))}
    write_text(folder / MARKER, json.dumps(marker, indent=1) + "\n")


@contextlib.contextmanager
def _new_prefix(
    url: Url, command: str, sources: Sequence[StrPath], *, overwrite: bool | None, last: str | None
) -> Iterator[Path]:
    check = functools.partial(_check_prefix, url, command, sources, overwrite=overwrite)
    check()
    with contextlib.ExitStack() as held:
        claim = held.enter_context(lease(url / LEASE, f"output {url}", owner(), remove=True))
        earlier = check()
        with staging(url) as folder:
            yield folder
            _list_files(folder, command)
            upload_folder(
                folder,
                url,
                command=command,
                earlier=earlier,
                last=(*([] if last is None else [last]), MARKER),
                check=claim.check,
            )


@contextlib.contextmanager
def staging(url: Url) -> Iterator[Path]:
    """A temporary folder for what goes to a URL; messages about files in it name that.

    Raises:
      OutputError: the disk of temporary files cannot be written.
    """
    parent = tempfile.gettempdir()
    with (
        disk_errors(parent, "make room there, or set TMPDIR to another folder"),
        tempfile.TemporaryDirectory(prefix="mmfree-output-") as made,
    ):
        folder = Path(made) / url.name
        folder.mkdir()
        try:
            yield folder
        except MMFreeError as e:  # of a file inside, which nobody knows by that name
            full = _disk_error(e)
            if full is not None:
                raise full from e
            raise type(e)(str(e).replace(str(folder), str(url))) from e


def _disk_error(error: BaseException) -> OSError | None:
    """What went wrong with the disk, where `files.disk_errors` told of it."""
    while isinstance(error, OutputError) and error.__cause__ is not None:
        error = error.__cause__
    return error if isinstance(error, OSError) and is_disk_error(error) else None
