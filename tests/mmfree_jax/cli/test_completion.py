"""Completion of `mmfree` in the shells themselves, each where it is installed."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mmfree_jax.cli.main import main

# Prints what the shell offers at the end of the line in $LINE.
ASK = {
    "bash": """
        source "$SCRIPT"
        read -ra COMP_WORDS <<<"$LINE"
        [[ $LINE == *' ' ]] && COMP_WORDS+=("")
        COMP_CWORD=$((${#COMP_WORDS[@]} - 1))
        _mmfree
        printf '%s\\n' "${COMPREPLY[@]}"
    """,
    "fish": 'source $SCRIPT; complete --do-complete "$LINE"',
    # Its completion runs in an editor of lines alone: what it would add is written down instead.
    "zsh": """
        compdef() { }
        compadd() { [[ $1 == -a ]] && print -rl -- ${(P)2}; }
        _describe() { print -rl -- ${${(P)2}%%:*}; }
        _files() { print -r -- FILES; }
        source "$SCRIPT"
        words=(${(z)LINE}); [[ $LINE == *' ' ]] && words+=("")
        CURRENT=$#words
        _mmfree
    """,
}


@pytest.fixture(params=list(ASK))
def offered(request, tmp_path, capsys):
    """What a shell offers behind a line, as a set; a tab and a description are left out."""
    shell = request.param
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    assert main(["completion", shell]) == 0
    script = tmp_path / "script"
    script.write_text(capsys.readouterr().out)
    program = tmp_path / "bin" / "mmfree"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m mmfree_jax "$@"\n')
    program.chmod(0o755)
    options = {"bash": ["--norc"], "zsh": ["-f"], "fish": ["--no-config"]}[shell]

    def ask(line: str) -> set[str]:
        env = os.environ | {
            "PATH": f"{program.parent}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(Path(__file__).resolve().parents[3]),
            "HOME": str(tmp_path),
            "SCRIPT": str(script),
            "LINE": line,
        }
        done = subprocess.run(
            [shell, *options, "-c", ASK[shell]],
            env=env, capture_output=True, text=True, cwd=tmp_path, timeout=300,
        )  # fmt: skip
        assert done.stderr == ""
        return {text.partition("\t")[0].strip() for text in done.stdout.splitlines()}

    return ask


def test_commands_options_and_values_are_offered(offered):
    assert {"train", "data", "eval"} <= offered("mmfree ")
    assert {"train"} <= offered("mmfree tr")
    assert {"prepare", "inspect"} <= offered("mmfree data ")
    assert {"--metrics", "--log-x"} <= offered("mmfree plot --")
    assert {"steps", "tokens", "flops", "time"} <= offered("mmfree plot --x ")
    assert "--optimizer.learning-rate" in offered("mmfree train --optimizer.l")


def test_a_shell_that_is_not_known_is_refused(capsys):
    assert main(["completion", "csh"]) == 2
    assert "csh" in capsys.readouterr().err
