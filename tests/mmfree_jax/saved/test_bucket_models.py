"""Models in buckets are those of the folders they were copied from."""

import dataclasses

import numpy as np
import pytest
from bucket_files import do_not_wait, put_folder
from faulty_proxy import Fault
from small_packed_model import BASE, build

from mmfree_jax import fetched, storage
from mmfree_jax.cli.main import main
from mmfree_jax.data.tokenizer import ByteTokenizer
from mmfree_jax.errors import StorageError
from mmfree_jax.saved.open_model import open_model


@pytest.fixture
def model(save_model, tmp_path, monkeypatch):
    """A small model, in a folder of this machine."""
    monkeypatch.setenv("MMFREE_CACHE", str(tmp_path / "cache"))
    do_not_wait(monkeypatch)
    ByteTokenizer().save(tmp_path / "tokenizer")
    config = dataclasses.replace(BASE, vocab_size=ByteTokenizer.vocab_size)
    return save_model(tmp_path / "model", config, build(config)[1], tmp_path / "tokenizer")


def test_weights_and_tokenizer_are_those_of_the_folder_and_fetched_once(model, bucket):
    url = put_folder(model.path, f"{bucket.url}/models/my model")
    reads = rf"^GET /(download/\S*/)?{bucket.url[5:]}/.*safetensors"
    bucket.proxy.add(Fault(reads, 1, keep=100))
    for _ in range(2):
        there = open_model(url)
        assert str(there.path).endswith(f"{bucket.url[5:]}/models/my model")
        name = "blocks/glu/down_proj/weight"
        np.testing.assert_array_equal(there.leaf(name), model.leaf(name))
        assert there.tokenizer().sha256 == model.tokenizer().sha256
    assert len(bucket.proxy.requests(reads)) == 2  # the one that was cut short, and the other


@pytest.mark.parametrize("bucket", ["gcs"], indirect=True)
def test_a_model_in_a_bucket_is_packed(model, bucket, tmp_path):
    (model.path / "README.md").write_text("# m\n\n## Licence\n\nCC0\n")
    url = put_folder(model.path, f"{bucket.url}/m")
    for source, out in ((url, "there"), (str(model.path), "here")):
        argv = ["--model", source, "--out", str(tmp_path / out), "--agreement-prompts", "0"]
        assert main(["pack", *argv]) == 0
    packed = [(tmp_path / out / "packed.safetensors").read_bytes() for out in ("there", "here")]
    assert packed[0] == packed[1]
    for out in ("there", "here"):  # the card comes along
        assert (tmp_path / out / "SOURCE_README.md").read_text().endswith("CC0\n")


def test_what_cannot_be_opened_is_one_line(model, bucket):
    put_folder(model.path, f"{bucket.url}/half")
    mark = storage.parse_url(f"{bucket.url}/half/.mmfree-uploading.json")
    storage.write_bytes(mark, b"{}")
    for name, wanted in (
        ("half", "half is half written"),
        ("none", "none does not exist: nothing in the bucket begins so"),
    ):
        with pytest.raises(StorageError, match=wanted):
            open_model(f"{bucket.url}/{name}")


def test_what_is_written_anew_meanwhile_is_copied_again(model, gcs_bucket, monkeypatch):
    """The export is replaced, object by object, while it is read: never half of each."""
    url = put_folder(model.path, f"{gcs_bucket.url}/m")
    name = storage.parse_url(f"{url}/model.yaml")
    config, times = storage.read_bytes(name), []
    download = fetched.download

    def write_meanwhile(found, file):
        download(found, file)
        if found != name and times:
            storage.write_bytes(name, config + b"# " + str(times.pop()).encode())

    monkeypatch.setattr(fetched, "download", write_meanwhile)
    times[:] = [1, 2]
    assert (open_model(url).path / "model.yaml").read_bytes() == config + b"# 1"
    times[:] = range(100)
    storage.write_bytes(name, config)
    with pytest.raises(StorageError, match="m changes while it is read: wait until what writes"):
        open_model(url)


def _files(folder):
    """Name and contents of all files."""
    files = {p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p.is_file()}
    return {name: path.read_bytes() for name, path in files.items()}


@pytest.mark.parametrize(
    ("command", "options", "completes"),
    [
        ("pack --model {} --out", "--agreement-prompts 0", "packed"),
        ("export-hf {}", "", "config.json"),
        ("import-hf {}-hf", "", "model.yaml"),
        ("export onnx --model {} --out", "", "export.json"),
        ("export stablehlo --model {} --out", "", "export.json"),
        ("hardware compile --model {} --out", "--layer 0", "program.json"),
    ],
)
def test_what_commands_make_in_a_bucket_is_what_they_make_on_a_disk(
    model, s3_bucket, tmp_path, command, options, completes, capsys
):
    if "-hf" in command.split()[1]:
        assert main(["export-hf", str(model.path), f"{model.path}-hf"]) == 0
    for out in (f"{s3_bucket.url}/out", str(tmp_path / "out")):
        argv = [*command.format(model.path).split(), out, *options.split()]
        assert main(argv) == 0
        assert out in capsys.readouterr().out
    puts = [line.partition("?")[0] for line in s3_bucket.proxy.requests("^PUT /[^.]*/out/[^.]")]
    assert completes in puts[-1]
    there = fetched.local_copy(f"{s3_bucket.url}/out", "model")
    assert _files(there) == _files(tmp_path / "out")
