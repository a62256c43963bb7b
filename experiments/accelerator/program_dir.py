"""A compiled program on disk: `program.asm`, `memory.bin`, `program.json`."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mmfree_jax.config_io import from_dict
from mmfree_jax.errors import ConfigError, DataError
from mmfree_jax.experiments.accelerator.compile import Compiled
from mmfree_jax.experiments.accelerator.isa import Instruction, assemble, disassemble
from mmfree_jax.experiments.accelerator.machine import Machine
from mmfree_jax.files import sha256, sha256_file, write_bytes, write_text
from mmfree_jax.json_shape import digest, fault
from mmfree_jax.outputs import new_folder
from mmfree_jax.places import PlaceOrUrl
from mmfree_jax.text_files import read_bytes, read_json, read_text

COMMAND = "hardware compile"
_VERSION = 1
_LARGEST_MEMORY = 2**34


def save(compiled: Compiled, path: PlaceOrUrl, *, model: PlaceOrUrl) -> None:
    """Writes a program, made from `model`, in place of an earlier one.

    Raises:
      OutputError: see `check_target`.
    """
    assert compiled.memory is not None
    meta = {
        "version": _VERSION,
        "machine": dataclasses.asdict(compiled.machine),
        "token_stride": compiled.token_stride,
        "frac": compiled.frac,
        "places": compiled.places,
    }
    with new_folder(
        path, command=COMMAND, sources=[model], overwrite=True, last="program.json"
    ) as folder:
        write_text(folder / "program.asm", disassemble(compiled.program))
        write_bytes(folder / "memory.bin", compiled.memory.tobytes())
        meta["memory_sha256"] = sha256_file(folder / "memory.bin")
        meta["program_sha256"] = _program_digest(compiled.program)
        meta = json.loads(json.dumps(meta))  # what a reader finds, tuples as lists
        signed = meta | {"sha256": digest(meta)}
        write_text(folder / "program.json", json.dumps(signed, indent=1) + "\n")


def load(folder: Path) -> Compiled:
    """Reads a program.

    Raises:
      DataError: a file is missing, malformed or too new.
    """
    try:
        meta = read_json(folder / "program.json")
        if fault(meta, {"version": int, "places": dict, "machine": dict, "frac": dict}):
            raise ValueError("a field is missing or of another type")
        if meta["version"] > _VERSION:
            raise DataError(f"{folder}/program.json is of version {meta['version']}: update mmfree")
        text = read_text(folder / "program.asm")
        memory = np.frombuffer(
            bytearray(read_bytes(folder / "memory.bin", _LARGEST_MEMORY)), np.uint8
        )
        # Programs of older versions have no checksums.
        if meta.pop("sha256", None) not in (None, digest(meta)):
            raise ValueError("it does not match its own checksum")
        if meta.pop("memory_sha256", None) not in (None, sha256(memory.data)):
            raise DataError(f"{folder}/memory.bin does not match its checksum: compile again")
        own = meta.pop("program_sha256", None)
        machine = from_dict(Machine, meta["machine"])
        places = {name: (a, n) for name, (a, n) in meta["places"].items()}
        stride, frac = meta["token_stride"], meta["frac"]
        _check(places, stride, frac, len(memory) * 4 // machine.lanes)
    except OSError as e:
        raise DataError(
            f"{e.filename} cannot be read ({e.strerror}): give a folder that `mmfree hardware "
            "compile` wrote"
        ) from e
    except (KeyError, TypeError, ValueError, ConfigError) as e:
        raise DataError(f"{folder}/program.json is malformed ({e}): compile again") from e
    try:
        program = assemble(text)
    except DataError as e:
        raise DataError(f"{folder}/program.asm, {e}") from e
    if own not in (None, _program_digest(program)):
        raise DataError(
            f"{folder}/program.asm does not match its checksum: compile again; your own assembly "
            "runs from a file by itself"
        )
    return Compiled(program, memory, places, machine, stride, frac)


def _check(places: Any, stride: Any, frac: Any, beats: int) -> None:
    """Refuses what no program has; `beats` of memory are there."""
    numbers = [stride, *frac.values(), *(n for place in places.values() for n in place)]
    if wrong := fault(numbers, [int], "token_stride, frac or places"):
        raise ValueError(wrong)
    for name, (address, n) in places.items():
        if not (0 <= address < beats and n > 0):
            raise ValueError(f"{name} is at {address}, the memory has {beats} beats")
    if stride < 0 or any(not -1000 <= n <= 1000 for n in frac.values()):
        raise ValueError(f"token_stride is {stride} and frac {frac}")
    if stride and not ({"embedding", "logits"} <= places.keys() and "logits" in frac):
        raise ValueError("a whole model has embedding and logits")
    if "embedding" in places and stride * places["embedding"][1] > beats:
        raise ValueError("the embedding reaches beyond the memory")


def _program_digest(program: Sequence[Instruction]) -> str:
    """SHA-256 of the instructions, whatever the comments and the white space between them."""
    return sha256(disassemble(program).encode())
