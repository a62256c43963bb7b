"""The `mmfree` command: finding commands, exit codes, one-line errors."""

import importlib
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from mmfree_jax.cli import main as main_module
from mmfree_jax.cli.main import commands, main, summary
from mmfree_jax.installed import own_version

ROOT = Path(__file__).parents[3]


@pytest.fixture
def fake_commands(monkeypatch, tmp_path):
    """Commands in a module of the test's own."""
    (tmp_path / "fake_commands.py").write_text(
        '"""Fake."""\n'
        "from mmfree_jax.errors import DataError\n"
        "def typed(name: str, count: int = 1, *, loud: bool = False) -> int:\n"
        '    """Say a name.\n\n    Args:\n        name: Whom to greet.\n    """\n'
        "    print(name * count, loud)\n"
        "    return count\n"
        "def raw(argv):\n"
        '    """Take the arguments as they are."""\n'
        "    print(argv)\n"
        "def bad(argv):\n"
        '    """Fail."""\n'
        '    raise DataError("file x is\\nbroken: mend it")\n'
        "def stopped(argv):\n"
        '    """Stop."""\n'
        "    raise KeyboardInterrupt\n"
        "def bug(argv):\n"
        '    """Be wrong."""\n'
        '    raise RuntimeError("bug")\n'
        "def full(argv):\n"
        '    """Fill the disk."""\n'
        '    raise OSError(28, "No space left on device", "x/y")\n'
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    names = {
        "typed": "typed",
        "two words": "raw",
        "two lords": "bad",
        "stop": "stopped",
        "bug": "bug",
        "full": "full",
    }
    table = {name: f"fake_commands:{function}" for name, function in names.items()}
    monkeypatch.setattr(main_module, "commands", lambda: table)
    yield table
    sys.modules.pop("fake_commands", None)


def test_help_lists_commands_with_their_first_line(fake_commands, capsys):
    for argv in ([], ["--help"], ["help"]):
        assert main(argv) == 0
        out = capsys.readouterr().out
        assert "typed      Say a name." in out
        assert "two words  Take the arguments as they are." in out
    assert "fake_commands" not in sys.modules


def test_a_full_disk_is_one_line(fake_commands, capsys):
    assert main(["full"]) == 2
    assert capsys.readouterr().err == (
        "mmfree: error: x/y: No space left on device: make room or choose another place\n"
    )


def test_a_group_lists_its_commands(fake_commands, capsys):
    assert main(["two"]) == 0
    out = capsys.readouterr().out
    assert "two words" in out
    assert "typed" not in out


def test_typed_commands_get_flags(fake_commands, capsys):
    assert main(["typed", "--name", "ab", "--count", "2", "--loud"]) == 2
    assert capsys.readouterr().out == "abab True\n"
    assert main(["typed", "--help"]) == 0
    assert "Whom to greet." in capsys.readouterr().out


def test_argv_commands_get_the_rest(fake_commands, capsys):
    assert main(["two", "words", "--a", "b"]) == 0
    assert capsys.readouterr().out == "['--a', 'b']\n"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["two", "lords"], "file x is broken: mend it"),
        (["typd"], "unknown command 'typd': did you mean 'typed'?"),
        (["two", "wrods"], "did you mean 'two words'"),
        (["zzz"], "see mmfree --help"),
        (["--zzz"], "unknown option '--zzz'"),
        (["typed", "--name", "x", "--nmae", "y"], "--nmae.*--name"),
        (["typed", "--name", "x", "--count", "many"], "--count.*'many'.*typed --help"),
        (["typed"], "name"),
    ],
)
def test_errors_are_one_line_and_exit_code_2(fake_commands, capsys, argv, message):
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("mmfree: error: ")
    assert err.count("\n") == 1
    assert re.search(message, err), err


def test_an_interrupt_is_no_fault(fake_commands, capsys):
    assert main(["stop"]) == 130
    assert capsys.readouterr().err == "mmfree: interrupted\n"


@pytest.fixture
def temporary(monkeypatch, tmp_path):
    """Where tracebacks are kept."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def test_a_fault_of_ours_is_one_line_that_asks_for_a_report(fake_commands, temporary, capsys):
    assert main(["bug", "--path", "a b", "--text", "x\ny"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    (kept,) = temporary.iterdir()
    assert err == (
        "mmfree: unexpected error in `mmfree bug --path 'a b' --text 'x y'`: RuntimeError: bug: "
        f"this is a fault of mmfree {own_version()}: please report this line with the traceback, "
        f"which --debug shows and {kept} keeps\n"
    )
    assert kept.read_text().startswith("Traceback (most recent call last):")
    assert 'raise RuntimeError("bug")' in kept.read_text()


@pytest.mark.parametrize("argv", [["--debug", "bug"], ["bug", "--debug"], ["bug", "-x", "--debug"]])
def test_debug_shows_the_traceback(fake_commands, temporary, capsys, argv):
    assert main(argv) == 2
    err = capsys.readouterr().err
    assert err.startswith("Traceback (most recent call last):")
    assert "mmfree: unexpected error in `mmfree bug" in err.splitlines()[-1]


def test_debug_shows_where_a_users_error_arose_too(fake_commands, capsys, monkeypatch):
    monkeypatch.setenv("MMFREE_DEBUG", "1")
    assert main(["two", "lords"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("Traceback (most recent call last):")
    assert err.splitlines()[-1] == "mmfree: error: file x is broken: mend it"


def test_debug_behind_two_dashes_is_another_commands(fake_commands, capsys):
    assert main(["two", "words", "--debug", "--", "train", "--debug"]) == 0
    assert capsys.readouterr().out == "['--', 'train', '--debug']\n"


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (
            "MemoryError('Unable to allocate 16.0 GiB')",
            "mmfree: error: `mmfree bug` needs more memory than there is (MemoryError: Unable to "
            "allocate 16.0 GiB): lower its sizes, or take a larger machine",
        ),
        (
            "OSError(36, 'File name too long', 'xxx')",
            "mmfree: error: xxx: File name too long: give another path",
        ),
    ],
)
def test_what_the_machine_lacks_is_no_fault_of_ours(fake_commands, capsys, error, line):
    module = sys.modules.setdefault("fake_commands", importlib.import_module("fake_commands"))
    exec(f"def bug(argv):\n    raise {error}", vars(module))
    assert main(["bug"]) == 2
    assert capsys.readouterr().err == line + "\n"


def test_a_long_message_keeps_its_beginning_and_its_end(fake_commands, capsys):
    module = importlib.import_module("fake_commands")
    code = "def bug(argv):\n    raise DataError('file x: ' + 'a' * 10**8 + ': mend it')"
    exec(code, vars(module))
    assert main(["bug"]) == 2
    err = capsys.readouterr().err
    assert len(err) < 1100
    assert err.startswith("mmfree: error: file x: aaa")
    assert err.endswith("aaa: mend it\n")


def test_what_would_change_the_terminal_is_written_out(fake_commands, capsys):
    assert main(["typd\x1b[2J\u202e"]) == 2
    err = capsys.readouterr().err
    assert "typd\\x1b[2J\\u202e" in err
    assert "\x1b" not in err


def test_bytes_that_are_not_utf_8_are_refused_by_name(fake_commands, capsys):
    assert main(["typed", "--name", os.fsdecode(b"gr\xfcn")]) == 2
    assert capsys.readouterr().err == (
        "mmfree: error: argument b'gr\\xfcn' is not UTF-8: give it in UTF-8; rename the file if it "
        "is one's name\n"
    )


def test_an_error_beside_help_is_one_line(fake_commands, capsys):
    assert main(["typed", "--nmae", "x", "--help"]) in (0, 2)
    assert main(["typed", "--name", "--count", "2", "--help"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("mmfree: error: ")
    assert err.count("\n") == 1


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.split()[0] == "mmfree"


def test_the_project_declares_its_commands():
    known = commands()
    assert {"train", "plot", "info", "generate", "data prepare", "tokenizer train"} <= known.keys()
    for name in ("train", "plot", "info"):
        assert summary(known[name]).endswith(".")


def _python(*args, **kwargs):
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, *args], env=env, text=True, timeout=60, **kwargs)


def test_help_does_not_start_jax():
    code = (
        "import sys; from mmfree_jax.cli.main import main; "
        "[main(a) for a in (['--help'], ['train', '--help'], ['plot', '--help'], ['info', '-h'])]; "
        "sys.exit('jax' in sys.modules)"
    )
    result = _python("-c", code, capture_output=True)
    assert result.returncode == 0, result.stderr
    assert "--model.hidden-size" in result.stdout


def test_a_closed_pipe_is_quiet():
    command = f'"{sys.executable}" -m mmfree_jax info --preset 370M --json | head -1'
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        command, shell=True, env=env, text=True, capture_output=True, timeout=60
    )
    assert result.stdout == "{\n"
    assert result.stderr == ""
