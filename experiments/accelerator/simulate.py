"""The instruction-level simulator: registers, memory, and the integers of `fixed.py`.

Memory is bytes. A beat is lanes / 4 bytes; a vector is 16-bit little-endian words, padded with
zeros to whole vector words; a ternary matrix is its rows one behind the other, each padded to
whole vector words of trits, 4 to a byte from the lowest bits up (0 and 2: 0, 1: +1, 3: -1).
"""

from collections.abc import Callable, Sequence

import numpy as np

from mmfree_jax.errors import DataError
from mmfree_jax.experiments.accelerator import fixed
from mmfree_jax.experiments.accelerator.isa import REGISTERS, Instruction
from mmfree_jax.experiments.accelerator.machine import Machine, beats_of, unit_of


def pack_vector(values: np.ndarray, machine: Machine) -> np.ndarray:
    """Words [..., n] as bytes [..., m] in the memory's format."""
    padding = machine.words(values.shape[-1]) * machine.lanes - values.shape[-1]
    padded = np.pad(values.astype("<i2"), [(0, 0)] * (values.ndim - 1) + [(0, padding)])
    return np.ascontiguousarray(padded).view(np.uint8)


def pack_trits(trits_NK: np.ndarray, machine: Machine) -> np.ndarray:
    """A ternary matrix as bytes in the memory's format."""
    rows, columns = trits_NK.shape
    padding = machine.words(columns) * machine.lanes - columns
    codes = np.pad(trits_NK, ((0, 0), (0, padding))).astype(np.uint8) & 3
    codes = codes.reshape(rows, -1, 4) << np.array([0, 2, 4, 6], np.uint8)
    return np.bitwise_or.reduce(codes, -1).reshape(-1)


def _unpack_trits(data: np.ndarray, rows: int, columns: int) -> np.ndarray:
    codes = (data.reshape(rows, -1, 1) >> np.array([0, 2, 4, 6], np.uint8)) & 3
    return np.array([0, 1, 0, -1], np.int8)[codes.reshape(rows, -1)[:, :columns]]


def run(
    program: Sequence[Instruction],
    memory: np.ndarray,
    machine: Machine,
    *,
    token_offset: int = 0,
    registers: np.ndarray | None = None,
    watch: Callable[[int, Instruction, np.ndarray], None] | None = None,
) -> np.ndarray:
    """Runs a program; the bytes of `memory` are changed in place.

    Args:
      program: instructions.
      memory: uint8 bytes.
      machine: its lanes, its registers' length, and the sizes of its tables.
      token_offset: added to indexed addresses (beats).
      registers: [8, words * lanes] int32 to start from and to change; None: zeros.
      watch: called with the index, the instruction and the registers after each instruction.

    Returns:
      The registers.

    Raises:
      DataError: an instruction reaches beyond a register or the memory; it is named.
    """
    size = machine.words(machine.vector_length) * machine.lanes
    if registers is None:
        registers = np.zeros((REGISTERS, size), np.int32)
    beat = machine.lanes // 4
    for index, i in enumerate(program):
        if max(i.n, i.k) > size:
            raise DataError(
                f"instruction {index} ({i.op}) has {max(i.n, i.k)} elements: the registers hold "
                f"{size}; compile with --vector-length {max(i.n, i.k)} or more"
            )
        start = stop = 0
        if unit_of(i) in ("load-store", "ternary"):
            start = (i.address + (token_offset if i.indexed else 0)) * beat
            stop = start + beats_of(i, machine) * beat
            if stop > len(memory):
                raise DataError(
                    f"instruction {index} ({i.op}) reaches byte {stop}: the memory has "
                    f"{len(memory)}"
                )
        padded = machine.words(i.n) * machine.lanes
        if i.op == "SV":
            words = registers[i.dst, :padded].astype("<i2")
            memory[start:stop] = words.view(np.uint8)
        else:
            if i.op == "LDV":
                result = memory[start:stop].view("<i2")[: i.n].astype(np.int32)
            elif i.op == "TMATMUL":
                assert i.a is not None
                trits_NK = _unpack_trits(memory[start:stop], i.n, i.k)
                x = registers[i.a, : i.k]
                result = fixed.tmatmul(x, trits_NK, shift=i.shift, bits=i.bits)
            else:
                result = element_wise(i, registers, machine)
            registers[i.dst, :padded] = 0
            registers[i.dst, : i.n] = result
        if watch is not None:
            watch(index, i, registers)
    return registers


def element_wise(i: Instruction, registers: np.ndarray, machine: Machine) -> np.ndarray:
    """The result of an instruction of the row-wise or the norm unit."""
    a = np.full(i.n, i.number, np.int32) if i.a is None else registers[i.a, : i.n]
    b = registers[0 if i.b is None else i.b, : i.n]
    match i.op:
        case "ADD":
            return fixed.add(a, b, shift=i.shift, bits=i.bits)
        case "SUB":
            return fixed.sub(a, b, shift=i.shift, bits=i.bits)
        case "MUL":
            return fixed.mul(a, b, shift=i.shift, bits=i.bits)
        case "DIV":
            return fixed.div(a, b, shift=i.shift, bits=i.bits)
        case "EXP":
            return fixed.exp(a, frac=i.shift)
        case "SIG":
            return fixed.sig(a, frac=i.shift, entries=machine.sigmoid_entries)
        case "NORM":
            return fixed.norm(
                a,
                eps=i.eps,
                root=i.root,
                shift=i.shift,
                bits=i.bits,
                newton=machine.newton_steps,
            )
    raise DataError(f"operation {i.op!r} is unknown")
