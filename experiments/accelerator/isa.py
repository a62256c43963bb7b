"""The ten instructions: their operands, text form, and 128-bit words.

An instruction a line; `;` starts a comment. Numbers are decimal or 0x hexadecimal. `n` counts
elements; addresses count beats of the memory bus, and `[token]` adds the offset that the host
gives with each token.

    LDV     v0, 0x40[token], n=64          ; v0 <- memory
    SV      v0, 0x80, n=64                 ; memory <- v0
    ADD     v2, v0, v1, n=64, shift=3      ; round(v0 / 2^3) + v1
    SUB     v2, #16384, v1, n=64           ; the first operand may be a number
    MUL     v2, v0, v1, n=64, shift=14, bits=8
    DIV     v2, v0, v1, n=64, shift=11     ; v0 2^11 / v1
    EXP     v2, v0, n=64, frac=11
    SIG     v2, v0, n=64, frac=11
    NORM    v2, v0, n=64, eps=1000, root=16384, shift=-1
    TMATMUL v2, v0, 0x100, n=48, k=64, shift=6   ; n outputs of k inputs

What each computes is in `fixed.py`; elements from n to the end of the last word are written as
zero. Results have `bits` (16 unless given) bits.
"""

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass

from mmfree_jax.errors import DataError
from mmfree_jax.readable import brief

REGISTERS = 8
OPS = ("ADD", "SUB", "MUL", "DIV", "EXP", "SIG", "NORM", "LDV", "SV", "TMATMUL")
ROW_WISE = ("ADD", "SUB", "MUL", "DIV", "EXP", "SIG")
BINARY = ("ADD", "SUB", "MUL", "DIV")


@dataclass(frozen=True)
class Instruction:
    """One instruction; fields that its operation does not have stay at their defaults.

    Attributes:
      op: one of `OPS`.
      dst: register written; for SV the register stored.
      a: first source register; None for LDV and SV, and where `number` stands for it.
      b: second source register.
      number: first operand of ADD, SUB, MUL, DIV as a number.
      n: elements of the result.
      k: TMATMUL: elements of the input.
      address: of LDV, SV and TMATMUL (beats).
      indexed: the token's offset is added to it.
      shift: as in `fixed.py`; for EXP and SIG the fraction bits of the input.
      bits: of the result.
      eps: of NORM.
      root: of NORM.
    """

    op: str
    dst: int
    a: int | None = None
    b: int | None = None
    number: int | None = None
    n: int = 1
    k: int = 0
    address: int = 0
    indexed: bool = False
    shift: int = 0
    bits: int = 16
    eps: int = 0
    root: int = 0

    def registers(self) -> set[int]:
        """Every register that it reads or writes."""
        return {r for r in (self.dst, self.a, self.b) if r is not None}


# Smallest and largest value of each option.
_LIMITS = {
    "n": (1, 65_535),
    "k": (1, 32_767),
    "address": (0, 2**32 - 1),
    "shift": (0, 30),
    "bits": (2, 16),
    "eps": (1, 2**31 - 1),
    "root": (1 << 14, (1 << 15) - 1),
    "number": (-32_768, 32_767),
}
_OPTIONS = {
    "LDV": {"n"},
    "SV": {"n"},
    "NORM": {"n", "eps", "root", "shift", "bits"},
    "TMATMUL": {"n", "k", "shift", "bits"},
    "EXP": {"n", "frac"},
    "SIG": {"n", "frac"},
    **{op: {"n", "shift", "bits"} for op in BINARY},
}
_REQUIRED = {"NORM": {"n", "eps", "root"}, "TMATMUL": {"n", "k"}, "EXP": {"n", "frac"}}
_REQUIRED |= {"SIG": {"n", "frac"}}


def check(i: Instruction) -> str | None:
    """What is wrong with an instruction, or None."""
    if i.op not in OPS:
        return f"operation {brief(i.op)} is unknown: the operations are {', '.join(OPS)}"
    for r in i.registers():
        if not 0 <= r < REGISTERS:
            return f"register v{r} does not exist: there are v0 to v{REGISTERS - 1}"
    limits = dict(_LIMITS)
    if i.op == "NORM":
        limits["shift"] = (-32, 31)
    elif i.op in ("EXP", "SIG", "DIV"):
        limits["shift"] = (0, 15)
    used = {"n", "shift", "bits"} | ({"eps", "root"} if i.op == "NORM" else set())
    used |= {"k", "address"} if i.op == "TMATMUL" else set()
    used |= {"address"} if i.op in ("LDV", "SV") else set()
    used |= {"number"} if i.number is not None else set()
    for name in sorted(used):
        value, (low, high) = getattr(i, name), limits[name]
        if not low <= value <= high:
            shown = "frac" if name == "shift" and i.op in ("EXP", "SIG") else name
            return f"{shown} is {value}: {i.op} takes {low} to {high}"
    if i.op in BINARY and (i.b is None or (i.a is None) == (i.number is None)):
        return f"{i.op} takes a result and two operands, the first a register or #number"
    if i.op in ("EXP", "SIG", "NORM", "TMATMUL") and i.a is None:
        return f"{i.op} takes a result and a source register"
    if i.indexed and i.op not in ("LDV", "SV"):
        return f"{i.op} takes no [token]: only LDV and SV do"
    if i.op == "TMATMUL" and i.dst == i.a:
        return "TMATMUL reads its source for every output: write to another register"
    return None


def assemble(text: str) -> list[Instruction]:
    """Instructions from text.

    Raises:
      DataError: with the number of the first malformed line, what it holds and the way out.
    """
    program = []
    for number, line in enumerate(text.splitlines(), 1):
        code = line.partition(";")[0].strip()
        if not code:
            continue
        try:
            instruction = _parse(code)
        except ValueError as e:
            raise DataError(f"line {number}: {brief(code)}: {e}") from None
        if problem := check(instruction):
            raise DataError(f"line {number}: {brief(code)}: {problem}")
        program.append(instruction)
    return program


def _parse(code: str) -> Instruction:
    op, _, rest = code.partition(" ")
    op = op.upper()
    if op not in OPS:
        raise ValueError(f"operation {brief(op)} is unknown: the operations are {', '.join(OPS)}")
    parts = [part.strip() for part in rest.split(",")] if rest.strip() else []
    operands = [part for part in parts if "=" not in part]
    options: dict[str, int] = {}
    for part in parts:
        if "=" not in part:
            continue
        if part is not parts[-1] and "=" not in parts[-1]:
            raise ValueError("operands come before options")
        name, _, value = (x.strip() for x in part.partition("="))
        if name not in _OPTIONS[op]:
            raise ValueError(f"{op} has no option {brief(name)}: it has {_listed(_OPTIONS[op])}")
        if name in options:
            raise ValueError(f"option {brief(name)} is given twice")
        options[name] = _number(value)
    if missing := _REQUIRED.get(op, {"n"}) - set(options):
        raise ValueError(f"{op} needs {_listed(missing)}")
    if "frac" in options:
        options["shift"] = options.pop("frac")
    shapes = {"LDV": "rm", "SV": "rm", "TMATMUL": "rrm", **dict.fromkeys(BINARY, "rxr")}
    shape = shapes.get(op, "rr")
    if len(operands) != len(shape):
        raise ValueError(f"{op} takes {len(shape)} operands, not {len(operands)}")
    fields: dict[str, object] = {"dst": _register(operands[0])}
    if op == "TMATMUL":
        fields["a"] = _register(operands[1])
    elif shape in ("rr", "rxr"):
        if operands[1].startswith("#") and shape == "rxr":
            fields["number"] = _number(operands[1][1:])
        else:
            fields["a"] = _register(operands[1])
        if shape == "rxr":
            fields["b"] = _register(operands[2])
    if shape.endswith("m"):
        address = operands[-1]
        fields["indexed"] = address.endswith("[token]")
        fields["address"] = _number(address.removesuffix("[token]").strip())
    return Instruction(op, **fields, **options)  # type: ignore[arg-type]


def _listed(names: Sequence[str] | set[str]) -> str:
    return ", ".join(sorted(names))


def _register(text: str) -> int:
    if not re.fullmatch(r"v\d+", text):
        raise ValueError(f"{brief(text)} is no register: write v0 to v{REGISTERS - 1}")
    return int(text[1:])


def _number(text: str) -> int:
    try:
        return int(text, 0)
    except ValueError:
        raise ValueError(
            f"{brief(text)} is no number: write it in decimal or 0x hexadecimal"
        ) from None


def disassemble(program: Sequence[Instruction]) -> str:
    """The text form; `assemble` gives the program back."""
    return "".join(f"{_line(i)}\n" for i in program)


def _line(i: Instruction) -> str:
    operands = [f"v{i.dst}"]
    if i.number is not None:
        operands.append(f"#{i.number}")
    operands += [f"v{r}" for r in (i.a, i.b) if r is not None]
    if i.op in ("LDV", "SV", "TMATMUL"):
        operands.append(f"{i.address:#x}" + ("[token]" if i.indexed else ""))
    options = {"n": i.n}
    if i.op == "TMATMUL":
        options["k"] = i.k
    if i.op == "NORM":
        options |= {"eps": i.eps, "root": i.root}
    if i.op in ("EXP", "SIG"):
        options["frac"] = i.shift
    elif i.shift:
        options["shift"] = i.shift
    if i.bits != 16:
        options["bits"] = i.bits
    return f"{i.op:<7} " + ", ".join([*operands, *(f"{k}={v}" for k, v in options.items())])


# (field, first bit, width) of the 128-bit word; signed fields are in two's complement.
# `extra` is eps, or the address: no instruction has both.
FIELDS = {
    "op": (0, 4),
    "dst": (4, 3),
    "a": (7, 3),
    "b": (10, 3),
    "has_number": (13, 1),
    "indexed": (14, 1),
    "n": (16, 16),
    "k": (32, 16),
    "shift": (48, 6),
    "bits": (54, 5),
    "root": (64, 16),
    "number": (80, 16),
    "extra": (96, 32),
}


def encode(i: Instruction) -> int:
    """The instruction as a 128-bit number."""
    values = {
        "op": OPS.index(i.op),
        "dst": i.dst,
        # Operands that an instruction lacks name its result, so that a unit holds no more.
        "a": i.dst if i.a is None else i.a,
        "b": i.dst if i.b is None else i.b,
        "has_number": int(i.number is not None),
        "indexed": int(i.indexed),
        "n": i.n,
        "k": i.k,
        "shift": i.shift,
        "bits": i.bits,
        "root": i.root,
        "number": i.number or 0,
        "extra": i.eps if i.op == "NORM" else i.address,
    }
    word = 0
    for name, (first, width) in FIELDS.items():
        word |= (values[name] & ((1 << width) - 1)) << first
    return word


def decode(word: int) -> Instruction:
    """The instruction that `encode` made a number of.

    Raises:
      DataError: no instruction has this number, or one that cannot run.
    """
    value = {name: (word >> first) & ((1 << w) - 1) for name, (first, w) in FIELDS.items()}
    if value["op"] >= len(OPS):
        raise DataError(f"instruction word {word:#034x} has operation {value['op']}: none such")
    op = OPS[value["op"]]
    signed = lambda x, width: x - (1 << width) if x >> (width - 1) else x  # noqa: E731
    i = Instruction(op, value["dst"], n=value["n"], bits=value["bits"])
    shift = signed(value["shift"], 6) if op == "NORM" else value["shift"]
    changes: dict[str, object] = {"shift": shift}
    if op in BINARY:
        changes["b"] = value["b"]
        if value["has_number"]:
            changes["number"] = signed(value["number"], 16)
    if op not in ("LDV", "SV") and "number" not in changes:
        changes["a"] = value["a"]
    if op == "NORM":
        changes |= {"eps": value["extra"], "root": value["root"]}
    if op in ("LDV", "SV", "TMATMUL"):
        changes |= {"address": value["extra"], "indexed": bool(value["indexed"])}
    if op == "TMATMUL":
        changes["k"] = value["k"]
    i = dataclasses.replace(i, **changes)  # type: ignore[arg-type]
    if problem := check(i):
        raise DataError(f"instruction word {word:#034x}: {problem}")
    return i
