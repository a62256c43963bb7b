"""Every function of every package says what it takes and gives, nested ones too."""

import ast
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]


def unannotated(text):
    """Line and name of each function that lacks the type of an argument or of its result."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            a = node.args
            arguments = [*a.posonlyargs, *a.args, *a.kwonlyargs, a.vararg, a.kwarg]
            missing = [
                x
                for x in arguments
                if x is not None and x.annotation is None and x.arg not in ("self", "cls")
            ]
            if missing or node.returns is None:
                yield node.lineno, node.name


def in_folder(folder):
    for path in sorted((REPOSITORY / folder).rglob("*.py")):
        if not any(p.is_symlink() for p in path.parents if p != REPOSITORY):
            for line, name in unannotated(path.read_text(encoding="utf-8")):
                yield f"{path.relative_to(REPOSITORY)}:{line} {name}"


@pytest.mark.parametrize("folder", ["mmfree_jax", "experiments", "launch", "pallas_kernels"])
def test_every_function_is_annotated(folder):
    assert (REPOSITORY / folder / "__init__.py").exists()
    assert not list(in_folder(folder))


def test_a_missing_annotation_is_seen():
    text = """
def full(a: int, *args: str, b: int = 1, **more: str) -> int:
    def inner(x): return x
def no_result(a: int): ...
class C:
    def method(self) -> None: ...
    def other(self, *args) -> None: ...
"""
    assert sorted(unannotated(text)) == [(3, "inner"), (4, "no_result"), (7, "other")]
