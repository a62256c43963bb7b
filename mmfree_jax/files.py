"""Writing files and folders that appear whole or not at all; locks; digests. No JAX is imported.

Files are written beside their place under a name that `is_leftover` knows, synced and renamed;
their modes follow the umask. A disk that is full or read-only gives one line (`OutputError`).

A file may be replaced if it begins as the command's own do (`check_file`); which folders may be is
in `outputs.py`.
"""

import contextlib
import ctypes
import errno
import fcntl
import hashlib
import io
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from mmfree_jax.errors import OutputError
from mmfree_jax.places import check_local, locate
from mmfree_jax.storage import (
    Url,
    check_bucket,
    create,
    find_object,
    is_url,
    parse_url,
    read_bytes,
    replace,
)
from mmfree_jax.text_files import open_file

StrPath = str | os.PathLike[str]
_DISK_ERRORS = {
    getattr(errno, name)
    for name in ("EACCES", "EDQUOT", "EFBIG", "EIO", "ENOSPC", "EPERM", "EROFS", "ESTALE")
}


class InUseError(OutputError):
    """Another process holds the lock."""


def is_disk_error(error: OSError) -> bool:
    """Whether it is for the user to put right: a disk that is full, read-only, closed to us."""
    return error.errno in _DISK_ERRORS


@contextlib.contextmanager
def disk_errors(
    path: StrPath, way_out: str = "make room there, or choose another place"
) -> Iterator[None]:
    """Turns an OSError while writing `path` into an OutputError of one line."""
    try:
        yield
    except OSError as e:
        raise OutputError(f"{path} cannot be written ({e.strerror or e}): {way_out}") from e


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")


def is_leftover(name: str) -> bool:
    """Whether a file or folder of that name is what a killed writer left."""
    return re.fullmatch(r"\..+\.[0-9a-f]{8}\.(tmp|old)", name) is not None


def _exchange(one: Path, other: Path) -> bool:
    """Swaps two folders in one step; False where the system or the file system cannot."""
    try:
        call = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError):
        return False
    at_cwd, exchange = -100, 2  # of linux/fcntl.h and linux/fs.h
    return call(at_cwd, os.fsencode(one), at_cwd, os.fsencode(other), exchange) == 0


def restore(target: Path) -> None:
    """Gives a folder its name back that a writer moved away and was killed before its next step."""
    with contextlib.suppress(FileNotFoundError):
        if target.exists():
            return
        moved = rf"\.{re.escape(target.name)}\.[0-9a-f]{{8}}\.old"
        for path in target.parent.iterdir():
            if re.fullmatch(moved, path.name) and path.is_dir():
                path.rename(target)
                return


def _take_place(new: Path, target: Path) -> None:
    """Puts the folder `new` in the place of the folder `target`, and removes that."""
    if _exchange(new, target):
        shutil.rmtree(new, ignore_errors=True)
        return
    old = _beside(target).with_suffix(".old")  # which `_restore` knows
    target.rename(old)
    try:
        new.rename(target)
    except OSError:
        old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def sync_folder(folder: Path) -> None:
    """Makes the names in `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def open_atomically(path: StrPath | Url) -> Iterator[BinaryIO]:
    """A file to write, which becomes `path` when the block ends without an error.

    Missing parents are made, a symbolic link keeps pointing where it does, and what is no file
    (/dev/stdout, a pipe) is written to as it is. What goes to a URL is kept in memory until then,
    and replaces an object on the condition that nobody else did meanwhile.

    Raises:
      OutputError: it cannot be written; what was there is as it was.
      ConfigError: it is a URL of what is no bucket.
      ChangedError: another job wrote the object meanwhile.
      StorageError: the bucket refuses, or cannot be reached.
    """
    place = locate(path, "output")
    if isinstance(place, Url):
        found = find_object(place)
        memory = io.BytesIO()
        yield memory
        data = memory.getvalue()
        _ = create(place, data) if found is None else replace(place, data, found.version)
        return
    with disk_errors(str(path)):
        if os.path.isdir(place):
            raise OutputError(f"{path} is a folder: give the name of a file")
        if os.path.exists(place) and not os.path.isfile(place):
            with place.open("wb") as file:
                yield file
            return
        target = Path(os.path.realpath(place))
        target.parent.mkdir(parents=True, exist_ok=True)
        beside = _beside(target)
        try:
            with beside.open("xb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            beside.replace(target)
        except BaseException:
            beside.unlink(missing_ok=True)
            raise
        sync_folder(target.parent)


def write_bytes(path: StrPath | Url, data: bytes | bytearray | memoryview) -> None:
    """Writes a file; see `open_atomically`."""
    with open_atomically(path) as file:
        file.write(data)


def write_text(path: StrPath | Url, text: str) -> None:
    """Writes a file in UTF-8; see `open_atomically`."""
    write_bytes(path, text.encode())


def copy_folder(source: StrPath, target: StrPath) -> None:
    """Copies the files below a folder; their modes follow the umask, unlike `shutil.copytree`."""
    for where, _, names in os.walk(source):
        to = Path(target) / os.path.relpath(where, source)
        to.mkdir(parents=True, exist_ok=True)
        for name in names:
            shutil.copyfile(os.path.join(where, name), to / name)


def check_file(
    path: StrPath | Url,
    begins: str,
    *,
    beside: Sequence[StrPath | Url] = (),
    sources: Sequence[StrPath] = (),
) -> None:
    """Checks that a file may be made or replaced; pipes and devices always may.

    Args:
      path: the file, or the URL of an object, there or not.
      begins: regular expression for the first 1,000 bytes of the command's earlier outputs.
      beside: files that are written with it, where it is: earlier outputs where it is one.
      sources: files that the command reads.

    Raises:
      OutputError: it is a folder or a source, or holds what the command did not write.
      ConfigError: it is a URL of what is no bucket.
      StorageError: the bucket is missing, refuses, or cannot be reached.
    """

    def begins_so(found: bytes) -> bool:
        return not found or re.match(begins.encode("latin-1"), found, re.DOTALL) is not None

    def is_earlier(file: StrPath) -> bool:
        with open(file, "rb") as stream:
            return begins_so(stream.read(1000))

    place = locate(path, "output")
    if isinstance(place, Url):
        _check_objects(place, beside, sources, begins_so)
        return
    with disk_errors(place, "choose another file"):
        files = (place, *(locate(file, "output") for file in beside))
        if folders := [file for file in files if isinstance(file, Path) and file.is_dir()]:
            raise OutputError(f"{folders[0]} is a folder: give the name of a file")
        there = [file for file in files if isinstance(file, Path) and os.path.isfile(file)]
        for file in there:
            if any(os.path.exists(s) and os.path.samefile(file, s) for s in sources):
                raise _is_read(file)
        if there and not (os.path.isfile(place) and is_earlier(place)):
            raise _is_no_output(there[0])


def _is_read(file: StrPath | Url) -> OutputError:
    return OutputError(f"{file} is not replaced: it is read; choose another name")


def _is_no_output(file: StrPath | Url) -> OutputError:
    return OutputError(
        f"{file} is not replaced: it is no earlier output of this command; choose another name, or "
        "remove it yourself"
    )


def _check_objects(
    url: Url,
    beside: Sequence[StrPath | Url],
    sources: Sequence[StrPath],
    begins_so: Callable[[bytes], bool],
) -> None:
    """Does what `check_file` does, in a bucket."""
    check_bucket(url)
    read = {parse_url(source) for source in sources if is_url(source)}
    there = {}
    for place in (url, *(locate(path, "output") for path in beside)):
        assert isinstance(place, Url)
        if place in read:
            raise _is_read(place)
        if (found := find_object(place)) is not None:
            there[place] = found
    known = url in there and begins_so(read_bytes(url, 0, min(1000, there[url].size)))
    if there and not known:
        raise _is_no_output(min(there))


@contextlib.contextmanager
def folder_atomically(
    target: Path,
    *,
    named: StrPath | None = None,
    before_replacing: Callable[[], object] = lambda: None,
) -> Iterator[Path]:
    """A folder to write into, which takes the place of `target`, whatever that holds.

    Args:
      target: the folder, resolved.
      named: how messages name it, if not so.
      before_replacing: raises if what is there may not be replaced.

    Raises:
      OutputError: the disk cannot be written; what was there is as it was.
    """
    path = named or target
    beside = _beside(target)
    with disk_errors(path):
        restore(target)
        try:
            beside.mkdir(parents=True)
            try:
                yield beside
            except OutputError as e:  # of a file inside, which nobody knows by that name
                raise OutputError(str(e).replace(str(beside), str(path))) from e
            for where, _, files in os.walk(beside):
                for name in files:
                    with open(os.path.join(where, name), "rb") as file:
                        os.fsync(file.fileno())
                sync_folder(Path(where))
            before_replacing()
            if target.is_dir():
                _take_place(beside, target)
            else:
                beside.rename(target)
            sync_folder(target.parent)
        finally:
            shutil.rmtree(beside, ignore_errors=True)


def take_lock(path: StrPath, what: str, *, wait: bool = False) -> int:
    """Locks the file `path` and writes into it who holds it.

    Over a network the file system must support `flock` (NFSv4, Lustre with `-o flock`, GPFS do).

    Args:
      path: of the lock; it and its parents are made.
      what: is in use while the lock is held, for the message.
      wait: until it is free.

    Returns:
      The descriptor. The lock ends when it is closed here and in every process that inherited
      it, also by their death.

    Raises:
      InUseError: another process holds it; says which.
      OutputError: the file cannot be written.
      ConfigError: it is a URL.
    """
    check_local(path, "output")
    with disk_errors(what, "choose a writable folder"):
        while True:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            try:
                _flock(descriptor, what, wait=wait)
                if _is_still(descriptor, path):  # else its holder has removed it meanwhile
                    os.ftruncate(descriptor, 0)
                    os.pwrite(descriptor, owner().encode(), 0)
                    return descriptor
            except BaseException:
                os.close(descriptor)
                raise
            os.close(descriptor)


def _is_still(descriptor: int, path: StrPath) -> bool:
    """Whether the open file is the one that has the name."""
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    return False


def _flock(descriptor: int, what: str, *, wait: bool) -> None:
    if wait:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        return
    for patience in (0.05, 0.05, 0.05, 0.0):  # `is_locked` holds it for an instant
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            time.sleep(patience)
    holder = os.pread(descriptor, 200, 0).decode(errors="replace").strip() or "unknown"
    raise InUseError(
        f"{what} is in use by another job ({holder}): wait for it to end, or choose another"
    )


@contextlib.contextmanager
def lock(path: StrPath, what: str, *, wait: bool = False) -> Iterator[None]:
    """Holds a lock for the block; see `take_lock`."""
    descriptor = take_lock(path, what, wait=wait)
    try:
        yield
    finally:
        os.close(descriptor)


def owner() -> str:
    """What `take_lock` writes into its file."""
    return f"process {os.getpid()} on {os.uname().nodename}"


def is_locked(path: StrPath) -> bool:
    """Whether some process, here or on another host, holds the lock `path`."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def sha256(data: bytes | bytearray | memoryview) -> str:
    """SHA-256 (hex)."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: StrPath) -> str:
    """SHA-256 of a file (hex)."""
    with open_file(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
