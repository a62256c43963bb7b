"""The manifest of a checkpoint: any change of it is found, and its step is the folder's name."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from mmfree_jax.saved.checkpoint import Checkpointer, restore_newest
from mmfree_jax.saved.manifest import DamagedCheckpointError, newest_manifest, read_manifest
from mmfree_jax.saved.run_model import find_checkpoint

METADATA = {
    "config": {"steps": 3},
    "data": {"fingerprints": ["a"], "tokens": [8], "paths": ["d"], "tokenizer": {"kind": "byte"}},
    "meter": {"window": {}, "skipped": 0, "skipped_in_a_row": 0},
    "seconds": 1.5,
}
STATE = {"w": jnp.ones((4, 3))}
OLD = Path(__file__).parent / "old/run/checkpoints"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Checkpoints of steps 90 and 98."""
    folder = tmp_path_factory.mktemp("run") / "checkpoints"
    checkpointer = Checkpointer(folder)
    for step in (90, 98):
        checkpointer.save(step, STATE, METADATA)
    checkpointer.wait()
    return folder


@pytest.fixture
def copy(saved, tmp_path):
    return Path(shutil.copytree(saved, tmp_path / "checkpoints"))


def change(folder, old, new, step=98):
    path = folder / str(step) / "manifest.json"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def abstract():
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return {"w": jax.ShapeDtypeStruct((4, 3), jnp.float32, sharding=device)}


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"step": 98', '"step": 99'),
        ('"step": 98', '"step": 90'),
        ('"step": 98', '"step": -8'),
        ('"step": 98', '"step": 98.5'),
        ('"skipped": 0', '"skipped": 1'),
        ('"format": 2', '"format": 1'),
        ('"format": 2', '"format": 3'),
        ('"sha256"', '"sha257"'),
        ('"tokens"', '"tokans"'),
    ],
)
def test_a_changed_character_falls_back_with_a_warning(copy, old, new):
    change(copy, old, new)
    with pytest.warns(UserWarning, match=rf"{copy}/98: manifest.json.*falling back"):
        restored = restore_newest(copy, abstract())
    assert restored is not None
    assert restored.step == 90
    assert restored.manifest.meter == METADATA["meter"]


def test_a_flipped_bit_anywhere_is_found_or_changes_nothing(copy):
    path = copy / "98" / "manifest.json"
    data, whole = path.read_bytes(), read_manifest(copy / "98")
    found = 0
    for at in range(0, len(data), 7):
        path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        try:
            same = read_manifest(copy / "98") == whole  # between tokens, say
        except DamagedCheckpointError:
            found += 1
        else:
            assert same
    assert found > 50


def test_a_folder_of_another_name_is_not_that_step(copy):
    (copy / "98").rename(copy / "99")
    with pytest.raises(DamagedCheckpointError, match="step is 98, but the folder's name 99"):
        read_manifest(copy / "99")


@pytest.fixture
def old(tmp_path):
    """A checkpoint of format 1, whose manifest has no digest, at two steps."""
    folder = tmp_path / "checkpoints"
    for step in (200, 300):
        shutil.copytree(OLD / "300", folder / str(step))
    change(folder, '"step": 300', '"step": 200', 200)
    return folder


def test_an_old_manifest_loads_and_its_step_is_checked(old):
    assert read_manifest(old / "300").step == 300
    change(old, '"step": 300', '"step": 200', 300)
    with pytest.raises(DamagedCheckpointError, match="step is 200, but the folder's name 300"):
        read_manifest(old / "300")


@pytest.mark.parametrize(
    "values",
    [
        {"format": "1"},
        {"format": True},
        {"step": "300"},
        {"step": None},
        {"files": []},
        {"files": {"a": 1}},
        {"files": {"a": ["x", "y"]}},
        {"leaves": None},
        {"leaves": {"a": [1]}},
        {"leaves": {"a": [3, "float32"]}},
        {"config": []},
        {"data": {}},
        {"data": 3},
        {"data": {"fingerprints": 3, "tokens": [], "paths": [], "tokenizer": {}}},
        {"meter": {"window": 1}},
        {"meter": "x"},
    ],
    ids=str,
)
def test_an_old_manifest_of_another_shape_is_passed_over(old, values):
    path = old / "300" / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    _passed_over(old)


@pytest.mark.parametrize("missing", ["format", "step", "config", "data", "leaves", "files"])
def test_an_old_manifest_with_a_part_missing_is_passed_over(old, missing):
    path = old / "300" / "manifest.json"
    values = json.loads(path.read_text())
    del values[missing]
    path.write_text(json.dumps(values))
    _passed_over(old)


@pytest.mark.parametrize("text", ["", "[]", "3", "null", "[" * 100_000, '"x"'])
def test_other_json_is_passed_over(old, text):
    (old / "300" / "manifest.json").write_text(text)
    _passed_over(old)


def _passed_over(folder):
    manifest = newest_manifest(folder)
    assert manifest is not None
    assert manifest.step == 200
    with pytest.warns(UserWarning, match=r"checkpoints/300.*falling back") as caught:
        assert find_checkpoint(folder.parent).name == "200"
    assert len(caught) == 1
    assert "\n" not in str(caught[0].message)


def test_a_checkpoint_without_a_manifest_is_named(copy):
    (copy / "98" / "manifest.json").unlink()
    with pytest.warns(UserWarning, match=r"98 has no manifest.json: its save did not finish"):
        restored = restore_newest(copy, abstract())
    assert restored is not None
    assert restored.step == 90
