"""Ways to damage a file: its bytes, its text, its fields, and what stands in its place."""

import gzip
import json
import os
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

DEEP = 100_000
"""Levels of a nesting that no reader should follow."""
_HUGE_SIZE = 1 << 40
"""Bytes of a sparse file: more than any memory."""


def damage(file: Path, rng: random.Random) -> str:
    """Damages a file in place and says how."""
    change = rng.choices((_bytes, _text, _fields, _place), (4, 2, 6, 1))[0]
    return change(file, rng)


def _bytes(file: Path, rng: random.Random) -> str:
    name, change = rng.choice(list(_BYTES.items()))
    file.write_bytes(change(file.read_bytes(), rng))
    return name


def _span(data: bytes, rng: random.Random) -> tuple[int, int]:
    start = rng.randrange(len(data) + 1)
    return start, min(len(data), start + rng.choice((1, 2, 8, 64, 1024)))


def _flip(data: bytes, rng: random.Random) -> bytes:
    if not data:
        return b"\x01"
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 4))):
        changed[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _replace(data: bytes, rng: random.Random, new: Callable[[bytes], bytes]) -> bytes:
    start, end = _span(data, rng)
    return data[:start] + new(data[start:end]) + data[end:]


def _swap(data: bytes, rng: random.Random) -> bytes:
    a, b, c = sorted(rng.randrange(len(data) + 1) for _ in range(3))
    return data[:a] + data[b:c] + data[a:b] + data[c:]


_BYTES: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "bits flipped": _flip,
    "cut short": lambda data, rng: data[: rng.randrange(len(data) + 1)],
    "cut by a byte": lambda data, rng: data[:-1],
    "empty": lambda data, rng: b"",
    "a chunk twice": lambda data, rng: _replace(data, rng, lambda part: part * 2),
    "a chunk missing": lambda data, rng: _replace(data, rng, lambda part: b""),
    "a chunk zeroed": lambda data, rng: _replace(data, rng, lambda part: bytes(len(part))),
    "a chunk of 0xff": lambda data, rng: _replace(data, rng, lambda part: b"\xff" * len(part)),
    "chunks swapped": _swap,
    "bytes behind the end": lambda data, rng: data + rng.randbytes(rng.choice((1, 9, 100))),
    "another file's bytes": lambda data, rng: rng.randbytes(rng.choice((1, 8, 200))),
    "compressed": lambda data, rng: gzip.compress(data),
}


def _text(file: Path, rng: random.Random) -> str:
    data = file.read_bytes()
    try:
        text = data.decode()
    except UnicodeDecodeError:
        return _bytes(file, rng)
    name, change = rng.choice(list(_TEXTS.items()))
    file.write_bytes(change(text, rng))
    return name


def _some_line(text: str, rng: random.Random, new: Callable[[str], str]) -> bytes:
    lines = text.splitlines(keepends=True) or [""]
    at = rng.randrange(len(lines))
    lines[at] = new(lines[at])
    return "".join(lines).encode()


def _other_number(text: str, rng: random.Random) -> bytes:
    numbers = list(re.finditer(r"-?\d+(\.\d+)?", text))
    if not numbers:
        return text.encode()
    found = rng.choice(numbers)
    return (text[: found.start()] + rng.choice(NUMBERS) + text[found.end() :]).encode()


NUMBERS = (
    "-1", "0", "1", "0.5", "NaN", ".nan", "-Infinity", ".inf", "1e999", "-1e999", "1e308",
    "1000000000", "100000000000", "9223372036854775808", "1" * 401, "1" * 5000, "0x7", "1_0",
)  # fmt: skip

_TEXTS: dict[str, Callable[[str, random.Random], bytes]] = {
    "UTF-16": lambda text, rng: text.encode("utf-16"),
    "UTF-16 without a mark": lambda text, rng: text.encode("utf-16-le"),
    "UTF-32": lambda text, rng: text.encode("utf-32"),
    "Latin-1": lambda text, rng: b"\xe9\xff" + text.encode("latin-1", "replace"),
    "a mark before UTF-8": lambda text, rng: b"\xef\xbb\xbf" + text.encode(),
    "two marks": lambda text, rng: b"\xef\xbb\xbf" * 2 + text.encode(),
    "Windows line ends": lambda text, rng: text.replace("\n", "\r\n").encode(),
    "a NUL": lambda text, rng: _some_line(text, rng, lambda line: "\0" + line),
    "half of a pair": lambda text, rng: _some_line(
        text, rng, lambda line: re.sub(r'"(\w)', r'"\\ud800\1', line, count=1)
    ),
    "a line twice": lambda text, rng: _some_line(text, rng, lambda line: line * 2),
    "a line missing": lambda text, rng: _some_line(text, rng, lambda line: ""),
    "a tab before a line": lambda text, rng: _some_line(text, rng, lambda line: "\t" + line),
    "another number": _other_number,
    "nested lists": lambda text, rng: b"[" * DEEP + b"]" * DEEP,
    "nested objects": lambda text, rng: b'{"a":' * DEEP + b"1" + b"}" * DEEP,
    "nested in a line": lambda text, rng: _some_line(
        text, rng, lambda line: '{"text": ' + "[" * DEEP + "]" * DEEP + "}\n"
    ),
    "an alias bomb": lambda text, rng: alias_bomb().encode(),
    "an alias of itself": lambda text, rng: b"&a [*a]\n",
    "a long line": lambda text, rng: text.encode() + b"x" * 150_000,
}


def alias_bomb(levels: int = 24, width: int = 10) -> str:
    """A YAML mapping of a few hundred bytes that stands for width^levels values."""
    lines = ["a0: &a0 [lol]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * width)}]" for i in range(1, levels)]
    return "\n".join(lines) + "\n"


def _fields(file: Path, rng: random.Random) -> str:
    """Changes a value in JSON, in a line of JSON, or in YAML; else the text."""
    try:
        text = file.read_bytes().decode()
    except UnicodeDecodeError:
        return _bytes(file, rng)
    lines = text.splitlines()
    try:
        if file.name.endswith((".yaml", ".yml")):
            tree, what = _change(yaml.safe_load(text), rng)
            file.write_text(yaml.safe_dump(tree, allow_unicode=True))
        elif file.name.endswith(".jsonl") and lines:
            at = rng.randrange(len(lines))
            tree, what = _change(json.loads(lines[at]), rng)
            lines[at] = json.dumps(tree)
            file.write_text("\n".join(lines) + "\n")
        else:
            tree, what = _change(json.loads(text), rng)
            file.write_text(json.dumps(tree))
    except (ValueError, yaml.YAMLError):
        return _text(file, rng)
    return what


VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 0.5, -0.0, 10**9, 10**11, 2**63, 10**400, float("nan"),
    float("inf"), -float("inf"), 1e308, "", "1", "1e999", "a", "\ud800", "x" * 10_000, "../x",
    "/etc/passwd", "a/b", ".", [], {}, [[]], [None], [1, 2, 3], {"a": 1}, [10**9] * 3,
)  # fmt: skip


def _change(tree: Any, rng: random.Random) -> tuple[Any, str]:
    """The tree with a value somewhere in it changed, and what was changed."""
    places: list[tuple[Any, Any]] = []

    def walk(value: Any) -> None:
        pairs = value.items() if isinstance(value, dict) else enumerate(value)
        for key, inner in pairs:
            places.append((value, key))
            if isinstance(inner, (dict, list)):
                walk(inner)

    if isinstance(tree, (dict, list)):
        walk(tree)
    if not places or rng.random() < 0.03:
        value = rng.choice(VALUES)
        return value, f"in all {value!r:.40}"
    holder, key = rng.choice(places)
    what = rng.choice(("value", "value", "value", "value", "missing", "key", "scaled"))
    if what == "missing":
        del holder[key]
        return tree, f"{key!r:.40} missing"
    if what == "key" and isinstance(holder, dict):
        new = rng.choice(("unknown", "", "\ud800", "../x", "x" * 10_000, "é"))
        holder[new] = holder.pop(key)
        return tree, f"{key!r:.40} called {new!r:.40}"
    old = holder[key]
    if what == "scaled" and isinstance(old, (int, float)) and not isinstance(old, bool):
        holder[key] = rng.choice((old + 1, -old, old * 2, old / 2, old * 10**9, str(old)))
    else:
        holder[key] = rng.choice(VALUES)
    return tree, f"{key!r:.40} is {holder[key]!r:.60}"


_PLACES = ("missing", "pipe", "folder", "device", "zeros", "dangling", "circle", "huge")


def _place(file: Path, rng: random.Random) -> str:
    """Puts something else in the file's place. (Permissions mean nothing to root.)"""
    name = rng.choice(_PLACES)
    if name == "huge" and (file.parent.name == "texts" or file.suffix == ".safetensors"):
        # A text may well have a tebibyte, and takes its time; weights are mapped, which the
        # trials' limit on memory counts.
        name = "missing"
    file.unlink()
    if name == "pipe":
        os.mkfifo(file)
    elif name == "folder":
        file.mkdir()
    elif name == "device":
        file.symlink_to("/dev/null")
    elif name == "zeros":
        file.symlink_to("/dev/zero")
    elif name == "dangling":
        file.symlink_to("nowhere")
    elif name == "circle":
        file.symlink_to(file.name)
    elif name == "huge":
        with file.open("wb") as stream:
            stream.truncate(_HUGE_SIZE)
    return f"in its place: {name}"
