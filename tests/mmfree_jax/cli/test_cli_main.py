"""The `mmfree` command: finding commands, exit codes, one-line errors."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from mmfree_jax.cli import main as main_module
from mmfree_jax.cli.main import commands, main, summary

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


def test_interrupt_and_bug(fake_commands, capsys):
    assert main(["stop"]) == 130
    assert "Traceback" not in capsys.readouterr().err
    with pytest.raises(RuntimeError, match="bug"):
        main(["bug"])


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
