"""The text form and the words of instructions, and what is said about malformed programs."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmfree_jax.errors import DataError
from mmfree_jax.experiments.accelerator.isa import (
    BINARY,
    Instruction,
    assemble,
    check,
    decode,
    disassemble,
    encode,
)

_REGISTER = st.integers(0, 7)
_N = st.integers(1, 65_535)
_BITS = st.integers(2, 16)
_ADDRESS = st.integers(0, 2**32 - 1)


@st.composite
def instructions(draw) -> Instruction:
    op = draw(st.sampled_from(("LDV", "SV", "NORM", "TMATMUL", "EXP", "SIG", *BINARY)))
    dst, a, n = draw(_REGISTER), draw(_REGISTER), draw(_N)
    if op in ("LDV", "SV"):
        return Instruction(op, dst, n=n, address=draw(_ADDRESS), indexed=draw(st.booleans()))
    if op == "TMATMUL":
        a = (dst + draw(st.integers(1, 7))) % 8
        return Instruction(
            op, dst, a, n=n, k=draw(st.integers(1, 32_767)), address=draw(_ADDRESS),
            shift=draw(st.integers(0, 30)), bits=draw(_BITS),
        )  # fmt: skip
    if op == "NORM":
        return Instruction(
            op, dst, a, n=n, eps=draw(st.integers(1, 2**31 - 1)), bits=draw(_BITS),
            root=draw(st.integers(1 << 14, (1 << 15) - 1)), shift=draw(st.integers(-32, 31)),
        )  # fmt: skip
    if op in ("EXP", "SIG"):
        return Instruction(op, dst, a, n=n, shift=draw(st.integers(0, 15)))
    number = draw(st.none() | st.integers(-32_768, 32_767))
    shift = draw(st.integers(0, 15 if op == "DIV" else 30))
    return Instruction(
        op, dst, None if number is not None else a, draw(_REGISTER), number, n=n, shift=shift,
        bits=draw(_BITS),
    )  # fmt: skip


@given(st.lists(instructions(), max_size=6))
def test_assembler_round_trip(program):
    assert all(check(i) is None for i in program)
    assert assemble(disassemble(program)) == program
    assert [decode(encode(i)) for i in program] == program
    assert all(encode(i) < 2**128 for i in program)


def test_comments_blank_lines_case_and_hexadecimal():
    text = "; a comment\n\n  add v1, #-0x10, v2, n=0x20, bits=8 ; more\n"
    assert assemble(text) == [Instruction("ADD", 1, None, 2, -16, n=32, bits=8)]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("ADDD v0, v1, v2, n=4", "operation 'ADDD' is unknown"),
        ("ADD v0, v1, n=4", "takes 3 operands, not 2"),
        ("ADD v0, v1, v9, n=4", "register v9 does not exist"),
        ("ADD v0, v1, x2, n=4", "'x2' is no register"),
        ("ADD v0, v1, v2", "ADD needs n"),
        ("ADD v0, v1, v2, n=4, n=5", "given twice"),
        ("ADD v0, v1, v2, n=4, frac=2", "has no option 'frac'"),
        ("ADD v0, v1, v2, n=four", "'four' is no number"),
        ("ADD v0, v1, v2, n=4, shift=31", "shift is 31: ADD takes 0 to 30"),
        ("ADD v0, #40000, v2, n=4", "number is 40000"),
        ("MUL v0, n=4, v1, v2", "operands come before options"),
        ("SIG v0, #3, n=4, frac=2", "'#3' is no register"),
        ("SIG v0, v1, n=4, frac=16", "frac is 16: SIG takes 0 to 15"),
        ("DIV v0, v1, v2, n=4, shift=16", "shift is 16"),
        ("NORM v0, v1, n=4, eps=0, root=16384", "eps is 0"),
        ("NORM v0, v1, n=4, eps=1", "NORM needs root"),
        ("LDV v0, 12q, n=4", "'12q' is no number"),
        ("SV v0, 0x100000000, n=4", "address is"),
        ("TMATMUL v1, v1, 0, n=4, k=4", "write to another register"),
        ("LDV v0, 0, n=0", "n is 0"),
        ("TMATMUL v1, v2, 0[token], n=4, k=4", "TMATMUL takes no [token]"),
    ],
)
def test_malformed_lines_are_refused_with_their_number(line, message):
    text = f"LDV v0, 0, n=4\n; fine so far\n{line}\n"
    with pytest.raises(DataError, match=r"^line 3: ") as e:
        assemble(text)
    assert message in str(e.value)
    assert line in str(e.value)
    assert "\n" not in str(e.value)


def test_a_word_without_an_operation_is_refused():
    with pytest.raises(DataError, match=re.escape("operation 15")):
        decode(15)
    # A number of an instruction, with a field that cannot run: no elements.
    with pytest.raises(DataError, match="n is 0: LDV takes 1 to"):
        decode(encode(Instruction("LDV", 3, n=4)) & ~(0xFFFF << 16))
