"""The manifest of the tasks' data may be of any shape: what is damaged counts as absent."""

import json

import pytest

from mmfree_jax.evaluate import tasks
from mmfree_jax.files import sha256_file

NAME = sorted(tasks.PAPER_TASKS)[0]


@pytest.mark.parametrize(
    "damage",
    [
        "[]",
        '{"tasks": []}',
        '{"tasks": "piqa"}',
        json.dumps({"tasks": {NAME: 3}}),
        json.dumps({"tasks": {NAME: {"sha256": "x", "documents": "many"}}}),
        "{",
    ],
)
def test_a_damaged_manifest_is_none(tmp_path, damage):
    file = tmp_path / f"{NAME}.jsonl"
    file.write_text("{}\n")
    good = {"sha256": sha256_file(file), "documents": 1}
    (tmp_path / tasks.MANIFEST).write_text(json.dumps({"tasks": {NAME: good}}))
    assert tasks._present(tmp_path) == {NAME: 1}
    (tmp_path / tasks.MANIFEST).write_text(damage)
    assert tasks._present(tmp_path) == {}
    tasks._add_to_manifest(tmp_path, NAME, 1, "here")
    assert tasks._present(tmp_path) == {NAME: 1}


def test_fetched_data_lie_in_the_one_cache_and_are_found_where_they_lay(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("MMFREE_CACHE", raising=False)
    now, earlier = (tmp_path / ".cache" / name / "tasks" for name in ("mmfree_jax", "mmfree"))
    assert tasks.default_tasks_dir() == now
    earlier.mkdir(parents=True)
    assert tasks.default_tasks_dir() == earlier
    now.mkdir(parents=True)
    assert tasks.default_tasks_dir() == now
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    assert tasks.default_tasks_dir() == earlier
    (tmp_path / "caches" / "mmfree_jax" / "tasks").mkdir(parents=True)
    assert tasks.default_tasks_dir() == tmp_path / "caches" / "mmfree_jax" / "tasks"
    monkeypatch.setenv("MMFREE_CACHE", "~/elsewhere")
    assert tasks.default_tasks_dir() == tmp_path / "elsewhere" / "tasks"
