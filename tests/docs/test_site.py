"""What the documentation site is made of, without Sphinx, which `make docs` has.

Every page is reached, every public name is documented once, and every setting is explained.
"""

import ast
import dataclasses
import json
import os
import re
import subprocess
import sys
import tomllib
from importlib import import_module
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"


@pytest.fixture(scope="module")
def site():
    """The package of docs/ that makes pages from the code."""
    sys.path.insert(0, str(DOCS))
    try:
        yield import_module("site_pages")
    finally:
        sys.path.remove(str(DOCS))
        for name in [name for name in sys.modules if name.split(".")[0] == "site_pages"]:
            del sys.modules[name]


def pages():
    """All but the one that is shown for an address that is not there."""
    found = sorted([*DOCS.glob("*.md"), *(DOCS / "api").glob("*.md")])
    return [page for page in found if page.name != "404.md"]


def test_every_page_is_in_one_list(site):
    listed = ["index.md"]
    for section in site.SECTIONS:
        page = DOCS / f"{section}.md"
        for target in site._LISTED.findall(page.read_text(encoding="utf-8")):
            listed.append(os.path.relpath(page.parent / target, DOCS))
    shown = {os.path.relpath(ROOT / name, DOCS) for name in site.repository_files.SHOWN}
    assert sorted(listed) == sorted({os.path.relpath(p, DOCS) for p in pages()} | shown)


def test_public_names_have_a_docstring_and_one_place(site):
    api = site.api
    documented = re.findall(
        r"^<!-- site: api (\S+) -->$",
        "\n".join(p.read_text(encoding="utf-8") for p in (DOCS / "api").glob("*.md")),
        re.M,
    )
    assert "<!-- site: kernels -->" in (DOCS / "api" / "kernels.md").read_text()
    doors = re.findall(r"^\.\. autosummary::\n\n   (.*)\.", api.kernels(), re.M)
    assert sorted([*documented, *doors]) == sorted(api.PUBLIC)
    homes: dict[int, set[str]] = {}
    for module in api.PUBLIC:
        text = api.markdown(module)
        for name in api.names(module):
            assert api.docstring(module, name).strip(), f"{module}.{name} has no docstring"
            home = api.home(module, name)
            directives = text.count(f":: {module}.{name}\n")
            assert directives == (home == module), f"{module}.{name}"
            value = getattr(import_module(module), name)
            if callable(value):
                homes.setdefault(id(value), set()).add(home)
    assert [found for found in homes.values() if len(found) > 1] == []


def test_what_a_program_of_ones_own_needs_is_public(site):
    """To train, to evaluate and to generate."""
    needed = {
        "mmfree_jax": {"LanguageModel", "preset", "load_pretrained", "save_pretrained", "pack"},
        "mmfree_jax.model": {"training_weights"},
        "mmfree_jax.evaluate": {"evaluate_held_out", "evaluate_tasks", "encode_pair", "Scorer"},
        "mmfree_jax.infer": {"load_model", "prefill", "fork", "save_session", "load_session"},
        "mmfree_jax.data": {"make_train_iterator", "make_eval_batches", "prepare_dataset"},
        "mmfree_jax.train": {"TrainState", "jit_train_step", "loss_sums", "make_optimizer"},
    }
    for module, names in needed.items():
        assert names <= set(site.api.names(module))


@pytest.mark.parametrize("package", ["mmfree_jax", "mmfree_jax.train", "mmfree_jax.data",
                                     "mmfree_jax.evaluate", "mmfree_jax.experiments.sweep",
                                     "mmfree_jax.experiments.scaling"])  # fmt: skip
def test_lazy_names_are_declared_alike(package):
    """In `__all__`, for type checkers and for the import."""
    module = import_module(package)
    lazy = {name: of for of, names in module._NAMES.items() for name in names.split()}
    tree = ast.parse(Path(str(module.__file__)).read_text(encoding="utf-8"))
    checked = next(node for node in tree.body if isinstance(node, ast.If))
    typed = {
        alias.name: node.module
        for node in checked.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert lazy == typed
    at_once = {
        alias.name for node in tree.body if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    assert set(lazy) == set(module.__all__) - at_once
    assert set(module.__all__) <= set(dir(module))
    submodules = {path.stem for path in Path(str(module.__file__)).parent.iterdir()}
    assert submodules & set(lazy) == set(), "importing the submodule would take the name's place"
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        module.nothing  # noqa: B018


def test_importing_the_packages_starts_no_jax():
    code = "import sys, mmfree_jax.train, mmfree_jax.data, mmfree_jax.evaluate as e; dir(e)\n"
    code += "assert 'jax' not in sys.modules and 'numpy' not in sys.modules"
    code += "\nimport mmfree_jax.experiments.sweep, mmfree_jax.experiments.scaling as s; dir(s)"
    code += "\nassert 'jax' not in sys.modules and 'matplotlib' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_setting_is_explained(site):
    text = site.settings.markdown()
    config = import_module("mmfree_jax.config")
    for kind in (config.TrainConfig, config.ModelConfig, config.OptimizerConfig):
        told = site.settings.explanations(kind)
        for field in dataclasses.fields(kind):
            if not dataclasses.is_dataclass(field.type):
                assert told.get(field.name), f"{kind.__name__}.{field.name}"
    rows = text.splitlines()
    assert (
        "| `optimizer.b2` | a number, in [0, 1) | `0.95` | Decay of the second moment (lion: of "
        "its only one; adafactor has 1 - t^-0.8). |" in rows
    )
    assert "| `batch_size` | a whole number, above 0 | `8` | Rows in one optimiser step, over " \
        "all devices. |" in rows  # fmt: skip
    assert "| `log.wandb_project` | a text or `null` | `null` | Also log to this Weights & " \
        "Biases project (docs/tracking.md). |" in rows  # fmt: skip


def test_the_help_of_a_command_is_shown_as_it_is_printed(site):
    text = site.commands.help_text("launch render slurm")
    assert text.startswith("usage: mmfree launch render slurm")
    assert "--qos" in text
    assert "data prepare" in site.commands.names()


@pytest.mark.parametrize(
    ("link", "expected"),
    [
        ("[a](models.md#forms)", "[a](models.md#forms)"),
        ("[a](../ARCHITECTURE.md#parameters)", "[a](generated/ARCHITECTURE.md#parameters)"),
        ("[a](../README.md)", "[a](index.md)"),
        ("[a](https://example.org/x.md)", "[a](https://example.org/x.md)"),
        ("[a](../experiments/results/exchange)",
         "[a](generated/experiments/results/exchange/README.md)"),
        ("[a](../Makefile)", "[a](../Makefile)"),
        ("```text\n[a](../README.md)\n```\n", "```text\n[a](../README.md)\n```\n"),
    ],
)  # fmt: skip
def test_links_lead_to_pages_of_the_site(site, link, expected):
    assert site.repository_files.with_links(link, DOCS / "data.md", "") == expected


def test_links_to_other_files_lead_to_the_repository(site):
    page = site.repository_files.COPIES / "CHANGELOG.md"
    found = site.repository_files.with_links("[a](docs/x.md) [b](Makefile)", page, "https://h/o/n")
    assert found == "[a](../x.md) [b](https://h/o/n/blob/HEAD/Makefile)"


def test_links_of_a_notebook_lead_to_pages_and_its_code_is_left(site):
    page = site.repository_files.COPIES / "experiments" / "notebooks" / "two_families.ipynb"
    links = ["[a](../../docs/data.md#splits) ", "[b](joint_fit.ipynb)"]
    cells = [
        {"cell_type": "markdown", "source": links},
        {"cell_type": "code", "source": ["f[a](b)"]},
    ]
    made = json.loads(site.repository_files.notebook(json.dumps({"cells": cells}), page, ""))
    assert [cell["source"] for cell in made["cells"]] == [
        "[a](../../../data.md#splits) [b](joint_fit.ipynb)",
        ["f[a](b)"],
    ]


def test_copies_are_of_what_is_shown_now(site, tmp_path, monkeypatch):
    files = site.repository_files
    monkeypatch.setattr(files, "COPIES", tmp_path / "generated")
    gone = files.COPIES / "experiments" / "notebooks" / "gone.ipynb"
    gone.parent.mkdir(parents=True)
    gone.write_text("{}")
    files.copy_all()
    found = {path.relative_to(files.COPIES).as_posix()
             for path in files.COPIES.rglob("*") if path.is_file()}  # fmt: skip
    assert found == set(files.SHOWN)
    for name in found:
        assert (files.COPIES / name).read_bytes() == (ROOT / name).read_bytes()


def test_versions_are_one():
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == version
    released = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert released[0] == version


def test_read_the_docs_builds_what_make_docs_builds():
    asked = yaml.safe_load((ROOT / ".readthedocs.yaml").read_text())
    assert (ROOT / asked["sphinx"]["configuration"]).samefile(DOCS / "conf.py")
    assert asked["sphinx"]["fail_on_warning"] is True
    (install,) = asked["python"]["install"]
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert set(install["extra_requirements"]) <= set(extras["optional-dependencies"])
    pages = yaml.safe_load((ROOT / ".github" / "workflows" / "docs.yml").read_text())
    steps = [step for job in pages["jobs"].values() for step in job["steps"]]
    assert [step["run"] for step in steps if "run" in step] == ["make docs"]
