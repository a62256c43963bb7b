"""Compiled programs are kept between starts, where the user has not said otherwise."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mmfree_jax.compiled_programs import default_folder, is_chosen, keep_programs

_PROGRAM = """
import os, sys
from mmfree_jax.compiled_programs import keep_programs
keep_programs(os.environ)
import jax
hits = []
jax.monitoring.register_event_listener(lambda name, **_: hits.append(name))
assert float(jax.jit(lambda x: (x * 3).sum())(jax.numpy.ones(5))) == 15
print(hits.count("/jax/compilation_cache/cache_hits"))
"""


def test_a_second_start_finds_the_programs_of_the_first(tmp_path):
    env = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
    env |= {"XDG_CACHE_HOME": str(tmp_path), "JAX_PLATFORMS": "cpu",
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1"}  # fmt: skip
    first, second = (
        subprocess.run([sys.executable, "-c", _PROGRAM], env=env, capture_output=True, text=True)
        for _ in range(2)
    )
    assert (first.stdout, first.stderr) == ("0\n", "")
    assert int(second.stdout) > 0
    assert second.stderr == ""
    (folder,) = (tmp_path / "mmfree_jax" / "compiled").iterdir()
    assert (folder / ".lockfile").exists(), "without the lock JAX does not bound the folder"


_TIMES = """
import os
from mmfree_jax.compiled_programs import keep_programs
keep_programs(os.environ)
import jax
print(jax.config.jax_persistent_cache_min_compile_time_secs)
"""


def test_jax_hears_from_which_time_on_programs_are_kept(tmp_path):
    env = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
    env |= {"XDG_CACHE_HOME": str(tmp_path), "JAX_PLATFORMS": "cpu"}
    ran = subprocess.run([sys.executable, "-c", _TIMES], env=env, capture_output=True, text=True)
    assert (ran.stdout, ran.stderr) == ("0.1\n", "")


@pytest.mark.parametrize(
    "environ",
    [
        {"JAX_COMPILATION_CACHE_DIR": "/elsewhere"},
        {"JAX_COMPILATION_CACHE_DIR": ""},
        {"JAX_ENABLE_COMPILATION_CACHE": "false"},
        {"XDG_CACHE_HOME": "/dev/null/nothing"},
        {"XDG_CACHE_HOME": "not/absolute"},
    ],
)
def test_what_the_user_says_is_left_as_it_is(environ):
    after = dict(environ)
    keep_programs(after)
    assert after == environ


def test_the_default_is_bounded_and_no_choice_of_the_user(tmp_path):
    environ = {"XDG_CACHE_HOME": str(tmp_path)}
    keep_programs(environ)
    folder = default_folder(environ)
    assert folder is not None
    assert folder.parent == tmp_path / "mmfree_jax" / "compiled"
    assert environ["JAX_COMPILATION_CACHE_DIR"] == str(folder)
    assert environ["JAX_COMPILATION_CACHE_MAX_SIZE"] == "4294967296"
    assert environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] == "0.1"
    chosen = {"XDG_CACHE_HOME": str(tmp_path), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "3"}
    keep_programs(chosen)
    assert chosen["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] == "3"
    assert not is_chosen(environ)
    assert not is_chosen({})
    assert is_chosen({"JAX_COMPILATION_CACHE_DIR": "/elsewhere"})
    assert not list(tmp_path.iterdir()), "JAX makes the folder with its first program"


def test_the_folder_is_below_the_home_otherwise(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = default_folder({})
    assert folder is not None
    assert folder.parent == Path(tmp_path, ".cache", "mmfree_jax", "compiled")
