"""YAML that somebody wrote by hand: nothing in it may vanish."""

import os
import re
from pathlib import Path

import pytest

from mmfree_jax.config import TrainConfig
from mmfree_jax.config_io import from_dict, parse_yaml, read_settings, read_yaml, with_settings
from mmfree_jax.errors import ConfigError

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("text", "key", "lines"),
    [
        ("optimizer: {learning_rate: 1.0e-3}\nsteps: 5\noptimizer: {}\n", "'optimizer'", (1, 3)),
        ("model:\n  width: 1\n  depth: 2\n  width: 3\n", "'width'", (2, 4)),
        ("- {a: 1, a: 1}\n", "'a'", (1, 1)),
        ("a: 1\n'a': 2\n", "'a'", (1, 2)),
        ("10: 1\n0xA: 2\n", "10", (1, 2)),
        ("base: &b {k: 1}\nx:\n  <<: *b\n  m: 1\n  m: 2\n", "'m'", (4, 5)),
    ],
)
def test_a_key_that_occurs_twice_is_refused(text, key, lines):
    with pytest.raises(ConfigError, match=f"key {key} occurs twice, in lines {lines[0]} and "
                       f"{lines[1]}: keep one"):  # fmt: skip
        parse_yaml(text, "a.yaml")


@pytest.mark.parametrize("text", ["steps: 010", "a: [-017]", "steps: 1:30", "rate: 1:30.5"])
def test_a_number_that_yaml_takes_for_another_is_refused(text):
    digits = text.split()[-1].strip("[]")
    with pytest.raises(
        ConfigError, match=f"{digits} in line 1 is -?[\\d.]+ in YAML, .*: write it "
    ):
        parse_yaml(text, "a.yaml")


def test_other_notations_are_the_numbers_that_they_read_as():
    text = "[00, -0, 07, 1_000, 0x10, '010', '1:30', 1_0.5, 0.5, -0.0]"
    assert parse_yaml(text, "") == [0, 0, 7, 1000, 16, "010", "1:30", 10.5, 0.5, 0.0]


def test_a_flag_s_name_as_a_key_is_told_its_section():
    with pytest.raises(
        ConfigError, match="write learning_rate indented in a line below optimizer:"
    ):
        from_dict(TrainConfig, {"optimizer.learning-rate": 1e-3})


def test_merging_is_no_repetition():
    text = "a: &a {x: 1, y: 2}\nb: &b\n  <<: *a\n  x: 3\nc:\n  <<: *b\n  x: 4\n  z: 5\n"
    assert parse_yaml(text, "") == {
        "a": {"x": 1, "y": 2},
        "b": {"x": 3, "y": 2},
        "c": {"x": 4, "y": 2, "z": 5},
    }
    assert parse_yaml("a: &a {x: 1}\nb: &b {y: 2}\nc: {<<: [*a, *b], x: 7}", "")["c"] == {
        "x": 7,
        "y": 2,
    }


def test_the_same_field_in_two_spellings_is_refused():
    with pytest.raises(ConfigError, match=r"'optimizer\.learning_rate' occurs twice"):
        from_dict(TrainConfig, {"optimizer": {"learning-rate": 1.0, "learning_rate": 2.0}})


@pytest.mark.parametrize("text", ["a: 2024-13-01\n", "a: [\n", "[" * 5000, "a: 1\n--- \nb: 2\n"])
def test_what_is_no_yaml_is_one_line(text):
    with pytest.raises(ConfigError, match=r"f\.yaml is not valid YAML") as error:
        parse_yaml(text, "f.yaml")
    assert "\n" not in str(error.value)


BOMB = "a0: &a0 [lol, lol]\n" + "".join(
    f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}, *a{i - 1}]\n" for i in range(1, 15)
)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (BOMB, "its aliases stand for more than 1,000,000 values"),
        ("a: &a [1, *a]\n", "an alias stands for itself"),
        ("a: &a {b: {c: *a}}\n", "an alias stands for itself"),
        ("[" * 102 + "]" * 102, "nested more than 100 deep"),
        ("[" * 100_000 + "]" * 100_000, "nested more than 100 deep"),
        # Sixty levels, and sixty more where the alias stands.
        (f"a: &a {'[' * 60}{']' * 60}\nb: {'[' * 60}*a {']' * 60}\n", "nested more than 100 deep"),
        (f"steps: {10**400}\n", "a whole number of 401 digits in line 1"),
        (f"steps: {'1' * 5000}\n", "a whole number of 5000 digits in line 1"),
        ('a: "x\\ud800"\n', r"'\\ud800' is half of a surrogate pair"),
        ('a: 1\nrun_dir: "x\\0y"\n', "a NUL in a string in line 2"),
    ],
)
def test_what_no_field_holds_is_no_yaml(text, told):
    with pytest.raises(ConfigError, match=rf"f\.yaml is not valid YAML: .*{told}") as error:
        parse_yaml(text, "f.yaml")
    assert len(str(error.value)) < 300


def test_aliases_that_stand_for_little_are_read():
    text = "a: &a [1, 2]\nb: [*a, *a]\nc: " + "[" * 98 + "5" + "]" * 98
    value = parse_yaml(text, "f.yaml")
    assert value["b"] == [[1, 2], [1, 2]]
    assert parse_yaml(f"n: {10**38}", "")["n"] == 10**38


def test_messages_stay_short():
    for values in (
        {"steps": ["x"] * 10_000},
        {"steps": 10**39, "x" * 10_000: 1},
        {"run_dir": ["x" * 10_000]},
        {"log": {"progress": "x" * 10_000}},
        {"data": {"paths": "x" * 10_000}},
        {"optimizer": "x" * 10_000},
    ):
        with pytest.raises(ConfigError) as error:
            from_dict(TrainConfig, values)
        assert len(str(error.value)) < 700


def test_a_config_is_a_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path, told in (
        (tmp_path / "pipe", "a named pipe, not a file; give a readable YAML file"),
        ("/dev/zero", "a device, not a file; give a readable YAML file"),
    ):
        with pytest.raises(ConfigError, match=told):
            read_yaml(path)


def test_a_number_that_no_float_holds():
    with pytest.raises(
        ConfigError, match=r"optimizer\.learning_rate is 1000.*: give a value of type"
    ):
        from_dict(TrainConfig, {"optimizer": {"learning_rate": 10**400}})


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-be", "utf-32"])
def test_marks_before_a_yaml(encoding, tmp_path):
    file = tmp_path / "c.yaml"
    mark = "\ufeff" if encoding == "utf-16-be" else ""
    file.write_bytes((mark + "steps: 5\r\nrun_dir: é\r\n").encode(encoding))
    assert read_yaml(file) == {"steps": 5, "run_dir": "é"}
    assert with_settings(read_settings(file), file).steps == 5


def test_every_yaml_is_read_by_the_strict_loader():
    """PyYAML's own loaders keep the last of two keys; only config_io may call them."""
    roots = [REPOSITORY / name for name in ("mmfree_jax", "experiments", "launch")]
    files = [f for root in roots for f in root.rglob("*.py")]
    assert len(files) > 100
    call = re.compile(r"yaml\.(safe_load|load|full_load|unsafe_load)(_all)?\(")
    found = {f.relative_to(REPOSITORY).as_posix() for f in files if call.search(f.read_text())}
    assert found == {"mmfree_jax/config_io.py"}
