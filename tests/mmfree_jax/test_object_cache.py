"""Copies of what lies in buckets: bounded, whole, shared, and never taken from under a reader."""

import json
import signal
import subprocess
import sys
import threading

import pytest
from bucket_files import wait_for

from mmfree_jax.errors import OutputError
from mmfree_jax.object_cache import ObjectCache, cache_folder


def _fill(size, calls=None):
    def fill(folder):
        if calls is not None:
            calls.append(folder.name)
        (folder / "data").write_bytes(b"x" * size)

    return fill


def _use(cache, key, size=100, calls=None):
    with cache.use(key, size, key, _fill(size, calls)) as folder:
        return (folder / "data").read_bytes()


def _here(cache):
    return sorted(p.name for p in cache.folder.iterdir() if p.is_dir())


def test_what_was_used_longest_ago_goes_first(tmp_path):
    cache, calls = ObjectCache(tmp_path / "a" / "b", 300), []
    for key in ("one", "two", "three", "one", "four"):
        assert _use(cache, key, calls=calls) == b"x" * 100
    assert _here(cache) == ["four", "one", "three"]
    assert calls == ["one.part", "two.part", "three.part", "four.part"]
    assert json.loads((cache.folder / "one.json").read_text()) == {"bytes": 100, "what": "one"}


def test_what_is_in_use_stays_and_others_wait_for_it(tmp_path):
    cache = ObjectCache(tmp_path, 200)
    _use(cache, "later")
    with cache.use("held", 100, "held", _fill(100)) as held:
        _use(cache, "other")
        assert _here(cache) == ["held", "other"]
        waiting = threading.Thread(target=_use, args=(cache, "large", 200))
        waiting.start()
        wait_for(lambda: not (tmp_path / "other").exists())  # it goes, and is not enough
        assert (held / "data").read_bytes() == b"x" * 100
        assert waiting.is_alive()
    waiting.join()
    assert _here(cache) == ["large"]


def test_what_is_kept_stays(tmp_path):
    cache = ObjectCache(tmp_path, 200)
    kept = cache.keep("kept", 100, "kept", _fill(100))
    for key in ("a", "b", "c"):
        _use(cache, key)
    assert (kept / "data").read_bytes() == b"x" * 100
    assert _here(cache) == ["c", "kept"]


def test_an_entry_that_cannot_be_fetched_is_not_there_and_takes_no_room(tmp_path):
    cache = ObjectCache(tmp_path, 100)

    def fail(folder):
        (folder / "data").write_bytes(b"half")
        raise OutputError("no")

    for _ in range(2):
        with pytest.raises(OutputError, match="no"), cache.use("a", 100, "a", fail):
            pass
    assert _here(cache) == []
    assert _use(cache, "a") == b"x" * 100


def test_an_entry_beyond_the_limit_is_refused_in_one_line(tmp_path):
    cache = ObjectCache(tmp_path, 2**29, "data.cache_gib")
    wanted = "gs://b/x takes 1 GiB, more than the 0.5 GiB .* set data.cache_gib to more"
    with pytest.raises(OutputError, match=wanted), cache.use("a", 2**30, "gs://b/x", _fill(1)):
        pass


def test_a_full_disk_is_one_line(full_disk):
    cache = ObjectCache(full_disk / "c", 2**30)
    wanted = "cannot be written .*No space left.*: make room there, or set MMFREE_CACHE"
    with pytest.raises(OutputError, match=wanted), cache.use("a", 2**20, "a", _fill(2**20)):
        pass
    assert _here(cache) == []


_PROGRAM = """
import os, signal, sys
from pathlib import Path
from mmfree_jax.object_cache import ObjectCache
"""
_KILLED = f"""{_PROGRAM}
def die(beside):
    (beside / "data").write_bytes(b"half")
    os.kill(os.getpid(), signal.SIGKILL)
with ObjectCache(Path(sys.argv[1]), 100).use("a", 100, "a", die): pass
"""
_MANY = f"""{_PROGRAM}
cache = ObjectCache(Path(sys.argv[1]), 300)
for i in range(60):
    size = 50 + i * int(sys.argv[2]) % 5 * 10
    with cache.use(str(size), size, "", lambda f: (f / "data").write_bytes(b"x" * size)) as folder:
        assert (folder / "data").read_bytes() == b"x" * size
"""


def _run(program, folder, seed=1):
    return subprocess.Popen([sys.executable, "-c", program, str(folder), str(seed)])


def test_what_a_killed_process_left_goes(tmp_path):
    assert _run(_KILLED, tmp_path).wait() == -signal.SIGKILL
    cache = ObjectCache(tmp_path, 100)
    assert _here(cache) == ["a.part"]
    assert _use(cache, "b") == b"x" * 100
    assert _here(cache) == ["b"]


def test_processes_share_it_without_tearing(tmp_path):
    children = [_run(_MANY, tmp_path, seed) for seed in (1, 2, 3)]
    assert [child.wait() for child in children] == [0, 0, 0]
    here = _here(ObjectCache(tmp_path, 300))
    assert 0 < sum((tmp_path / key / "data").stat().st_size for key in here) <= 300


def test_the_folder_is_that_of_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("MMFREE_CACHE", str(tmp_path / "x"))
    assert cache_folder() == tmp_path / "x"
    monkeypatch.delenv("MMFREE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "mmfree_jax" / "objects"
    monkeypatch.setenv("XDG_CACHE_HOME", "not/absolute")
    with pytest.raises(OutputError, match="have no place, for there is no home"):
        cache_folder()
