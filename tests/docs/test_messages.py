"""What messages tell a user to do names the flag, as it is typed, and a value that it takes."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from mmfree_jax.cli.train import resolve_config
from mmfree_jax.config import TrainConfig
from mmfree_jax.config_io import to_dict
from mmfree_jax.errors import ConfigError
from mmfree_jax.model.parameters import flatten

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("mmfree_jax", "experiments", "launch")
OTHER_FILES = ("huggingface.py", "huggingface_fields.py")  # the settings are those of a file
OTHER_PROGRAMS = {"--version", "--array", "--long", "--rows"}  # sbatch, zstd and a script take them
OTHER_PROGRAMS |= {"--upgrade", "--force-reinstall"}  # and pip these
# srun, uv, and the daemons beside pods on Google's GPU hosts
OTHER_PROGRAMS |= {"--ntasks", "--python", "--verbose", "--num_hops", "--num_nics", "--uid"}
OTHER_PROGRAMS |= {"--alsologtostderr"}

SETTINGS = flatten(to_dict(TrainConfig()), separator=".")
NAMES = {name for path in SETTINGS for name in (path, path.split(".")[-1]) if set(name) & set("._")}
NAME = re.compile(rf"(?<![\w.-])({'|'.join(map(re.escape, sorted(NAMES, key=len)[::-1]))})\b")
ADVICE = re.compile(
    r"\b(set|give|choose|use|name|pass|lower|raise|reduce|increase|change|leave out|make|add|try"
    r"|smaller|larger|fewer|another)\b"
)
SWITCH = re.compile(r"\b(switch|turn)\w* \w*( it)? ?(off|on)\b|\bdisable|\bis (switched )?off\b")


def messages() -> Iterator[tuple[str, str]]:
    """Place and text of every string of several words that is no docstring; {} for a value."""
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            place = path.relative_to(ROOT)
            if path.is_relative_to(ROOT / package) and "node_modules" not in path.parts:
                for line, text in strings(path.read_text(encoding="utf-8")):
                    if " " in text:
                        yield f"{place}:{line}", text


def strings(source: str) -> Iterator[tuple[int, str]]:
    tree = ast.parse(source)
    skipped = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr):
            skipped.add(id(node.value))
        if isinstance(node, ast.JoinedStr):
            skipped |= {id(part) for part in node.values}
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.lineno, node.value
        elif isinstance(node, ast.JoinedStr):
            parts = (v.value if isinstance(v, ast.Constant) else "{}" for v in node.values)
            yield node.lineno, "".join(map(str, parts))


def unclear(text: str) -> list[str]:
    """What a message advises of settings without naming their flags."""
    found = [] if "--" in text else [match[0] for match in SWITCH.finditer(text)]
    for clause in re.split(r"[:;]|\bor\b", text):
        if advice := ADVICE.search(clause):
            rest = clause[advice.end() :]
            name = NAME.search(rest)
            if name and "--" not in rest[: name.start()]:
                found.append(f"{advice[0]}{rest[: name.end()]}")
    return found


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("run_dir x is taken: choose another run_dir", ["choose another run_dir"]),
        ("run_dir x is taken: give another --run-dir", []),
        ("no heldout split: prepare it again, or switch evaluation off", ["switch evaluation off"]),
        ("not finite; lower optimizer.learning_rate", ["lower optimizer.learning_rate"]),
        ("grad_accum is 3: set --grad-accum to a divisor of batch_size (8)", []),
        ("memory: raise grad_accum or mesh.fsdp", ["raise grad_accum"]),
    ],
)
def test_advice_without_a_flag_is_seen(text, expected):
    assert unclear(text) == expected


def test_messages_name_the_flag():
    found = [
        (place, advice)
        for place, text in messages()
        if Path(place.partition(":")[0]).name not in OTHER_FILES
        for advice in unclear(text)
    ]
    assert not found, "\n".join(map(str, found))


def test_flags_in_messages_exist_and_take_the_value(flags):
    wrong = []
    for place, text in messages():
        for flag, value in re.findall(r"(?<![\w-])(--[a-z][\w.-]*)(?: ([\w.]+))?", text):
            flag, value = flag.rstrip("."), value.rstrip(".")
            group = any(known.startswith(f"{flag}.") for known in flags)
            if flag not in flags | OTHER_PROGRAMS and not group and not flag.startswith("--xla"):
                wrong.append((place, flag))
            elif flag[2:].replace("-", "_") in SETTINGS and re.fullmatch(r"[\d.]+|full", value):
                try:
                    resolve_config([flag, value])
                except ConfigError as e:
                    wrong.append((place, str(e)))
    assert not wrong, "\n".join(map(str, wrong))
