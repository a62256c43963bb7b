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
