"""Every documented command is one that its parser takes. Nothing is run: it ends after parsing."""

import itertools
import json
import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import tyro

from mmfree_jax.cli import main
from mmfree_jax.errors import ConfigError
from mmfree_jax.experiments.accelerator.numerics import parse_numerics
from mmfree_jax.experiments.scaling.laws import LAWS
from mmfree_jax.launch.ahead.topology import parse_topology
from mmfree_jax.launch.device_scaling.plan import parse_case
from mmfree_jax.presets import preset

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("mmfree_jax", "pallas_kernels", "experiments", "launch")

# How a shell line is cut into commands, and where one of ours begins.
BETWEEN = re.compile(r" && | \|\| |; | \| |^\(")
REDIRECTED = re.compile(r" \d?>(&\d| \S+)| &$")
OURS = re.compile(r"(?:^|[@ ])(?:python -m mmfree_jax|mmfree) (.*)")

SHELL_VARIABLES = {"$STAGE": "tuning", "$JOB_COMPLETION_INDEX": "3"}

VALUES: dict[str, Callable[[str], object]] = {
    "--sizes": lambda text: [preset(name) for name in text.split(",")],
    "--prefill-sizes": lambda text: [preset(name) for name in text.split(",")],
    "--presets": preset,
    "--preset": preset,
    "--cases": lambda text: parse_case(text, 8, 2048),
    "--numerics": parse_numerics,
    "--topology": parse_topology,
    "--laws": LAWS.__getitem__,
}
"""Checks of values that a command reads itself, after its parser."""


def documents() -> list[Path]:
    """The Markdown files, the Makefile, notebooks, and what has comments and docstrings."""
    found = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), ROOT / "Makefile"]
    found += (ROOT / "docs" / "api").glob("*.md")
    for package in PACKAGES:
        for kind in ("*.py", "*.yaml", "*.md", "*.ipynb"):
            found += (p for p in (ROOT / package).rglob(kind) if "node_modules" not in p.parts)
    return sorted(found)


def split(text: str) -> tuple[str, list[str]]:
    """The prose of a Markdown file, and the lines of its shell blocks, continued ones joined."""
    prose, blocks = [], []
    language: str | None = None
    for line in text.splitlines():
        if line.startswith("```"):
            language = None if language is not None else line[3:].strip()
        elif language is None:
            prose.append(line)
        elif language in ("", "bash", "sh"):
            blocks.append(line)
    return "\n".join(prose), "\n".join(blocks).replace("\\\n", " ").splitlines()


def spans(text: str) -> Iterator[str]:
    """Code spans, also those that a line break divides."""
    for span in re.findall(r"`([^`]+)`", text):
        yield re.sub(r"\s*\n[\s#]*", " ", span).replace("\\|", "|")


def documented(path: Path) -> Iterator[str]:
    """Lines of one file that are commands of this package, without the `mmfree`.

    One that is named in the middle of a sentence may leave arguments out: it gets an ellipsis.
    """
    text = path.read_text(encoding="utf-8")
    lines: list[str] = []
    if path.suffix == ".md":
        text, lines = split(text)
    elif path.suffix == ".ipynb":
        cells = ["".join(cell["source"]) for cell in json.loads(text)["cells"]]
        shell = [cell for cell in cells if cell.startswith("%%bash\n")]
        lines = "\n".join(shell).replace("\\\n", " ").splitlines()
        text = "\n".join(cells)
    elif path.name == "Makefile":
        recipe = re.findall(r"^\t(.*)$", text.replace("$(BIN)/", ""), re.M)
        lines = [re.sub(r"\$\(\w+\)", "NAME", line) for line in recipe]
    # An f-string's values are known only when it is printed; a string may be cut by a line.
    mentioned = [f"{s} ..." for s in spans(text) if "{" not in s and '" "' not in s]
    lines = [REDIRECTED.sub("", line) for line in lines]
    for part in itertools.chain.from_iterable(map(BETWEEN.split, lines + mentioned)):
        if match := OURS.search(part):
            yield " ".join(match[1].split())


def expand(line: str) -> Iterator[list[str]]:
    """Arguments of a documented line: [optional] ones are given, `a|b` is one line each."""
    for name, value in SHELL_VARIABLES.items():
        line = line.replace(name, value)
    words = shlex.split(re.sub(r"'?\]|[\[)]", "", line), comments=True)
    choices = [word.split("|") if re.fullmatch(r"[\w-]+(\|[\w-]+)+", word) else [word]
               for word in words]  # fmt: skip
    for chosen in itertools.product(*choices):
        yield list(chosen)


COMMANDS = sorted(  # each once, with the last of the documents that have it
    (str(place), line)
    for line, place in {
        line: path.relative_to(ROOT) for path in documents() for line in documented(path)
    }.items()
)


class Parsed(BaseException):
    """The arguments were read: the command must not begin its work."""


@pytest.fixture
def parse(monkeypatch, tmp_path) -> Callable[[list[str]], None]:
    """Reads a command line by the command's own parser, in a folder with the checkout's files."""
    original = tyro.cli

    def read_only(*args, **kwargs):
        original(*args, **kwargs)
        raise Parsed

    monkeypatch.setattr(tyro, "cli", read_only)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "experiments").symlink_to(ROOT / "experiments")
    (tmp_path / "my.yaml").write_text("steps: 10\n")
    return parse_words


def parse_words(words: list[str]) -> None:
    """Raises ConfigError where the command does not take the words; an ellipsis stands for more."""
    own, after = words, []
    if "--" in words:
        own, after = words[: words.index("--")], words[words.index("--") + 1 :]
    abbreviated = "..." in words
    own, after = ([word for word in part if word != "..."] for part in (own, after))
    for flag in {"--init-from", "--branch-from"} & set(own):  # read before the other arguments
        at = own.index(flag)
        own = own[:at] + own[at + 2 :]
    for flag, value in itertools.pairwise(own):
        if flag in VALUES:
            VALUES[flag](value)
    known = main.commands()
    if own in (["COMMAND"], ["argv..."]):
        return  # any of them
    if any(f"{name} ".startswith(" ".join([*own, ""])) for name in known):
        return  # a command's name, or the first word of several
    is_sweep = after[:2] == ["sweep", "run"]  # which decides whose values `launch render` takes
    try:
        with pytest.raises((Parsed, SystemExit)):
            main._dispatch([*own, "--", *after] if is_sweep else own)
    except ConfigError as e:
        if not (abbreviated and re.search(r"^missing: |has no value", str(e))):
            raise
    if after:
        parse_words(after if is_sweep or own[:2] == ["launch", "local"] else ["train", *after])


@pytest.mark.parametrize(("path", "line"), COMMANDS, ids=[f"{a}: {b}"[:90] for a, b in COMMANDS])
def test_documented_command_is_parsed(parse, path, line):
    for words in expand(line):
        parse(words)


def test_flags_that_are_named_exist(flags):
    unknown = []
    for path in documents():
        if path.suffix != ".md":
            continue
        for span in spans(split(path.read_text(encoding="utf-8"))[0]):
            if match := re.match(r"--[\w.-]+", span):
                flag = match[0].rstrip(".")
                group = any(known.startswith(f"{flag}.") for known in flags)
                if flag not in flags and not group and not flag.startswith("--xla"):
                    unknown.append((path.name, flag))
    assert unknown == []
