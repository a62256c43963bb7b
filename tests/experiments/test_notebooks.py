"""The notebooks are such that every build of the documentation can run them, and sees an error.

`make docs` runs each in an empty folder, in the environment of the extras `notebooks` and `docs`.
What is looked at here needs no kernel.
"""

import ast
import json
import re
import sys
import tomllib
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import nbformat
import pytest

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "experiments" / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
each = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def _cells(path: Path, kind: str) -> list[str]:
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == kind]


def _python(path: Path) -> ast.Module:
    """The cells that are Python, as one module."""
    cells = [cell for cell in _cells(path, "code") if not cell.startswith("%%")]
    return ast.parse("\n".join(cells))


@pytest.fixture(scope="module")
def public() -> set[tuple[str, str]]:
    """Module and name of everything that the reference of the library lists."""
    sys.path.insert(0, str(ROOT / "docs"))
    try:
        modules = import_module("site_pages.api").PUBLIC
    finally:
        sys.path.remove(str(ROOT / "docs"))
        for name in [name for name in sys.modules if name.split(".")[0] == "site_pages"]:
            del sys.modules[name]
    return {(module, name) for module in modules for name in import_module(module).__all__}


def test_all_are_where_the_site_finds_them():
    folders = ("docs", "experiments", "launch", "mmfree_jax", "pallas_kernels", "tests")
    found = {
        path
        for folder in folders
        for path in (ROOT / folder).rglob("*.ipynb")
        if path.resolve() == path and not {"generated", "_build"} & set(path.parts)
    }
    assert found == set(NOTEBOOKS)
    names = {path.stem for path in NOTEBOOKS}
    assert {"two_families", "sweep_to_prediction", "reading_a_run", "scaling_study"} <= names


@each
def test_it_is_kept_without_outputs_for_the_builds_own_kernel(path):
    notebook: Any = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3"
    assert notebook.metadata.language_info == {"name": "python"}
    for cell in notebook.cells:
        assert cell.metadata == {}
        assert cell.get("outputs", []) == []
        assert cell.get("execution_count") is None


@each
def test_a_command_is_a_cell_of_its_own_so_that_its_failure_is_one(path):
    for cell in _cells(path, "code"):
        assert not re.search(r"^\s*[!%](?!%(bash|writefile) ?)", cell, re.M), cell
        if cell.startswith("%%bash"):
            lines = cell.replace("\\\n", " ").splitlines()[1:]
            assert len(lines) == 1, f"all but the last may fail unseen: {cell}"
            assert not re.search(r"[;|&]", lines[0]), cell


@each
def test_it_names_no_place_outside_of_its_folder(path):
    texts = [n.value for n in ast.walk(_python(path)) if isinstance(n, ast.Constant)]
    texts += [
        word for cell in _cells(path, "code") if cell.startswith("%%") for word in cell.split()
    ]
    outside = [t for t in texts if isinstance(t, str) and re.match(r"/\w|~/|\.\.(/|$)|\w+://", t)]
    assert outside == []


@each
def test_what_it_imports_is_public_and_in_its_extra(path, public):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    installed = project["dependencies"] + project["optional-dependencies"]["notebooks"]
    packages = {re.split(r"[^\w-]", requirement)[0] for requirement in installed}
    packages |= {"IPython", *sys.stdlib_module_names}  # the first comes with ipykernel
    unknown = []
    for module, name in _imports(_python(path)):
        if module.split(".")[0] != "mmfree_jax":
            unknown += [module] if module.split(".")[0] not in packages else []
        elif (module, name) not in public and f"{module}.{name}" not in {m for m, _ in public}:
            # Where the results lie, which a notebook of the repository reads.
            unknown += [f"{module}.{name}"] if name != "experiments" else []
    assert unknown == []


def _imports(tree: ast.Module) -> Iterator[tuple[str, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((str(node.module), alias.name) for alias in node.names)


@each
def test_its_links_lead_somewhere(path):
    for text in _cells(path, "markdown"):
        for target in re.findall(r"\]\((?!\w+:)([^)#\s]+)", text):
            assert (path.parent / target).exists(), target
