"""The RTL against the instruction-level simulator: bit for bit and cycle for cycle."""

import dataclasses
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("amaranth", reason="the RTL needs the extra `hardware`")

from mmfree_jax.cli.main import main
from mmfree_jax.experiments.accelerator import integer_model
from mmfree_jax.experiments.accelerator.compile import (
    compile_block,
    fitting,
    read_vector,
    write_vector,
)
from mmfree_jax.experiments.accelerator.isa import OPS, Instruction, assemble
from mmfree_jax.experiments.accelerator.machine import Machine, timeline
from mmfree_jax.experiments.accelerator.program_dir import load
from mmfree_jax.experiments.accelerator.rtl.simulation import simulate
from mmfree_jax.experiments.accelerator.rtl.verilog import cell_counts, run_icarus
from mmfree_jax.experiments.accelerator.simulate import run
from mmfree_jax.experiments.cli import accelerator as cli
from mmfree_jax.saved.pack import pack

from .conftest import CONFIG, random_params

needs_icarus = pytest.mark.skipif(
    shutil.which("iverilog") is None or shutil.which("yosys") is None,
    reason="needs iverilog and yosys on the path (apt install iverilog yosys)",
)
needs_yosys = pytest.mark.skipif(
    shutil.which("yosys") is None,
    reason="needs yosys on the path: YoWASP's takes 80 s of CPU at its first start",
)


def random_program(rng: np.random.Generator, machine: Machine, length: int) -> list[Instruction]:
    """Instructions of every kind on random registers, whose results are stored at the end."""
    size, place = machine.vector_length, 400
    program = [Instruction("LDV", r, n=size, address=8 * r) for r in range(8)]
    for k in range(length):
        if program[-1].op not in ("LDV", "SV"):  # every result is seen
            program.append(Instruction("SV", program[-1].dst, n=size, address=place))
            place += 8 * machine.words(size)
        op = OPS[k % len(OPS)]
        dst, a, b = (int(r) for r in rng.integers(0, 8, 3))
        n, bits = int(rng.integers(1, size + 1)), int(rng.choice([16, 16, 8, 5]))
        shift = int(rng.integers(0, 16))
        common = {"n": n, "bits": bits}
        if op in ("LDV", "SV"):
            address, indexed = int(rng.integers(0, 100)), bool(rng.integers(2))
            program.append(Instruction(op, dst, n=n, address=address, indexed=indexed))
        elif op == "TMATMUL":
            k_in, address = int(rng.integers(1, size + 1)), int(rng.integers(0, 100))
            a = (dst + 1 + a % 7) % 8
            program.append(
                Instruction(op, dst, a, k=k_in, address=address, shift=shift % 6, **common)
            )
        elif op == "NORM":
            eps, root = int(2 ** rng.uniform(0, 30)), int(rng.integers(1 << 14, 1 << 15))
            static = int(rng.integers(-20, 10))
            program.append(Instruction(op, dst, a, eps=eps, root=root, shift=static, **common))
        elif op in ("EXP", "SIG"):
            program.append(Instruction(op, dst, a, n=n, shift=shift))
        else:
            number = int(rng.integers(-32_768, 32_768)) if rng.integers(3) == 0 else None
            first = None if number is not None else a
            program.append(Instruction(op, dst, first, b, number, shift=shift, **common))
    stores = [Instruction("SV", r, n=size, address=8 * r) for r in range(8)]
    return program + stores


def _memory(rng: np.random.Generator, machine: Machine) -> np.ndarray:
    beats = 400 + 128 * 8 * machine.words(machine.vector_length)
    image = rng.integers(0, 256, beats * machine.lanes // 4, dtype=np.uint8)
    # Small and large words, so that not everything saturates.
    words = image[: len(image) // 2 * 2].view("<i2")
    words >>= rng.integers(0, 16, len(words)).astype(np.int16)
    return image


MACHINES = [
    Machine(lanes=4, vector_length=19, memory_latency=1),
    Machine(lanes=8, vector_length=8, memory_latency=7),
    Machine(
        lanes=4,
        vector_length=30,
        memory_latency=3,
        cycles_per_beat=2,
        sigmoid_entries=32,
        newton_steps=2,
    ),
]


@pytest.mark.parametrize("seed", range(len(MACHINES)))
def test_random_programs_in_amaranth(seed):
    rng, machine = np.random.default_rng(seed), MACHINES[seed]
    program = random_program(rng, machine, 20)
    expected = _memory(rng, machine)
    got = expected.copy()
    for offset in (0, 13):
        run(program, expected, machine, token_offset=offset)
    traces = simulate(program, got, machine, token_offsets=(0, 13))
    np.testing.assert_array_equal(got, expected)
    line = timeline(program, machine)
    assert [trace.cycles for trace in traces] == [line.cycles] * 2
    assert traces[0].issued == traces[1].issued == line.issued


def _jax_block(q, layer, x_TD):
    p = jax.tree.map(lambda a: jnp.asarray(a[layer]), q.arrays["layers"])
    h_BD = jnp.zeros((1, x_TD.shape[1]), jnp.int32)
    y_BTD, _ = jax.jit(integer_model.block, static_argnums=3)(
        jnp.asarray(x_TD)[None], h_BD, p, q.numerics
    )
    return np.asarray(y_BTD[0])


@pytest.mark.parametrize("numerics", ["fixed:w8a16", "fixed:w8a8,norms=double"])
def test_a_whole_block_in_amaranth_gives_the_integers_of_jax(quantized, numerics):
    q = quantized(numerics, hidden_size=10, intermediate_size=14)
    machine = fitting(Machine(lanes=4, memory_latency=2), q.config)
    compiled = compile_block(q, 1, machine)
    x_TD = np.random.default_rng(3).integers(-9_000, 9_000, (2, 10)).astype(np.int32)
    expected_TD = _jax_block(q, 1, x_TD)
    assert compiled.memory is not None
    memory = compiled.memory.copy()
    for x_D, y_D in zip(x_TD, expected_TD, strict=True):
        write_vector(compiled, "x", x_D, memory)
        (trace,) = simulate(compiled.program, memory, machine)
        np.testing.assert_array_equal(read_vector(compiled, "y", memory), y_D)
        assert trace.issued == timeline(compiled.program, machine).issued


@needs_icarus
def test_random_program_in_icarus(tmp_path):
    rng, machine = np.random.default_rng(9), MACHINES[0]
    program = random_program(rng, machine, 100)
    expected = _memory(rng, machine)
    got = expected.copy()
    for offset in (5, 0, 40):
        run(program, expected, machine, token_offset=offset)
    traces = run_icarus(program, got, machine, tmp_path, token_offsets=(5, 0, 40))
    np.testing.assert_array_equal(got, expected)
    line = timeline(program, machine)
    assert [trace.cycles for trace in traces] == [line.cycles] * 3
    assert traces[2].issued == line.issued


@needs_icarus
def test_a_whole_block_in_icarus_gives_the_integers_of_jax(quantized, tmp_path):
    q = quantized("fixed:w8a16", hidden_size=32, intermediate_size=48)
    machine = fitting(Machine(lanes=4), q.config)
    compiled = compile_block(q, 1, machine)
    x_TD = np.random.default_rng(4).integers(-9_000, 9_000, (1, 32)).astype(np.int32)
    assert compiled.memory is not None
    memory = compiled.memory.copy()
    write_vector(compiled, "x", x_TD[0], memory)
    (trace,) = run_icarus(compiled.program, memory, machine, tmp_path)
    np.testing.assert_array_equal(read_vector(compiled, "y", memory), _jax_block(q, 1, x_TD)[0])
    assert trace.cycles == timeline(compiled.program, machine).cycles


@needs_yosys
def test_the_ternary_unit_has_no_wide_multiplier_and_grows_with_lanes(tmp_path):
    cells = [
        cell_counts(Machine(lanes=n, vector_length=64), tmp_path, unit="ternary")["total"]
        for n in (4, 8)
    ]
    assert cells[1].luts > cells[0].luts > 100
    assert cells[1].flip_flops > cells[0].flip_flops
    # The one product is n times the words of a row, for the number of beats.
    assert [c.multipliers for c in cells] == [1, 1]
    assert [c.memory_bits for c in cells] == [0, 0]


def test_run_command_compares_the_rtl_with_the_simulator(tmp_path, capsys, monkeypatch, save_model):
    config = dataclasses.replace(CONFIG, hidden_size=10, intermediate_size=14)
    saved = save_model(tmp_path / "master", config, random_params(config))
    pack(saved, tmp_path / "model", embedding="float32")
    program = tmp_path / "block"
    arguments = ["hardware", "compile", "--model", str(tmp_path / "model"), "--layer", "1"]
    assert main([*arguments, "--out", str(program)]) == 0
    compiled = load(program)
    assert compiled.memory is not None
    assert len(set(read_vector(compiled, "x", compiled.memory).tolist())) > 3  # a real input
    again = ["hardware", "run", "--program", str(program), "--backend", "amaranth"]
    assert main([*again, "--out", str(tmp_path / "after.bin")]) == 0
    assert "its cycles are the simulator's" in capsys.readouterr().out
    after = np.fromfile(tmp_path / "after.bin", np.uint8)
    assert len(set(read_vector(compiled, "y", after).tolist())) > 3

    def wrong(backend, compiled, memory, offsets):
        memory[3] ^= 1
        return [timeline(compiled.program, compiled.machine).cycles]

    monkeypatch.setattr(cli, "_run_rtl", wrong)
    assert main(again) == 2
    assert "bytes of the RTL's memory are not the simulator's" in capsys.readouterr().err


def test_programs_of_unknown_speed_are_refused():
    from mmfree_jax.errors import ConfigError

    with pytest.raises(ConfigError, match=r"cycles_per_beat is 1\.5"):
        simulate(assemble("LDV v0, 0, n=4"), np.zeros(64, np.uint8), Machine(cycles_per_beat=1.5))
