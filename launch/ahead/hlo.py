"""What a compiled program moves between devices: its collectives, loops counted in full.

XLA's own cost analysis counts the body of a loop once; here each computation is weighted by
how often it runs.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Sequence

import numpy as np

_KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
_BYTES = {
    "pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2,
    "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8,
}  # fmt: skip
_WORK = ("fusion", "custom-call", "dot", "convolution", "call", "while")
_MOVES = {"copy", "transpose", "slice", "dynamic-slice", "concatenate"}
_NAMES = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "reshape"}  # no work
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.-]+) = (.*)$")
_OPERATION = re.compile(r"(?:^|\s)([a-z][\w-]*)\(")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of the program, over all its turns."""

    kind: str
    times: int
    """How often it runs in one step."""
    near: float
    """Bytes that each device sends in one step to others of its slice or host."""
    far: float
    """Bytes that it sends beyond."""
    group: int
    """Devices that take part together."""


@dataclasses.dataclass
class _Instruction:
    name: str
    type: str
    operation: str
    text: str


def parse_collectives(hlo: str, places: Sequence[int]) -> list[Collective]:
    """The collectives of an optimised HLO module.

    A program for several TPU slices is that of one: its collectives stay within, and what crosses
    the network between slices are sends to the runtime, which say what collective they are part of.

    Args:
      hlo: `compiled.as_text()`.
      places: slice or host of each device, in the order of the mesh.
    """
    computations, entry = _computations(hlo)
    partitions = re.search(r"\bnum_partitions=(\d+)", hlo)
    devices = int(partitions[1]) if partitions else len(places)
    where = np.array(places) if devices == len(places) else np.zeros(devices, int)
    found = []
    for name, weight in _weights(computations, entry).items():
        types = {i.name: i.type for i in computations[name]}
        for instruction in computations[name]:
            kind = instruction.operation.removesuffix("-start")
            size = sum(_size(types.get(operand, "")) for operand in _operands(instruction))
            if kind == "send" and (between := _between_slices(instruction.text)) is not None:
                kind, count = between
                _, far = _traffic(kind, size, np.arange(count)[None])
                found.append(Collective(kind, weight, 0.0, weight * far, count))
                continue
            if kind not in _KINDS:
                continue
            groups = _groups(instruction.text, devices)
            count = groups.shape[1]
            if count > 1:
                near, far = _traffic(kind, size, where[groups])
                found.append(Collective(kind, weight, weight * near, weight * far, count))
    return found


def share_alongside(hlo: str) -> float | None:
    """Share of the exchanged bytes behind which the compiler has scheduled other work.

    That is: kernels stand between a collective's start and its end. Synchronous collectives
    have none. None where nothing is exchanged.
    """
    computations, entry = _computations(hlo)
    total = alongside = 0.0
    for name, weight in _weights(computations, entry).items():
        types = {i.name: i.type for i in computations[name]}
        begun: dict[str, tuple[float, bool]] = {}
        for i in computations[name]:
            kind = i.operation.removesuffix("-start").removesuffix("-done")
            if i.operation.endswith("-done") and kind in _KINDS:
                for size, behind in (begun.pop(o) for o in _operands(i) if o in begun):
                    alongside += weight * size * behind
            elif kind in _KINDS:
                size = sum(_size(types.get(o, "")) for o in _operands(i))
                total += weight * size
                if i.operation.endswith("-start"):
                    begun[i.name] = (size, False)
            elif i.operation in _WORK:
                begun = {name: (size, True) for name, (size, _) in begun.items()}
    return alongside / total if total else None


def moved_within(hlo: str) -> float:
    """Bytes that a device reads and writes in a step only to lay arrays out otherwise.

    By kernels that copy, transpose, cut or join and do nothing else: what an exchange wants of
    its buffers beyond the exchange. Small ones count as all others do.
    """
    computations, entry = _computations(hlo)
    every = [i for instructions in computations.values() for i in instructions]
    fused = {body for i in every for body in _fused(i)}
    total = 0.0
    for name, weight in _weights(computations, entry).items():
        for i in computations[name] if name not in fused else ():
            parts = [part for body in _fused(i) for part in computations[body]] or [i]
            kinds = {part.operation for part in parts}
            if kinds & _MOVES and kinds <= _MOVES | _NAMES:
                total += weight * 2 * _size(i.type)
    return total


def _fused(instruction: _Instruction) -> list[str]:
    """The computation that a fusion does; none of another operation."""
    if instruction.operation != "fusion":
        return []
    return re.findall(r"\bcalls=%?([\w.-]+)", instruction.text)


def _between_slices(text: str) -> tuple[str, int] | None:
    """The collective that a send of a TPU to its runtime is part of, and how many slices take part.

    They stand as {1,2}x{0:3}, slices by their devices, or one by one as {{100000,200000}, ...}.
    None: it goes elsewhere.
    """
    kind = re.search(r'_xla_megascale_transfer_type="(\w+)"', text)
    if kind is None:
        return None
    slices = re.search(r"_xla_megascale_target=\"?\{+([\d,:]+)\}", text)
    ends = [part.split(":") for part in slices[1].split(",")] if slices else []
    count = sum(int(end[-1]) - int(end[0]) + 1 for end in ends)
    name = kind[1].lower().replace("_", "-")
    return name if name in _KINDS else "collective-permute", max(count, 2)


def _traffic(kind: str, size: float, places: np.ndarray) -> tuple[float, float]:
    """Bytes that a device sends near and far, in the two stages that libraries use.

    Args:
      kind: of collective.
      size: bytes of the device's operand.
      places: slice or host of each device, [groups, devices of each].
    """
    n = places.shape[1]
    if kind == "collective-permute":
        return (0.0, size) if np.any(places[:, 0] != places[:, 1]) else (size, 0.0)
    g = max(len(set(row)) for row in places.tolist())  # slices or hosts of a group
    m = n // g  # members within one
    if kind == "all-reduce":
        return 2 * (m - 1) / m * size, 2 * (g - 1) / g * size / m
    if kind == "all-gather":
        return (m - 1) * g * size, (g - 1) * size
    if kind == "reduce-scatter":
        return (m - 1) / m * size, (g - 1) / g * size / m
    return (m - 1) / n * size, (n - m) / n * size


def _computations(hlo: str) -> tuple[dict[str, list[_Instruction]], str]:
    computations: dict[str, list[_Instruction]] = {}
    entry, current = "", None
    for line in hlo.splitlines():
        header = re.match(r"^(ENTRY )?%?([\w.-]+) (?:\(.*\)|\{).*\{\s*$", line)
        if header and " = " not in line.partition("(")[0]:
            current = computations.setdefault(header[2], [])
            entry = header[2] if header[1] else entry
        elif line.startswith("}"):
            current = None
        elif current is not None and (match := _INSTRUCTION.match(line)):
            name, rest = match[1], match[2]
            # The type may itself be a tuple in parentheses: the operation follows it.
            operation = _OPERATION.search(rest, _type_end(rest))
            if operation:
                kind = rest[: operation.start()]
                current.append(_Instruction(name, kind, operation[1], rest[operation.start(1) :]))
    return computations, entry


def _type_end(text: str) -> int:
    """Where the type at the beginning of an instruction ends."""
    if not text.startswith("("):
        return 0
    depth = 0
    for i, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            return i + 1
    return 0


def _operands(instruction: _Instruction) -> list[str]:
    start = instruction.text.index("(")
    inside = instruction.text[start + 1 : start + _type_end(instruction.text[start:]) - 1]
    return re.findall(r"%([\w.-]+)", inside) or [
        word.split()[-1] for word in inside.split(",") if word.strip()
    ]


def _size(text: str) -> float:
    """Bytes of the arrays in a type."""
    total = 0.0
    for name, shape in re.findall(r"\b([a-z]\w*?)\[([\d,]*)\]", text):
        width = _BYTES.get(name, 1 if name.startswith("f8") else 0)
        total += width * math.prod(int(n) for n in shape.split(",") if n)
    return total


def _weights(computations: dict[str, list[_Instruction]], entry: str) -> dict[str, int]:
    """How often each computation runs in one step."""
    weights: collections.Counter[str] = collections.Counter()
    called = re.compile(
        r"\b(?:body|condition|calls|to_apply|true_computation|false_computation)=%?([\w.-]+)"
    )

    def visit(name: str, weight: int) -> None:
        weights[name] += weight
        for instruction in computations.get(name, ()):
            if instruction.operation in ("async-done", "async-update"):
                continue  # names what its start has called
            turns = 1
            if instruction.operation == "while":
                turns = _turns(instruction, computations)
            targets = called.findall(instruction.text)
            if branches := re.search(r"branch_computations=\{([^}]*)\}", instruction.text):
                targets += re.findall(r"%([\w.-]+)", branches[1])
            for target in targets:
                if target in computations:
                    visit(target, weight * turns)

    visit(entry, 1)
    return dict(weights)


def _turns(loop: _Instruction, computations: dict[str, list[_Instruction]]) -> int:
    """How often a loop turns: as XLA notes it, else the bound that its condition compares with."""
    if noted := re.search(r'known_trip_count"?:\{"?n"?:"?(\d+)', loop.text):
        return int(noted[1])
    condition = re.search(r"\bcondition=%?([\w.-]+)", loop.text)
    inside = computations.get(condition[1], []) if condition else []
    constants = {
        i.name: int(number[1])
        for i in inside
        if (number := re.match(r"constant\((\d+)\)", i.text)) is not None
    }
    for instruction in inside:
        if instruction.operation == "compare" and "direction=LT" in instruction.text:
            bounds = [constants[name] for name in _operands(instruction) if name in constants]
            if bounds:
                return bounds[0]
    return 1


def _groups(text: str, devices: int) -> np.ndarray:
    """The groups of devices that an instruction names, [groups, devices of each]."""
    if pairs := re.search(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}", text):
        return np.array(
            [list(map(int, p.split(","))) for p in re.findall(r"\{([^}]*)\}", pairs[1])]
        )
    if match := re.search(r"replica_groups=\{((?:\{[\d,]*\},?)+)\}", text):
        rows = [list(map(int, r.split(","))) for r in re.findall(r"\{([\d,]+)\}", match[1])]
        return np.array(rows)
    if match := re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
        order = np.arange(devices).reshape(_numbers(match[3]))
        if match[4]:
            order = order.transpose(_numbers(match[4]))
        return order.reshape(int(match[1]), int(match[2]))
    if match := re.search(r"replica_groups=mesh\[([^\]]*)\]([^{]*)\{([^}]*)\}", text):
        return _device_order(match[2], devices)[_mesh_groups(match[1], match[3])]
    return np.arange(devices).reshape(1, devices)


def _device_order(text: str, devices: int) -> np.ndarray:
    """The devices in a mesh's order: device_ids=([4,8]T(1,0)) or a list; none: as they are."""
    if match := re.search(r"device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\)", text):
        order = np.arange(devices).reshape(_numbers(match[1]))
        return (order.transpose(_numbers(match[2])) if match[2] else order).reshape(-1)
    if match := re.search(r"device_ids=\(?\[?([\d,]+)", text):
        return np.array(_numbers(match[1]))
    return np.arange(devices)


def _mesh_groups(axes: str, named: str) -> np.ndarray:
    """Groups along some axes of a mesh: 'a'=2,'b'=4 and 'b', or part of it as 'b':(2)2."""
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", axes)}
    wanted = re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", named)
    shape, along = [], []
    for name, size in sizes.items():
        parts = next(((int(b), int(n)) for a, b, n in wanted if a == name and n), None)
        if parts is not None:  # before : (of it) : after
            before, of_it = parts
            along.append(len(shape) + 1)
            shape += [before, of_it, size // (before * of_it)]
        else:
            if any(a == name for a, _, _ in wanted):
                along.append(len(shape))
            shape.append(size)
    order = np.arange(math.prod(shape)).reshape(shape)
    rest = [axis for axis in range(len(shape)) if axis not in along]
    count = math.prod(shape[axis] for axis in along)
    return order.transpose([*rest, *along]).reshape(-1, count)


def _numbers(text: str) -> Sequence[int]:
    return [int(n) for n in text.split(",")]
