"""The `mmfree` command: finds the subcommands, runs one, and turns errors into one line.

A subcommand is a function that a package declares as an entry point in the group
`mmfree.commands`; its name may have two words ("data prepare"). If its only parameter is
`argv`, it gets the remaining arguments; otherwise tyro derives flags from its signature. It
returns an exit code, or None for 0. Nothing is imported before it is needed: even the list of
commands is made from the sources.

Exit codes: 0 done, 2 not done (one line on standard error, which says what to put right or, for
a fault of ours, how to report it), 130 interrupted from the keyboard, 143 ended by SIGTERM.
`--debug`, anywhere before a --, prints the error's traceback too, and so does $MMFREE_DEBUG.
"""

import ast
import contextlib
import difflib
import importlib.util
import inspect
import io
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from mmfree_jax.cli.parse import parse
from mmfree_jax.compiled_programs import begin_command, keep_programs
from mmfree_jax.error_line import say
from mmfree_jax.errors import ConfigError
from mmfree_jax.installed import entry_points, load, own_version

GROUP = "mmfree.commands"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `mmfree` with `argv` (default: the process's) and returns its exit code."""
    if argv is None:  # this is the command, and no caller's process
        begin_command()
        keep_programs(os.environ)
    argv, debug = _take_debug(list(sys.argv[1:] if argv is None else argv))
    if isinstance(sys.stdout, io.TextIOWrapper):  # a name in another encoding can be printed too
        sys.stdout.reconfigure(errors="backslashreplace")
    code = 0
    try:
        _check_text(argv)
        code = _dispatch(argv)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        print("mmfree: interrupted", file=sys.stderr)
        return 130
    except SystemExit as e:  # --help
        return e.code if isinstance(e.code, int) else int(e.code is not None)
    except BrokenPipeError:
        # The reader has gone (`mmfree info | head`); keep the interpreter's last flush quiet.
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return code
    except Exception as e:
        say(e, argv, debug=debug)
        return 2


def _take_debug(argv: list[str]) -> tuple[list[str], bool]:
    """The arguments without `--debug`, and whether it was there; what follows -- is another's."""
    end = argv.index("--") if "--" in argv else len(argv)
    own = [argument for argument in argv[:end] if argument != "--debug"]
    return own + argv[end:], len(own) < end


def _check_text(argv: list[str]) -> None:
    """Refuses bytes that are no text: configurations and results, which are UTF-8, name them."""
    for argument in argv:
        try:
            argument.encode()
        except UnicodeEncodeError:
            raise ConfigError(
                f"argument {os.fsencode(argument)!r} is not UTF-8: give it in UTF-8; rename the "
                "file if it is one's name"
            ) from None


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
            "mmfree COMMAND --help explains each option; mmfree --version prints the version;",
            "--debug, behind any command, shows the traceback of an error.",
        ]
    )


def summary(target: str) -> str:
    """First line of a command's docstring, read from its source without importing it."""
    module_name, _, function_name = target.partition(":")
    try:
        spec = importlib.util.find_spec(module_name)
    except ModuleNotFoundError:
        spec = None
    except Exception as e:  # of the package that the command is in; the others still work
        return f"(cannot be imported: {type(e).__name__})"
    if spec is None or spec.origin is None:
        return "(not installed)"
    tree = ast.parse(Path(spec.origin).read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and node.name == function_name:
            return (ast.get_docstring(node) or "").partition("\n")[0]
    return ""
