"""Packages that may be absent: an absent one is told with its command, a broken one as it is."""

import ast
import re
import sys
import tomllib
from pathlib import Path

import pytest

from mmfree_jax.cli import main
from mmfree_jax.config import LogConfig, TrainConfig
from mmfree_jax.errors import ConfigError, MMFreeError
from mmfree_jax.evaluate import tasks
from mmfree_jax.experiments.bench.browser import chromium
from mmfree_jax.experiments.cli import accelerator
from mmfree_jax.export import onnx_session
from mmfree_jax.export.chat import package
from mmfree_jax.installed import import_optional, install_command
from mmfree_jax.saved import hub
from mmfree_jax.train.sinks import make_sinks

ROOT = Path(__file__).parents[1]
SOURCES = [p for folder in ("pallas_kernels", "mmfree_jax", "experiments", "launch")
           for p in (ROOT / folder).rglob("*.py") if "node_modules" not in p.parts]  # fmt: skip
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]


def _wandb(folder):
    make_sinks(TrainConfig(log=LogConfig(tensorboard=False, wandb_project="p")), folder, 0)


def _browser(folder):
    with chromium(folder):
        pass


USES = {
    "wandb": _wandb,
    "lm_eval": lambda folder: tasks.check_installed(),
    "tqdm": lambda folder: tasks.check_installed(),
    "datasets": lambda folder: tasks._rows_of_hub("piqa"),
    "onnxruntime": onnx_session.load,
    "onnx": lambda folder: main._dispatch(f"export onnx --model {folder} --out {folder}/x".split()),
    "huggingface_hub": lambda folder: hub.check_repository("me/model", sends=False),
    "selenium": _browser,
    "amaranth": lambda folder: accelerator.cells(),
    **{
        name: lambda folder: main._dispatch(["serve", "--model", str(folder)])
        for name in ("starlette", "uvicorn", "prometheus_client", "jinja2")
    },
}
"""What needs each package, called with an empty folder."""


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A folder in which packages are found first."""
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))
    return folder


@pytest.fixture
def install(site, monkeypatch):
    """Puts a package there, in place of one that may be imported already."""

    def put(name, source):
        monkeypatch.delitem(sys.modules, name, raising=False)
        (site / name).mkdir()
        (site / name / "__init__.py").write_text(source)

    return put


@pytest.mark.parametrize("name", USES)
def test_a_broken_package_is_not_told_as_an_absent_one(install, tmp_path, name):
    install(name, "raise ImportError('libcore.so: cannot open\\nshared object file')")
    with pytest.raises(MMFreeError) as e:
        USES[name](tmp_path)
    assert f"needs {name}, which is installed but cannot be imported" in str(e.value)
    assert "(ImportError: libcore.so: cannot open shared object file)" in str(e.value)
    assert "not installed" not in str(e.value)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("name", USES)
def test_an_absent_package_is_told_with_a_command_that_is_there(monkeypatch, tmp_path, name):
    monkeypatch.setitem(sys.modules, name, None)  # Python's own way to say that it is not there
    with pytest.raises(MMFreeError, match=f"needs {name}, which is not installed: run pip ") as e:
        USES[name](tmp_path)
    if name != "selenium":
        extra = re.search(r"pip install -e '?(\S+?)\[(\w+)\]'?$", str(e.value))
        assert extra, str(e.value)
        assert (Path(extra[1]) / "pyproject.toml").samefile(ROOT / "pyproject.toml")
        assert any(re.split(r"[<>=\[]", line)[0].replace("-", "_") == name
                   for line in EXTRAS[extra[2]] + ["datasets"])  # fmt: skip


def test_what_a_package_lacks_is_not_taken_for_the_package(install):
    install("half", "import half.inner")
    with pytest.raises(ConfigError, match=r"No module named 'half\.inner'"):
        import_optional("half", "this", "pip install half")


def test_any_error_of_an_import_is_told(install):
    install("half", "import numpy\nnumpy.float_")  # as wandb 0.17 with numpy 2
    with pytest.raises(ConfigError, match=r"AttributeError: `np\.float_` was removed"):
        import_optional("half", "this", "pip install half")


def test_a_folder_of_the_name_is_not_the_package(site):
    (site / "half").mkdir()
    with pytest.raises(ConfigError, match="this needs half, which is not installed: run pip inst"):
        import_optional("half", "this", "pip install half")


def test_the_shipped_chat_tells_an_import_as_it_is(install, capsys):
    install("half", "raise ImportError('libcore.so')")
    for name, told in (
        ("half", "half cannot be imported (libcore.so)"),
        ("gone", "gone cannot be imported (No module named 'gone')"),
    ):
        with pytest.raises(SystemExit, match=r"^2$"):
            package(name)
        advice = f"run pip install --upgrade {name}"
        assert capsys.readouterr().err == f"chat.py: error: {told}: {advice}\n"


def test_nothing_else_turns_an_import_error_into_a_message():
    kinds = {"ImportError", "ModuleNotFoundError"}
    caught = {
        str(path.relative_to(ROOT))
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ExceptHandler) and node.type is not None
        if kinds & {n.id for n in ast.walk(node.type) if isinstance(n, ast.Name)}
    }
    assert caught == {
        "mmfree_jax/cli/main.py",  # the summaries of other packages' commands
        "pallas_kernels/triton.py",  # what JAX may have taken away
    }


def test_no_command_asks_an_index_for_this_package():
    kinds = {".py", ".md", ".yaml", ".toml", ".sh", ".sbatch", ".ipynb", ".html", ""}
    skipped = {".venv", ".git", ".hypothesis", "node_modules", "results", "dist", "build"}
    found = [
        f"{path.relative_to(ROOT)}: {line}"
        for path in ROOT.rglob("*")
        if path.suffix in kinds and path.is_file() and path != Path(__file__)
        if not skipped & set(path.relative_to(ROOT).parts)
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines()
        if re.search(r"(?<!/)mmfree[-_.]jax\[|pip install[^|#]* mmfree", line)
    ]
    assert found == []


def test_documented_extras_exist():
    named = set()
    for path in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), ROOT / "Makefile"]:
        for names in re.findall(r"'\.\[([\w,]+)\]'", path.read_text(encoding="utf-8")):
            named |= set(names.split(","))
    assert {"eval", "edge", "hardware", "wandb", "notebooks", "dev"} <= named <= set(EXTRAS)


def test_extras_that_messages_name_exist():
    named = {
        e for path in SOURCES for e in re.findall(r'install_command\("(\w+)"', path.read_text())
    }
    assert named <= set(EXTRAS)
    for extra in named:
        assert install_command(extra).endswith(f"[{extra}]'")
