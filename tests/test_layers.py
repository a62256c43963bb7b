"""Imports point one way: between the packages, and between the rooms of mmfree_jax."""

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = ("pallas_kernels", "mmfree_jax", "experiments", "launch")  # from the bottom
MOST_LINES = 400

# From the bottom; rooms of one row may import each other as long as there is no circle.
ROOMS = (
    ("errors", "figures", "guard", "installed", "lazy_names", "notices", "readable", "text_files"),
    ("environment",),
    ("storage",),
    ("leases", "places", "prefixes", "ranges"),
    (
        "children",
        "compiled_programs",
        "config",
        "model_config",
        "no_effect",
        "progress",
        "quantizer_config",
        "rope_scaling",
        "mixer_pattern",
        "signals",
    ),
    ("presets",),
    ("config_io",),
    ("files", "json_shape"),
    ("object_cache", "outputs"),
    ("fetched",),
    ("error_line",),
    ("parallel",),
    ("model",),
    ("data",),
    ("saved",),
    ("train", "infer", "evaluate"),
    ("export", "serve"),
    ("cli",),
    ("__init__", "__main__"),  # which names what users import, and starts the command line
)
FLOOR = {room: floor for floor, row in enumerate(ROOMS) for room in row}


def _files() -> Iterator[tuple[str, Path]]:
    """Every module of the packages, with the folder's own package; links are not followed."""
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            if path.resolve().is_relative_to(ROOT / package):
                yield package, path


def _imported(path: Path) -> Iterator[str]:
    """Full names of what a file imports, in functions and under TYPE_CHECKING too."""
    here = path.relative_to(ROOT).with_suffix("").parts
    here = here if here[0] == "mmfree_jax" else ("mmfree_jax", *here)
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = ".".join([*here[: -node.level], *([base] if base else [])])
            # `from mmfree_jax import infer` imports a room, not a name of the package.
            yield from (f"{base}.{alias.name}" for alias in node.names)


def _place(name: str) -> tuple[str, str] | None:
    """The package and the room that a full name lies in; None: it is not ours."""
    parts = name.split(".")
    if parts[0] != "mmfree_jax":
        return None
    inner = parts[1] if len(parts) > 1 else "__init__"
    if inner in PACKAGES:
        return inner, ""
    return "mmfree_jax", inner if inner in FLOOR else "__init__"


def _room(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return parts[1] if parts[0] == "mmfree_jax" else ""


def _edges() -> Iterator[tuple[Path, str, str, str]]:
    """(file, its package, imported package, imported room) of every import of ours."""
    for package, path in _files():
        for name in _imported(path):
            place = _place(name)
            if place is not None:
                yield path, package, *place


def test_packages_import_those_below_only() -> None:
    against = {
        (path.relative_to(ROOT).as_posix(), target)
        for path, package, target, _ in _edges()
        if PACKAGES.index(target) > PACKAGES.index(package)
    }
    assert against == set()


def test_nothing_imports_a_package_by_its_folders_name() -> None:
    """Only as mmfree_jax.X: a user's folder `experiments` must never be found instead."""
    short = {
        (path.relative_to(ROOT).as_posix(), name)
        for _, path in _files()
        for name in _imported(path)
        if name.split(".")[0] in ("pallas_kernels", "experiments", "launch")
    }
    assert short == set()


def test_every_room_has_a_floor() -> None:
    rooms = {_room(path) for package, path in _files() if package == "mmfree_jax"}
    assert rooms - set(FLOOR) == set()


def test_rooms_import_their_own_floor_and_those_below() -> None:
    against = {
        (path.relative_to(ROOT).as_posix(), room)
        for path, package, target, room in _edges()
        if package == target == "mmfree_jax" and FLOOR[room] > FLOOR[_room(path)]
    }
    assert against == set()


def test_rooms_form_no_circle() -> None:
    below: dict[str, set[str]] = {}
    for path, package, target, room in _edges():
        if package == target == "mmfree_jax" and room != _room(path):
            below.setdefault(_room(path), set()).add(room)
    while leaves := {r for r in below if not below[r] & below.keys()}:
        below = {r: rooms for r, rooms in below.items() if r not in leaves}
    assert below == {}


def test_kernels_import_neither_flax_nor_mmfree_jax() -> None:
    outside = {
        (path.relative_to(ROOT).as_posix(), name)
        for package, path in _files()
        if package == "pallas_kernels"
        for name in _imported(path)
        if name.split(".")[0] == "flax"
        or (name.split(".")[0] == "mmfree_jax" and name.split(".")[1:2] != ["pallas_kernels"])
    }
    assert outside == set()


def test_scaling_imports_no_trainer() -> None:
    """It is numpy and scipy: what it reads of runs is in files that start no JAX."""
    allowed = {
        "config", "config_io", "errors", "fetched", "figures", "files", "installed", "json_shape",
        "lazy_names",
        "saved.history", "storage", "text_files",
    }  # fmt: skip
    outside = {
        (path.name, name)
        for package, path in _files()
        if path.relative_to(ROOT).as_posix().startswith("experiments/scaling/")
        for name in _imported(path)
        if name.startswith("mmfree_jax.")
        and not name.startswith("mmfree_jax.experiments.scaling.")
        and not any(name.startswith(f"mmfree_jax.{room}") for room in allowed)
    }
    assert outside == set()


def test_a_file_is_short_enough_to_be_read_at_once() -> None:
    lines = {
        path.relative_to(ROOT).as_posix(): len(path.read_text(encoding="utf-8").splitlines())
        for path in (*(path for _, path in _files()), *ROOT.glob("tests/**/*.py"))
    }
    assert {name: n for name, n in lines.items() if n > MOST_LINES} == {}
