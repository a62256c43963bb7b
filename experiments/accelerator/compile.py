"""From a quantised model to a program and the bytes of its memory.

Registers of a block: v0 holds the residual stream throughout; v1 to v6 are scratch, and v7 is
left for users' own instructions. Weights are loaded where they are used; the recurrent states
stay in memory between tokens.
"""

import dataclasses
import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np

from mmfree_jax.errors import ConfigError
from mmfree_jax.experiments.accelerator import fixed
from mmfree_jax.experiments.accelerator.isa import Instruction
from mmfree_jax.experiments.accelerator.machine import BEATS_PER_WORD, Machine
from mmfree_jax.experiments.accelerator.quantized import Quantized
from mmfree_jax.experiments.accelerator.simulate import pack_trits, pack_vector
from mmfree_jax.model_config import ModelConfig

Tree = dict[str, Any]


@dataclass(frozen=True)
class Compiled:
    """A program and its memory.

    Attributes:
      program: instructions.
      memory: bytes before the first token; None for a program of shapes only.
      places: beat address and number of elements of each named vector, or of a matrix's rows.
      machine: that it was compiled for.
      token_stride: beats from one token's embedding to the next.
      frac: fraction bits of "x" and "y" (a block) or of "logits" (a model).
    """

    program: list[Instruction]
    memory: np.ndarray | None
    places: dict[str, tuple[int, int]]
    machine: Machine
    token_stride: int
    frac: dict[str, int]


class _Builder:
    """Collects instructions, addresses and bytes; one for each program."""

    def __init__(self, config: ModelConfig, machine: Machine, quantized: Quantized | None) -> None:
        self.config, self.machine, self.quantized = config, machine, quantized
        self.program: list[Instruction] = []
        self.places: dict[str, tuple[int, int]] = {}
        self.chunks: list[np.ndarray] = []
        self.at = 0
        self.bits = 16 if quantized is None else quantized.numerics.activation_bits
        self.fused = quantized is None or quantized.numerics.fused_norm

    def parts(self, layer: int | None) -> Tree:
        """The integers of one layer, or of the final norm and head; empty for shapes only."""
        if self.quantized is None:
            return {}
        if layer is None:
            return self.quantized.arrays["final"]
        return {k: v[layer] for k, v in self.quantized.arrays["layers"].items()}

    def place(self, name: str, n: int, beats: int, data: np.ndarray | None) -> int:
        address = self.at
        self.places[name] = (address, n)
        if self.quantized is not None:
            size = beats * self.machine.lanes // 4
            self.chunks.append(np.zeros(size, np.uint8) if data is None else data)
        self.at += beats
        return address

    def vector(self, name: str, n: int, values: Any = None) -> int:
        beats = BEATS_PER_WORD * self.machine.words(n)
        packed = None if values is None else pack_vector(np.asarray(values), self.machine)
        return self.place(name, n, beats, packed)

    def emit(
        self, op: str, dst: int, a: int | None = None, b: int | None = None, **rest: Any
    ) -> None:
        self.program.append(Instruction(op, dst, a, b, **rest))

    def scale(
        self, dst: int, src: int, scratch: int, name: str, n: int, p: Tree, site: str, bits: int
    ) -> None:
        """dst <- src times a vector of norm scales, which `scratch` receives."""
        layer, _, weight = name.rpartition("/")
        address = self.vector(f"{layer}/weight/{weight}", n, p.get(f"weight/{weight}"))
        self.emit("LDV", scratch, n=n, address=address)
        shift = int(p.get(f"shift/{site}", 0))
        self.emit("MUL", dst, src, scratch, n=n, shift=shift, bits=bits)

    def norm(self, dst: int, src: int, n: int, p: Tree, site: str) -> None:
        root, shift = fixed.norm_constants(n, 0)
        eps, shift = int(p.get(f"eps/{site}", 1)), int(p.get(f"shift/{site}", shift))
        self.emit("NORM", dst, src, n=n, eps=eps, root=root, shift=shift)

    def normed(
        self, scratch: int, n: int, p: Tree, layer: str, site: str, v: str, double: bool
    ) -> None:
        """v1 <- v0 behind the outer norm, and the BitLinear's where it is kept."""
        dst = 1
        self.norm(dst, 0, n, p, site)
        if double:
            self.scale(dst, dst, scratch, f"{layer}/{v}", n, p, v, 16)
            self.norm(dst, dst, n, p, f"u{v}")

    def product(
        self, dst: int, src: int, name: str, n: int, k: int, p: Tree, site: str, bits: int
    ) -> None:
        """dst <- a ternary matrix times src; cut where it has more rows than a register."""
        layer, _, matrix = name.rpartition("/")
        trits = p.get(f"trits/{matrix}")
        packed = None if trits is None else pack_trits(trits, self.machine)
        address = self.place(f"{layer}/trits/{matrix}", n, n * self.machine.words(k), packed)
        shift = int(p.get(f"shift/{site}", 0))
        self.emit("TMATMUL", dst, src, n=n, k=k, address=address, shift=shift, bits=bits)

    def done(self, token_stride: int, frac: dict[str, int]) -> Compiled:
        memory = None if self.quantized is None else np.concatenate(self.chunks)
        return Compiled(self.program, memory, self.places, self.machine, token_stride, frac)


def _block(b: _Builder, layer: int) -> None:
    c, p, name = b.config, b.parts(layer), str(layer)
    d, m, bits = c.hidden_size, c.glu_size, b.bits
    shift = lambda key: int(p.get(f"shift/{key}", 0))  # noqa: E731
    gate = fixed.GATE_FRAC
    # Projections i, f, g into v4, v5, v6.
    b.normed(2, d, p, name, "u", "v", not b.fused)
    for dst, matrix in ((4, "i"), (5, "f"), (6, "g")):
        b.scale(3, 1, 2, f"{name}/{matrix}", d, p, f"x{matrix}", bits)
        b.product(dst, 3, f"{name}/{matrix}", d, d, p, matrix, bits)
    # The forget gate, and what enters the state.
    b.emit("SIG", 5, 5, n=d, shift=int(p.get("frac/f", 11)))
    for op, bound in (("MUL", "rest"), ("ADD", "lower")):
        if c.use_lower_bound and layer > 0:
            address = b.vector(f"{name}/bound/{bound}", d, p.get(f"bound/{bound}"))
            b.emit("LDV", 2, n=d, address=address)
            b.emit(op, 5, 5, 2, n=d, shift=gate if op == "MUL" else 0)
    b.emit("SIG", 1, 4, n=d, shift=int(p.get("frac/i", 11)))
    b.emit("MUL", 4, 4, 1, n=d, shift=shift("c"))
    b.emit("SUB", 1, None, 5, number=fixed.ONE, n=d)
    b.emit("MUL", 4, 4, 1, n=d, shift=gate)
    # h <- f h + (1 - f) silu(i)
    state = b.vector(f"{name}/h", d)
    b.emit("LDV", 2, n=d, address=state)
    b.emit("MUL", 2, 2, 5, n=d, shift=gate)
    b.emit("ADD", 2, 2, 4, n=d)
    b.emit("SV", 2, n=d, address=state)
    # Output: RMSNorm(g) silu(h), normed and scaled, through o.
    b.emit("SIG", 1, 2, n=d, shift=int(p.get("frac/h", 11)))
    b.emit("MUL", 2, 2, 1, n=d, shift=shift("sh"), bits=bits)
    b.norm(6, 6, d, p, "gn")
    b.scale(6, 6, 1, f"{name}/gate_norm", d, p, "gs", 16)
    b.emit("MUL", 6, 6, 2, n=d, shift=shift("o"), bits=bits)
    b.norm(6, 6, d, p, "on")
    b.scale(6, 6, 1, f"{name}/o", d, p, "os", bits)
    b.product(1, 6, f"{name}/o", d, d, p, "x1", 16)
    b.emit("ADD", 0, 0, 1, n=d, shift=shift("add1"))
    # GLU
    b.normed(2, d, p, name, "u2", "v2", not b.fused)
    b.scale(1, 1, 2, f"{name}/gate", d, p, "xu", bits)
    b.product(3, 1, f"{name}/gate", m, d, p, "gate", bits)
    b.product(4, 1, f"{name}/up", m, d, p, "up", bits)
    b.emit("SIG", 5, 3, n=m, shift=int(p.get("frac/gate", 11)))
    b.emit("MUL", 3, 3, 5, n=m, shift=shift("s"), bits=bits)
    b.emit("MUL", 3, 3, 4, n=m, shift=shift("p"), bits=bits)
    b.norm(3, 3, m, p, "pn")
    b.scale(3, 3, 4, f"{name}/down", m, p, "ps", bits)
    b.product(4, 3, f"{name}/down", d, m, p, "x2", 16)
    b.emit("ADD", 0, 0, 4, n=d, shift=shift("add2"))


def _head(b: _Builder) -> None:
    c, p = b.config, b.parts(None)
    d, tile = c.hidden_size, b.machine.words(b.machine.vector_length) * b.machine.lanes
    b.normed(2, d, p, "final", "u", "v", True)
    b.scale(1, 1, 2, "final/head", d, p, "xh", b.bits)
    trits = p.get("trits/head")
    packed = None if trits is None else pack_trits(trits, b.machine)
    row = b.machine.words(d)
    head = b.place("final/trits/head", c.vocab_size, c.vocab_size * row, packed)
    out = b.vector("logits", c.vocab_size)
    shift = int(p.get("shift/logits", 0))
    # Alternate between two registers; the memory port is shared all the same.
    for first, dst in zip(range(0, c.vocab_size, tile), itertools.cycle((2, 3)), strict=False):
        n = min(tile, c.vocab_size - first)
        b.emit("TMATMUL", dst, 1, n=n, k=d, address=head + first * row, shift=shift)
        b.emit("SV", dst, n=n, address=out + BEATS_PER_WORD * (first // b.machine.lanes))


def _check(config: ModelConfig, machine: Machine, quantized: Quantized | None) -> None:
    widest = max(config.hidden_size, config.glu_size)
    if widest > machine.vector_length:
        raise ConfigError(
            f"vector_length is {machine.vector_length}: the model needs {widest} elements"
        )
    if quantized is None:
        return
    n = quantized.numerics
    own = (machine.sigmoid_entries, machine.newton_steps)
    if not n.is_integer or (n.sigmoid_entries, n.newton_steps) != own:
        raise ConfigError(
            f"the numerics have sigmoid {n.sigmoid_entries} and rsqrt {n.newton_steps}: the "
            f"machine has a table of {own[0]} and {own[1]} Newton steps"
        )


def compile_model(quantized: Quantized, machine: Machine) -> Compiled:
    """The program of one token: embedding, every block, final norm and head.

    Run it with token_offset = token * token_stride; then "logits" holds the integers of
    `integer_model.logits`.

    Raises:
      ConfigError: the model's vectors or numerics do not fit the machine.
    """
    return _model(quantized.config, machine, quantized)


def compile_block(quantized: Quantized, layer: int, machine: Machine) -> Compiled:
    """The program of one block, from the vector "x" to the vector "y"; its state is "LAYER/h"."""
    p = quantized.arrays["layers"]
    frac = {"x": int(p["frac/x0"][layer]), "y": int(p["frac/x2"][layer])}
    return _one_block(_Builder(quantized.config, machine, quantized), layer, frac)


def shape_program(config: ModelConfig, machine: Machine, *, block_only: bool = False) -> Compiled:
    """A program of the right shapes without weights, for timing a model that is not there."""
    if not block_only:
        return _model(config, machine, None)
    return _one_block(_Builder(config, machine, None), min(1, config.num_layers - 1), {})


def _one_block(b: _Builder, layer: int, frac: dict[str, int]) -> Compiled:
    _check(b.config, b.machine, b.quantized)
    d = b.config.hidden_size
    b.emit("LDV", 0, n=d, address=b.vector("x", d))
    _block(b, layer)
    b.emit("SV", 0, n=d, address=b.vector("y", d))
    return b.done(0, frac)


def _model(config: ModelConfig, machine: Machine, quantized: Quantized | None) -> Compiled:
    _check(config, machine, quantized)
    b = _Builder(config, machine, quantized)
    d, v = config.hidden_size, config.vocab_size
    stride = BEATS_PER_WORD * machine.words(d)
    table = None
    if quantized is not None:
        table = pack_vector(quantized.arrays["embedding"], machine).reshape(-1)
    address = b.place("embedding", v, v * stride, table)
    b.emit("LDV", 0, n=d, address=address, indexed=True)
    for layer in range(config.num_layers):
        _block(b, layer)
    _head(b)
    frac = {} if quantized is None else {"logits": int(b.parts(None)["frac/logits"])}
    return b.done(stride, frac)


def read_vector(compiled: Compiled, name: str, memory: np.ndarray) -> np.ndarray:
    """The words of a named vector in a memory."""
    address, n = compiled.places[name]
    start = address * compiled.machine.lanes // 4
    return memory[start : start + 2 * n].view("<i2").astype(np.int32)


def write_vector(compiled: Compiled, name: str, values: np.ndarray, memory: np.ndarray) -> None:
    """Puts words into a named vector of a memory."""
    address, n = compiled.places[name]
    start = address * compiled.machine.lanes // 4
    memory[start : start + 2 * n] = np.asarray(values[:n]).astype("<i2").view(np.uint8)


def fitting(machine: Machine, config: ModelConfig) -> Machine:
    """The machine with registers as long as the model's widest vector."""
    widest = max(config.hidden_size, config.glu_size)
    return dataclasses.replace(machine, vector_length=widest)
