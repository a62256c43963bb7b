"""A compiled program on disk: `program.asm`, `memory.bin`, `program.json`."""

import dataclasses
import json
import os
from pathlib import Path

import numpy as np

from mmfree_jax.errors import ConfigError, DataError
from mmfree_jax.experiments.accelerator.compile import Compiled
from mmfree_jax.experiments.accelerator.isa import assemble, disassemble
from mmfree_jax.experiments.accelerator.machine import Machine

_VERSION = 1


def save(compiled: Compiled, folder: Path) -> None:
    """Writes a program; each file is whole or not there.

    Raises:
      ConfigError: the folder cannot be written to.
    """
    assert compiled.memory is not None
    meta = {
        "version": _VERSION,
        "machine": dataclasses.asdict(compiled.machine),
        "token_stride": compiled.token_stride,
        "frac": compiled.frac,
        "places": compiled.places,
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _write(folder / "program.asm", disassemble(compiled.program).encode())
        _write(folder / "memory.bin", compiled.memory.tobytes())
        _write(folder / "program.json", (json.dumps(meta, indent=1) + "\n").encode())
    except OSError as e:
        raise ConfigError(f"--out {folder} cannot be written to: {e.strerror}") from e


def _write(path: Path, data: bytes) -> None:
    beside = path.with_name(path.name + ".tmp")
    with beside.open("wb") as f:
        f.write(data)
        f.flush()
        os.fsync(f.fileno())
    beside.replace(path)


def load(folder: Path) -> Compiled:
    """Reads a program.

    Raises:
      DataError: a file is missing, malformed or too new.
    """
    try:
        meta = json.loads((folder / "program.json").read_text(encoding="utf-8"))
        if meta["version"] > _VERSION:
            raise DataError(f"{folder}/program.json is of version {meta['version']}: update mmfree")
        text = (folder / "program.asm").read_text(encoding="utf-8")
        memory = np.fromfile(folder / "memory.bin", np.uint8)
        places = {name: (int(a), int(n)) for name, (a, n) in meta["places"].items()}
        machine = Machine(**meta["machine"])
        stride, frac = int(meta["token_stride"]), meta["frac"]
    except OSError as e:
        raise DataError(
            f"{e.filename} cannot be read ({e.strerror}): give a folder that `mmfree hardware "
            "compile` wrote"
        ) from e
    except (KeyError, TypeError, ValueError) as e:
        raise DataError(f"{folder}/program.json is malformed ({e}): compile again") from e
    try:
        program = assemble(text)
    except DataError as e:
        raise DataError(f"{folder}/program.asm, {e}") from e
    return Compiled(program, memory, places, machine, stride, frac)
