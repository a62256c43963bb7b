"""The `mmfree` command: finds the subcommands, runs one, and turns errors into one line.

A subcommand is a function that a package declares as an entry point in the group
`mmfree.commands`; its name may have two words ("data prepare"). If its only parameter is
`argv`, it gets the remaining arguments; otherwise tyro derives flags from its signature. It
returns an exit code, or None for 0. Nothing is imported before it is needed: even the list of
commands is made from the sources.

Exit codes: 0 done, 2 something the user can put right (one line on standard error, no
traceback), 130 interrupted from the keyboard, 143 ended by SIGTERM, 1 a bug.
"""

import ast
import contextlib
import difflib
import importlib.util
import inspect
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from mmfree_jax.cli.parse import parse
from mmfree_jax.errors import ConfigError, MMFreeError
from mmfree_jax.files import is_disk_error
from mmfree_jax.installed import entry_points, load, own_version
from mmfree_jax.pallas_kernels.errors import IntegerProductError

GROUP = "mmfree.commands"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `mmfree` with `argv` (default: the process's) and returns its exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        code = _dispatch(argv)
        sys.stdout.flush()
        return code
    except (MMFreeError, IntegerProductError) as e:
        print(f"mmfree: error: {' '.join(str(e).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("mmfree: interrupted", file=sys.stderr)
        return 130
    except SystemExit as e:  # --help
        return e.code if isinstance(e.code, int) else int(e.code is not None)
    except BrokenPipeError:
        # The reader has gone (`mmfree info | head`); keep the interpreter's last flush quiet.
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as e:
        if not is_disk_error(e):
            raise
        where = e.filename or "a file that this command writes or reads"
        print(
            f"mmfree: error: {where}: {e.strerror}: make room or choose another place",
            file=sys.stderr,
        )
        return 2


def commands() -> dict[str, str]:
    """Name of each subcommand and where it is: `module:function`."""
    return entry_points(GROUP)


def _dispatch(argv: list[str]) -> int:
    known = commands()
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(_usage(known))
        return 0
    if argv[0] in ("-V", "--version"):
        print(f"mmfree {own_version()}")
        return 0
    for words in (2, 1):
        name = " ".join(argv[:words])
        if len(argv) >= words and name in known:
            return _run(name, known[name], argv[words:])
    group = {name: value for name, value in known.items() if name.startswith(argv[0] + " ")}
    if group and argv[1:2] in ([], ["-h"], ["--help"]):
        print(_usage(group))
        return 0
    if argv[0].startswith("-"):
        raise ConfigError(f"unknown option {argv[0]!r}: name a command first; see mmfree --help")
    name = " ".join(argv[: 2 if group and len(argv) > 1 else 1])
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(map(repr, close))}?" if close else "see mmfree --help"
    raise ConfigError(f"unknown command {name!r}: {hint}")


def _run(name: str, target: str, argv: list[str]) -> int:
    function = load(target)
    if list(inspect.signature(function).parameters) == ["argv"]:
        code = function(argv)
    else:
        code = parse(function, argv, prog=f"mmfree {name}")
    return int(code or 0)


def _usage(known: dict[str, str]) -> str:
    width = max(map(len, known), default=0)
    lines = [f"  {name:<{width}}  {summary(target)}" for name, target in known.items()]
    return "\n".join(
        [
            "usage: mmfree COMMAND [OPTIONS]",
            "",
            "Train, study and deploy language models without matrix multiplication.",
            "",
            "commands:",
            *lines,
            "",
            "mmfree COMMAND --help explains each option; mmfree --version prints the version.",
        ]
    )


def summary(target: str) -> str:
    """First line of a command's docstring, read from its source without importing it."""
    module_name, _, function_name = target.partition(":")
    try:
        spec = importlib.util.find_spec(module_name)
    except ModuleNotFoundError:
        spec = None
    if spec is None or spec.origin is None:
        return "(not installed)"
    tree = ast.parse(Path(spec.origin).read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and node.name == function_name:
            return (ast.get_docstring(node) or "").partition("\n")[0]
    return ""
