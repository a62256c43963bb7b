"""Links between the Markdown files resolve, and the files and modules that they name exist."""

import importlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("mmfree_jax", "pallas_kernels", "experiments", "launch")
DOCUMENTS = sorted(
    path
    for folder in (".", "docs", "docs/api", *PACKAGES)
    for path in (ROOT / folder).glob("**/*.md" if folder in PACKAGES else "*.md")
    if not {"node_modules", "results"} & set(path.relative_to(ROOT).parts)
)

FILES = [
    f"/{path.relative_to(ROOT)}"
    for folder in (*PACKAGES, "tests", "docs")
    for path in (ROOT / folder).rglob("*")
    if "node_modules" not in path.parts
]


def without_blocks(path: Path) -> str:
    return re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.M | re.S)


def anchors(path: Path) -> set[str]:
    """The anchors of a file's headings, as GitHub makes them."""
    found: dict[str, int] = {}
    for heading in re.findall(r"^#+ +(.*?) *$", without_blocks(path), re.M):
        text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
        slug = re.sub(r"[^\w\- ]", "", text).replace(" ", "-")
        found[slug] = found.get(slug, -1) + 1
        if found[slug]:
            found[f"{slug}-{found[slug]}"] = 0
    return set(found)


def spans() -> Iterator[tuple[str, str]]:
    """Document and text of each code span, outside of code blocks."""
    for path in DOCUMENTS:
        for text in re.findall(r"`([^`\n]+)`", without_blocks(path)):
            yield str(path.relative_to(ROOT)), text


def cases(pattern: str) -> list[tuple[str, str]]:
    return sorted({(path, text) for path, text in spans() if re.fullmatch(pattern, text)})


@pytest.mark.parametrize("path", DOCUMENTS, ids=[str(p.relative_to(ROOT)) for p in DOCUMENTS])
def test_links_resolve(path):
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", without_blocks(path)):
        if re.match(r"https?:|mailto:", target):
            continue
        name, _, anchor = target.partition("#")
        file = path if not name else path.parent / name
        if not file.exists() or (anchor and anchor not in anchors(file)):
            broken.append(target)
    assert broken == []


@pytest.mark.parametrize(
    ("document", "path"),
    cases(rf"[\w./-]+\.(py|md)|({'|'.join((*PACKAGES, 'tests', 'docs'))})/[\w./-]*"),
)
def test_files_that_are_named_exist(document, path):
    end = f"/{path.rstrip('/')}"
    assert (ROOT / path).exists() or any(file.endswith(end) for file in FILES)


def test_tests_that_are_named_exist():
    tests = {path: path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py")}
    functions = set(re.findall(r"^def (test_\w+)", "\n".join(tests.values()), re.M))
    assert {text for _, text in cases(r"test_\w+")} <= functions
    named = {
        (str(path.relative_to(ROOT)), name)
        for package in PACKAGES
        for path in (ROOT / package).rglob("*.py")
        for name in re.findall(r"tests/[\w/]+\.py", path.read_text(encoding="utf-8"))
    }
    assert {(path, name) for path, name in named if not (ROOT / name).exists()} == set()


@pytest.mark.parametrize("package", ["mmfree_jax", "experiments", "launch"])
def test_every_room_is_on_the_map(package):
    text = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    rooms = {
        path.name
        for path in (ROOT / package).iterdir()
        if path.is_dir() and not path.is_symlink() and path.name != "__pycache__"
    }
    assert {room for room in rooms if f"`{room}/" not in text} == set()


@pytest.mark.parametrize(("document", "name"), cases(r"mmfree_jax(\.\w+)+"))
def test_names_that_are_written_out_can_be_imported(document, name):
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:end]))
        except ModuleNotFoundError:
            continue
        for attribute in parts[end:]:
            found = getattr(found, attribute)
        return
    raise AssertionError(f"no module {name}")
