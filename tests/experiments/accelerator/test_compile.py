"""Compiled programs on the simulator against the integers that JAX gives."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmfree_jax.errors import ConfigError, DataError
from mmfree_jax.experiments.accelerator import integer_model
from mmfree_jax.experiments.accelerator.compile import (
    compile_block,
    compile_model,
    fitting,
    read_vector,
    shape_program,
    write_vector,
)
from mmfree_jax.experiments.accelerator.isa import Instruction, assemble, disassemble
from mmfree_jax.experiments.accelerator.machine import Machine, cycles_of, timeline
from mmfree_jax.experiments.accelerator.simulate import run
from mmfree_jax.model_config import ModelConfig


@pytest.mark.parametrize(
    ("numerics", "layer", "lanes", "shape"),
    [
        ("fixed:w8a16", 1, 4, {}),
        ("fixed:w8a8", 1, 8, {"hidden_size": 13, "intermediate_size": 41}),
        ("fixed:w16a16,norms=double,eps=model", 0, 12, {"hidden_size": 40}),
        ("fixed:w8a8,norms=double,eps=1e-5", 1, 4, {"hidden_size": 7, "intermediate_size": 5}),
    ],
)
def test_block_equals_jax(quantized, numerics, layer, lanes, shape):
    q = quantized(numerics, seed=layer + lanes, **shape)
    machine = fitting(Machine(lanes=lanes), q.config)
    compiled = compile_block(q, layer, machine)
    rng = np.random.default_rng(0)
    x_TD = rng.integers(-20_000, 20_000, (5, q.config.hidden_size)).astype(np.int32)
    p = jax.tree.map(lambda a: jnp.asarray(a[layer]), q.arrays["layers"])
    h_BD = jnp.zeros((1, q.config.hidden_size), jnp.int32)
    y_BTD, h_BD = jax.jit(integer_model.block, static_argnums=3)(
        jnp.asarray(x_TD)[None], h_BD, p, q.numerics
    )
    assert compiled.memory is not None
    memory = compiled.memory.copy()
    for x_D, y_D in zip(x_TD, np.asarray(y_BTD[0]), strict=True):
        write_vector(compiled, "x", x_D, memory)
        run(compiled.program, memory, machine)
        np.testing.assert_array_equal(read_vector(compiled, "y", memory), y_D)
    state = read_vector(compiled, f"{layer}/h", memory)
    np.testing.assert_array_equal(state, np.asarray(h_BD[0]))
    assert len(set(y_D.tolist())) > 3  # not saturated all over


def test_model_equals_jax_token_by_token(quantized):
    q = quantized("fixed:w8a16")
    # Shorter registers than the vocabulary: the head is cut into pieces.
    machine = Machine(lanes=4, vector_length=64)
    compiled = compile_model(q, machine)
    assert assemble(disassemble(compiled.program)) == compiled.program
    tokens = np.random.default_rng(1).integers(0, q.config.vocab_size, (1, 6))
    arrays = jax.tree.map(jnp.asarray, q.arrays)
    h_LBD = jnp.zeros((q.config.num_layers, 1, q.config.hidden_size), jnp.int32)
    x_BTD, _ = jax.jit(integer_model.hidden, static_argnums=4)(
        arrays, jnp.asarray(tokens), None, h_LBD, q.numerics
    )
    logits = jax.jit(integer_model.logits, static_argnums=2)(arrays, x_BTD, q.numerics)
    logits_TV = np.asarray(logits)[0]
    assert compiled.memory is not None
    memory = compiled.memory.copy()
    for token, logits_V in zip(tokens[0].tolist(), logits_TV, strict=True):
        run(compiled.program, memory, machine, token_offset=token * compiled.token_stride)
        np.testing.assert_array_equal(read_vector(compiled, "logits", memory), logits_V)


def test_shapes_alone_take_the_same_cycles(quantized):
    q = quantized("fixed:w8a16")
    machine = Machine(lanes=4, vector_length=64)
    with_weights = timeline(compile_model(q, machine).program, machine)
    assert timeline(shape_program(q.config, machine).program, machine) == with_weights


def test_scoreboard_waits_for_units_registers_and_the_memory():
    machine = Machine(lanes=4, vector_length=64, memory_latency=5)
    program = assemble(
        "LDV v0, 0, n=16\n"  # holds v0 and the memory
        "ADD v1, v2, v3, n=16\n"  # overlaps
        "NORM v4, v5, n=16, eps=1, root=16384\n"  # another unit, overlaps
        "SUB v6, v2, v7, n=16\n"  # waits for the row-wise unit
        "SV v7, 0, n=4\n"  # waits for v7, held by SUB, and the memory
    )
    line = timeline(program, machine)
    ldv, add, norm, sub, _ = (cycles_of(i, machine) for i in program)
    assert line.issued == (0, 1, 2, 1 + add, max(ldv, 1 + add + sub))
    assert line.finished[:3] == (ldv, 1 + add, 2 + norm)
    assert line.cycles == max(line.finished)
    assert line.beats == 8 * 4 + 8
    slower = dataclasses.replace(machine, cycles_per_beat=2.5)
    assert cycles_of(program[0], slower) == ldv + 47  # ceil(31 * 1.5)


def test_wide_machines_read_the_matrix_in_fewer_beats():
    config = ModelConfig(hidden_size=64, num_layers=1, intermediate_size=128)
    narrow, wide = (Machine(lanes=n, vector_length=128) for n in (4, 64))
    beats = [
        timeline(shape_program(config, m, block_only=True).program, m).beats for m in (narrow, wide)
    ]
    assert beats[0] == 16 * beats[1]


@settings(max_examples=40)
@given(st.integers(1, 21), st.integers(0, 6), st.integers(0, 5), st.integers(0, 2**32 - 1))
def test_loads_and_stores_move_words_and_clear_what_lies_behind(n, address, offset, seed):
    machine = Machine(lanes=8, vector_length=21)
    rng = np.random.default_rng(seed)
    memory = rng.integers(0, 256, 2 * (64 + 24), dtype=np.uint8)
    before, registers = memory.copy(), rng.integers(-32_768, 32_768, (8, 24)).astype(np.int32)
    untouched = registers.copy()
    padded = machine.words(n) * 8
    # Beats are of 2 bytes, words of 16; an indexed address has the token's offset added.
    program = [Instruction("LDV", 5, n=n, address=address, indexed=True)]
    run(program, memory, machine, token_offset=offset, registers=registers)
    start = 2 * (address + offset)
    expected = before[start : start + 2 * n].view("<i2")
    assert registers[5, :n].tolist() == expected.tolist()
    assert not registers[5, n:padded].any()
    assert registers[5, padded:].tolist() == untouched[5, padded:].tolist()
    np.testing.assert_array_equal(np.delete(registers, 5, 0), np.delete(untouched, 5, 0))
    run([Instruction("SV", 2, n=n, address=address)], memory, machine, token_offset=offset,
        registers=registers)  # fmt: skip
    stored = memory[2 * address :][: 2 * padded]
    assert stored.view("<i2").tolist() == untouched[2, :padded].tolist()
    memory[2 * address :][: 2 * padded] = before[2 * address :][: 2 * padded]
    np.testing.assert_array_equal(memory, before)


def test_what_does_not_fit_is_refused(quantized):
    q = quantized("fixed:w8a16")
    with pytest.raises(ConfigError, match="vector_length is 16: the model needs 30"):
        compile_model(q, Machine(vector_length=16))
    with pytest.raises(ConfigError, match="the machine has a table of 32"):
        compile_model(q, Machine(vector_length=64, sigmoid_entries=32))
    with pytest.raises(ConfigError, match="lanes is 6"):
        Machine(lanes=6)
    machine = Machine(vector_length=8)
    with pytest.raises(DataError, match=r"instruction 0 \(ADD\) has 9 elements"):
        run(assemble("ADD v0, v1, v2, n=9"), np.zeros(64, np.uint8), machine)
    with pytest.raises(DataError, match=r"instruction 0 \(LDV\) reaches byte 80"):
        run(assemble("LDV v0, 64, n=8"), np.zeros(64, np.uint8), machine)
