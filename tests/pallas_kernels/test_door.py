"""Each op has one door, `api.py`, and the package imports nothing from above it."""

import ast
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
KERNELS = "mmfree_jax.pallas_kernels"
# What others may import beside an op's `api`: the choice by measurement, the ops' benchmarks,
# which `mmfree bench kernels` runs, the errors that users see, and how a gradient over tokens is
# added up over devices, which the embedding's is too.
ALSO_OPEN = {"dispatch", "benchmark", "errors", "over_tokens"}


def sources(folder):
    """The Python files of a top-level folder, without what its links point to."""
    for path in sorted((REPOSITORY / folder).rglob("*.py")):
        links = [p for p in path.parents if p != REPOSITORY and p.is_symlink()]
        if not links:
            yield path


def imported(text):
    """The modules and members that a file imports, by their full names."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def round_the_door(text):
    """Imports that reach past an op's door."""
    for name in imported(text):
        if name.startswith(f"{KERNELS}."):
            parts = name.removeprefix(f"{KERNELS}.").split(".")
            if not ALSO_OPEN.intersection(parts) and "api" not in parts[1:2]:
                yield name


@pytest.mark.parametrize("folder", ["mmfree_jax", "experiments", "launch"])
def test_the_ops_are_entered_by_their_doors(folder):
    found = [
        f"{path.relative_to(REPOSITORY)}: {name}"
        for path in sources(folder)
        for name in round_the_door(path.read_text(encoding="utf-8"))
    ]
    assert not found


def test_what_goes_round_a_door_is_seen():
    text = f"""
from {KERNELS}.norm_quant.reference import rms_norm
from {KERNELS}.packed_matmul import pallas_gpu
from {KERNELS}.norm_quant.api import rms_norm
from {KERNELS}.norm_quant import api
from {KERNELS}.norm_quant.benchmark import benchmark
from {KERNELS} import dispatch
import {KERNELS}.decode.token_gpu
"""
    assert list(round_the_door(text)) == [
        f"{KERNELS}.norm_quant.reference.rms_norm",
        f"{KERNELS}.packed_matmul.pallas_gpu",
        f"{KERNELS}.decode.token_gpu",
    ]


def test_the_kernels_import_neither_flax_nor_what_is_above_them():
    files = list(sources("pallas_kernels"))
    assert len(files) > 40
    for path in files:
        for name in imported(path.read_text(encoding="utf-8")):
            assert name.split(".")[0] not in ("flax", "mmfree_jax", "experiments", "launch"), path
