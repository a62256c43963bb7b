"""Packed models in several files: the same tensors, and refusal of parts that do not belong."""

import dataclasses
import shutil

import numpy as np
import pytest
from small_packed_model import BASE, build

from mmfree_jax.cli.main import main
from mmfree_jax.errors import CheckpointError, ConfigError, OutputError
from mmfree_jax.model.parameters import flatten
from mmfree_jax.saved.kinds import PACKED_FILE
from mmfree_jax.saved.model_folder import write_model
from mmfree_jax.saved.open_model import open_model
from mmfree_jax.saved.pack import write_packed
from mmfree_jax.saved.packed import StreamAgreement, open_packed, packed_files, record_agreement

# Tensors of up to 200 * 80 * 4 bytes, and a header of 32 KiB kept free in each file.
CONFIG = dataclasses.replace(
    BASE, hidden_size=80, intermediate_size=320, vocab_size=200, num_layers=4
)
LARGEST = 110_000


def _write(out, config=CONFIG, **options):
    out.mkdir()
    leaf = flatten(build(config)[1]).__getitem__
    return write_packed(out / PACKED_FILE, config, leaf, embedding="float32", **options)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("split")
    _write(root / "one")
    _write(root / "several", max_bytes=LARGEST)
    return root


def test_split_tensors_are_those_of_one_file(folders):
    one, several = (open_packed(folders / name).reader for name in ("one", "several"))
    assert (one.version, several.version) == (1, 2)
    assert sorted(one.names()) == sorted(several.names())
    for name in one.names():
        assert name in several
        np.testing.assert_array_equal(one.read(name), several.read(name))
    files = packed_files(folders / "several")
    assert sorted(files) == sorted((folders / "several").iterdir())
    assert len(files) > 2
    assert max(file.stat().st_size for file in files) <= LARGEST
    assert packed_files(folders / "one") == [folders / "one" / PACKED_FILE]


def test_a_split_model_opens_as_any_other_and_keeps_its_agreement(folders, tmp_path):
    shutil.copytree(folders / "several", tmp_path / "m")
    agreement = StreamAgreement(4, (4, 2), "two prompts")
    record_agreement(tmp_path / "m" / PACKED_FILE, agreement)
    assert open_packed(tmp_path / "m").agreement == agreement
    assert max(file.stat().st_size for file in packed_files(tmp_path / "m")) <= LARGEST
    found, want = (open_model(f).weights("ternary") for f in (tmp_path / "m", folders / "one"))
    for (name, a), b in zip(
        flatten(found.ternary).items(), flatten(want.ternary).values(), strict=True
    ):
        np.testing.assert_array_equal(a, b, err_msg=name)


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lambda part: part.unlink(), "No such file or directory; give a readable file"),
        (lambda part: part.write_bytes(part.read_bytes()[:-1]), "truncated or damaged"),
        (
            lambda part: shutil.copyfile(*part.parent.glob("packed-00003-*"), part),
            "is not the part that packed.safetensors was written with: copy all files",
        ),
    ],
    ids=["missing", "cut", "exchanged"],
)
def test_parts_that_do_not_belong_are_named(folders, tmp_path, damage, named):
    shutil.copytree(folders / "several", tmp_path / "m")
    (part,) = (tmp_path / "m").glob("packed-00002-*")
    damage(part)
    with pytest.raises(CheckpointError) as error:
        open_model(tmp_path / "m")
    assert named in str(error.value)
    assert part.name in str(error.value)


def test_a_changed_tensor_of_a_part_is_found(folders, tmp_path):
    shutil.copytree(folders / "several", tmp_path / "m")
    (part,) = (tmp_path / "m").glob("packed-00002-*")
    data = bytearray(part.read_bytes())
    data[-1] ^= 1
    part.write_bytes(data)
    with pytest.raises(CheckpointError, match="does not match its checksum"):
        open_model(tmp_path / "m").weights("ternary")


def test_a_tensor_larger_than_a_file_is_refused_with_what_it_takes(tmp_path):
    with pytest.raises(ConfigError) as error:
        _write(tmp_path / "m", max_bytes=60_000)
    # 200 rows of 80 in float32, an entry of the header and what is kept free for the rest of it.
    assert str(error.value) == (
        "max_file_mb is 0.06: embedding/weight alone has 0.1 MB; set --max-file-mb 0.2 or "
        "more, or a smaller --embedding"
    )
    assert list((tmp_path / "m").iterdir()) == []


def test_a_failed_write_leaves_no_part(tmp_path):
    def leaf(name):
        if name.startswith("head"):
            raise OSError(28, "No space left on device")
        return flatten(build(CONFIG)[1])[name]

    with pytest.raises(OutputError, match="No space left"):
        write_packed(tmp_path / PACKED_FILE, CONFIG, leaf, embedding="float32", max_bytes=LARGEST)
    assert list(tmp_path.iterdir()) == []


def test_the_commands_write_and_read_split_models_from_any_folder(tmp_path, monkeypatch, capsys):
    write_model(tmp_path / "model", CONFIG, build(CONFIG)[1])
    argv = ["pack", "--model", str(tmp_path / "model"), "--out", str(tmp_path / "packed")]
    argv += ["--agreement-prompts", "1", "--agreement-tokens", "4", "--embedding", "float32"]
    assert main([*argv, "--max-file-mb", "0.11"]) == 0
    assert "1 of 1 prompts" in capsys.readouterr().out
    assert len(packed_files(tmp_path / "packed")) > 1
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    saved = open_model("../packed")
    assert saved.kind == "packed"
    assert saved.config.vocab_size == 200
