"""Reading text that somebody else wrote: byte-order marks, limits, and names given twice.

Editors and shells on Windows put a byte-order mark before UTF-8 or write UTF-16. Both are
decoded here, so that no reader sees the mark. A file may also be a pipe that nobody writes to, a
device without an end, or nested until the interpreter gives up: what is read here is a file, and
its size, depth and numbers are bounded, so that whoever asked gets an error that it can name.
Nothing here imports JAX.
"""

import codecs
import errno
import json
import os
import re
import stat
from io import BufferedReader
from typing import Any

# The mark of UTF-32 begins with that of UTF-16: longer ones first.
_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
LONGEST_MARK = 4
"""Bytes of the longest byte-order mark."""
LARGEST = 2**29
"""Bytes that are read of a text at most, unless a reader says otherwise."""
DEEPEST = 100
"""Levels of lists and objects in each other that are read at most."""
MOST_DIGITS = 40
"""Of a whole number, more than any field holds."""
_TOO_DEEP = f"nested more than {DEEPEST} deep"
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def find_encoding(start: bytes) -> tuple[str, int]:
    """The encoding that the first bytes of a text say, and the length of their mark (bytes)."""
    for mark, encoding in _MARKS:
        if start.startswith(mark):
            return encoding, len(mark)
    return "utf-8", 0


def unmarked_encoding(start: bytes) -> str | None:
    """UTF-16 or UTF-32 if the first bytes of a text are of it, without a mark; None: they are not.

    As JSON tells them apart: two ASCII characters, whose other bytes are 0. Such bytes are UTF-8
    too, of characters NUL, which no text begins with.
    """
    zeros = "".join("0" if byte == 0 else "x" for byte in start[:4])
    return {
        "x0x0": "UTF-16-LE",
        "0x0x": "UTF-16-BE",
        "x000": "UTF-32-LE",
        "000x": "UTF-32-BE",
    }.get(zeros)


def decode_text(data: bytes) -> str:
    """Text of bytes without their byte-order mark: UTF-8, or what the mark says.

    Raises:
      UnicodeDecodeError: they are not of that encoding.
    """
    encoding, mark = find_encoding(data[:LONGEST_MARK])
    return data[mark:].decode(encoding)


def open_file(path: str | os.PathLike[str]) -> BufferedReader:
    """Opens a file to read its bytes; never waits.

    A pipe or a terminal is opened only behind the name of a descriptor that is open already, as
    in `/dev/stdin` and a shell's `<(...)`.

    Raises:
      OSError: it cannot be opened, or is a folder, a device or a pipe.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISREG(mode):
        return os.fdopen(descriptor, "rb")
    piped = stat.S_ISFIFO(mode) and os.path.realpath(path).startswith("/proc/")
    if piped or os.isatty(descriptor):
        os.set_blocking(descriptor, True)
        return os.fdopen(descriptor, "rb")
    os.close(descriptor)
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    kind = "a named pipe" if stat.S_ISFIFO(mode) else "a device"
    raise OSError(errno.EINVAL, f"{kind}, not a file", str(path))


def read_bytes(path: str | os.PathLike[str], largest: int = LARGEST) -> bytes:
    """The contents of a file.

    Raises:
      OSError: it cannot be read, is no file (see `open_file`), or has more than `largest` bytes.
    """
    with open_file(path) as file:
        size, left = os.fstat(file.fileno()).st_size, largest + 1  # of a pipe the size is 0
        blocks: list[bytes] = []
        while left and size <= largest and (block := file.read(min(left, max(size, 2**20)))):
            blocks.append(block)
            left -= len(block)
        if left and size <= largest:
            return b"".join(blocks)
    limit = f"larger than the {largest >> 20} MiB that are read of such a file"
    raise OSError(errno.EINVAL, limit, str(path))


def read_text(path: str | os.PathLike[str], largest: int = LARGEST) -> str:
    r"""The text of a file: UTF-8 or what its byte-order mark says, with "\n" for every line end.

    Raises:
      OSError: as `read_bytes`.
      UnicodeDecodeError: it is not of its encoding.
    """
    return decode_text(read_bytes(path, largest)).replace("\r\n", "\n").replace("\r", "\n")


def read_json(path: str | os.PathLike[str]) -> Any:
    """What a JSON file holds.

    Raises:
      OSError: as `read_bytes`.
      ValueError: as `parse_json`, or it is not of its encoding.
    """
    return parse_json(read_text(path))


def parse_json(text: str | bytes, *, finite: bool = False) -> Any:
    """What a JSON text holds; a key that occurs twice in an object is an error.

    Args:
      text: the text.
      finite: also refuse NaN and Infinity, which Python writes and JSON does not know.

    Raises:
      ValueError: it is not JSON, a key occurs twice, it is nested deeper than `DEEPEST`, a whole
        number has more than `MOST_DIGITS` digits, or a string holds half of a surrogate pair.
    """
    try:
        value = json.loads(
            text,
            object_pairs_hook=_object,
            parse_int=_whole_number,
            parse_constant=_no_number if finite else None,
        )
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None
    _check_depth(value)
    found = _SURROGATE.search(text if isinstance(text, str) else text.decode())
    if found is not None:
        check_text(json.dumps(value, ensure_ascii=False))
    return value


def check_text(text: str) -> None:
    """Refuses what no UTF-8 stands for.

    Raises:
      ValueError: the text holds half of a surrogate pair.
    """
    try:
        text.encode()
    except UnicodeEncodeError as e:
        raise ValueError(f"{text[e.start]!r} is half of a surrogate pair, and no text") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"key {twice!r} occurs twice in one object: keep one")
    return values


def _no_number(name: str) -> Any:
    raise ValueError(f"{name} is no number of JSON")


def _whole_number(digits: str) -> int:
    if len(digits) > MOST_DIGITS:
        raise ValueError(f"a whole number has {len(digits)} digits")
    return int(digits)


def _check_depth(value: Any) -> None:
    """Level by level: what is too deep for a recursion is found without one."""
    level = [value]
    for _ in range(DEEPEST + 1):
        inner: list[Any] = []
        for holder in level:
            if isinstance(holder, dict):
                inner += [v for v in holder.values() if isinstance(v, (dict, list))]
            elif isinstance(holder, list):
                inner += [v for v in holder if isinstance(v, (dict, list))]
        if not inner:
            return
        level = inner
    raise ValueError(_TOO_DEEP)
