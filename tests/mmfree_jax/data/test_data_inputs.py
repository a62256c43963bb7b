"""Which files an input means: splits, links, layouts of data set repositories, and the rest."""

import json
import os
from pathlib import Path, PurePath

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mmfree_jax.cli import data as data_cli
from mmfree_jax.data.inputs import find_inputs
from mmfree_jax.data.prepare import PrepareConfig, prepare_dataset
from mmfree_jax.data.splits import splits_by_name
from mmfree_jax.errors import ConfigError, DataError


def lay_out(folder: Path, *names: str) -> str:
    """Files of one document each, whose text is their name."""
    for name in names:
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        if file.suffix == ".parquet":
            pq.write_table(pa.table({"text": [name]}), file)
        elif file.suffix == ".jsonl":
            file.write_text(json.dumps({"text": name}) + "\n")
        else:
            file.write_text(name)
    return str(folder)


def find(*inputs: str, splits=None):
    """Names of the files found in one folder, and of those left out by the reason."""
    found = find_inputs(inputs, splits=splits)
    root = Path(inputs[0])
    files = [f.path.relative_to(root).as_posix() for f in found.files]
    return files, {s.why: list(s.first) for s in found.readings[0].skipped}


SHARDS = ("train-00000-of-00002", "train-00001-of-00002", "validation-00000-of-00001",
          "test-00000-of-00001")  # fmt: skip


@pytest.mark.parametrize(
    ("names", "train", "left"),
    [
        (
            [f"data/{s}.parquet" for s in SHARDS],
            ["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet"],
            {
                "split test": ["data/test-00000-of-00001.parquet"],
                "split validation": ["data/validation-00000-of-00001.parquet"],
            },
        ),
        (
            ["train.jsonl", "valid.jsonl", "dev.jsonl", "test.jsonl", "eval.jsonl"],
            ["train.jsonl"],
            {
                "split validation": ["dev.jsonl", "valid.jsonl"],
                "split test": ["eval.jsonl", "test.jsonl"],
            },
        ),
        (
            ["data/train/a.jsonl", "data/train/sub/b.jsonl", "data/val/a.jsonl"],
            ["data/train/a.jsonl", "data/train/sub/b.jsonl"],
            {"split validation": ["data/val/a.jsonl"]},
        ),
        (  # configurations in folders of their own
            ["de/train-00000-of-00001.parquet", "de/test-00000-of-00001.parquet",
             "en/train-00000-of-00001.parquet"],
            ["de/train-00000-of-00001.parquet", "en/train-00000-of-00001.parquet"],
            {"split test": ["de/test-00000-of-00001.parquet"]},
        ),
        (
            ["wiki.train.txt", "wiki.test.txt", "wiki.valid.txt"],
            ["wiki.train.txt"],
            {"split test": ["wiki.test.txt"], "split validation": ["wiki.valid.txt"]},
        ),
        (  # shards of other names are splits too, where train and test are
            ["train-00000-of-00001.parquet", "test-00000-of-00001.parquet",
             "unsupervised-00000-of-00001.parquet"],
            ["train-00000-of-00001.parquet"],
            {
                "split test": ["test-00000-of-00001.parquet"],
                "split unsupervised": ["unsupervised-00000-of-00001.parquet"],
            },
        ),
        (
            ["corpus.jsonl", "test.jsonl", "val_01.jsonl"],
            ["corpus.jsonl"],
            {"split test": ["test.jsonl"], "split validation": ["val_01.jsonl"]},
        ),
        (
            ["extra.jsonl", "train.jsonl", "test.jsonl"],
            ["train.jsonl"],
            {"no split that its name says": ["extra.jsonl"], "split test": ["test.jsonl"]},
        ),
        (
            ["split=train/a.parquet", "split=test/a.parquet"],
            ["split=train/a.parquet"],
            {"split test": ["split=test/a.parquet"]},
        ),
        (
            ["train.jsonl", "heldout.jsonl"],
            ["train.jsonl"],
            {"split heldout": ["heldout.jsonl"]},
        ),
        # Texts whose names happen to hold such a word are no splits.
        (["a.txt", "driving-test.txt", "the-devil.txt"],
         ["a.txt", "driving-test.txt", "the-devil.txt"], {}),
        (["part-00000-of-00002.parquet", "part-00001-of-00002.parquet"],
         ["part-00000-of-00002.parquet", "part-00001-of-00002.parquet"], {}),
        (["train.jsonl", "more.jsonl"], ["more.jsonl", "train.jsonl"], {}),
    ],
)  # fmt: skip
def test_only_train_is_read_unless_told(names, train, left, tmp_path):
    root = lay_out(tmp_path / "test", *names)  # the folder's own name says nothing
    assert find(root) == (train, left)
    everything, rest = find(root, splits=["all"])
    assert (sorted(everything), rest) == (sorted(names), {})


def test_splits_can_be_named(tmp_path):
    root = lay_out(tmp_path, "train.jsonl", "dev.jsonl", "test.jsonl")
    for name in ("validation", "valid", "dev"):
        assert find(root, splits=[name])[0] == ["dev.jsonl"]
    assert find(root, splits=["test", "train"])[0] == ["test.jsonl", "train.jsonl"]
    with pytest.raises(DataError, match="holds the splits validation, test, train and not tests"):
        find(root, splits=["tests"])
    (tmp_path / "train.jsonl").unlink()
    with pytest.raises(DataError, match="holds the splits validation, test and not train: name"):
        find(root)
    # What is named itself, or by a pattern of its own, is what was asked for.
    assert find_inputs([f"{root}/test.jsonl"]).files[0].path.name == "test.jsonl"
    assert find_inputs([f"{root}/te*.jsonl"]).files[0].path.name == "test.jsonl"


def test_splits_of_an_unusual_name(tmp_path):
    names = [f"data/{s}-00000-of-00001.parquet" for s in ("train_sft", "test_sft", "train_gen")]
    root = lay_out(tmp_path, *names)
    with pytest.raises(DataError, match="holds the splits test_sft, train_gen, train_sft and not"):
        find(root)
    assert find(root, splits=["train_sft"])[0] == ["data/train_sft-00000-of-00001.parquet"]


def test_a_glob_over_several_splits(tmp_path):
    lay_out(tmp_path, "train.jsonl", "test.jsonl")
    found = find_inputs([f"{tmp_path}/*.jsonl"])
    assert [f.path.name for f in found.files] == ["train.jsonl"]
    assert found.readings[0].skipped[0].why == "split test"


def test_names_of_splits():
    said = {
        "c4-train.00000-of-01024.jsonl.gz": "train",
        "c4-validation.00000-of-00008.jsonl.gz": "validation",
        "TEST.jsonl": "test",
        "Training/x.jsonl": "train",
        "test1.jsonl": "test",
        "latest.jsonl": None,
        "contest/medieval.txt": None,
    }
    assert splits_by_name([PurePath(p) for p in said]) == {PurePath(p): s for p, s in said.items()}


README = """---
license: mit
configs:
- config_name: default
  data_files:
  - split: train
    path: ["one/*.parquet", "two/a.parquet"]
  - split: questions
    path: two/b.parquet
- config_name: sample
  data_files: sample/*
---
# Anything: [
"""


def test_a_readme_says_the_splits(tmp_path):
    names = ("one/a.parquet", "one/b.parquet", "two/a.parquet", "two/b.parquet", "two/c.parquet",
             "sample/x.parquet")  # fmt: skip
    root = lay_out(tmp_path, *names)
    (tmp_path / "README.md").write_text(README)
    files, left = find(root)
    assert files == ["one/a.parquet", "one/b.parquet", "two/a.parquet"]
    assert left == {
        "of a kind that is not read": ["README.md"],
        "subset sample": ["sample/x.parquet"],
        "not named in README.md": ["two/c.parquet"],
        "split questions": ["two/b.parquet"],
    }
    assert find(root, splits=["questions"])[0] == ["two/b.parquet"]
    (tmp_path / "README.md").write_text(README.replace("license: mit", "configs: []"))
    with pytest.raises(ConfigError, match=r"README\.md.* key 'configs' occurs twice"):
        find(root)


@pytest.mark.parametrize(
    "files",
    ["data_files: {train: t/*, test: e/*}", "data_files: [t/*, t]", "data_files: t/*.parquet"],
)
def test_forms_of_data_files(files, tmp_path):
    root = lay_out(tmp_path, "t/1.parquet", "e/2.parquet")
    (tmp_path / "README.md").write_text(f"---\r\nconfigs:\r\n- config_name: a\r\n  {files}\r\n---")
    assert find(root)[0] == ["t/1.parquet"]


def test_a_readme_without_configs_is_any_text(tmp_path):
    root = lay_out(tmp_path, "train.jsonl", "test.jsonl")
    for text in ("---\nnot: [yaml\n---\n", "configs:\n", "---\nconfigs: none\n---\n"):
        (tmp_path / "README.md").write_text(text)
        assert find(root)[0] == ["train.jsonl"]


def test_links_to_folders_are_followed_once(tmp_path):
    lay_out(tmp_path / "disk", "2.jsonl", "deep/3.jsonl")
    root = lay_out(tmp_path / "corpus", "1.jsonl", "sub/4.jsonl")
    (tmp_path / "corpus" / "more").symlink_to("../disk")
    (tmp_path / "corpus" / "sub" / "round").symlink_to(tmp_path / "corpus")
    (tmp_path / "disk" / "deep" / "up").symlink_to("..")
    (tmp_path / "corpus" / "z").symlink_to(tmp_path / "disk" / "deep")
    (tmp_path / "corpus" / "5.jsonl").symlink_to("1.jsonl")
    files, left = find(root)
    assert files == ["1.jsonl", "more/2.jsonl", "more/deep/3.jsonl", "sub/4.jsonl"]
    assert left == {"found before, under this name or another": ["5.jsonl"]}


def test_what_cannot_be_read_is_said(tmp_path):
    names = ("a.jsonl", "b.csv", "c.json", "sub/d.md", "e.pdf", ".hidden.jsonl", ".git/x.jsonl")
    root = lay_out(tmp_path, *names)
    (tmp_path / "lost").symlink_to("nowhere")
    os.mkfifo(tmp_path / "pipe.txt")
    _, left = find(root)
    assert left == {
        "hidden": [".hidden.jsonl"],
        "of a kind that is not read": ["b.csv", "c.json", "e.pdf"],  # the first three
        "a link to nothing": ["lost"],
        "no regular file": ["pipe.txt"],
    }
    reading = find_inputs([root]).readings[0]
    assert {s.why: s.files for s in reading.skipped}["of a kind that is not read"] == 4


def test_nothing_readable_is_an_error(tmp_path):
    root = lay_out(tmp_path, "b.csv", "c.json")
    for given in (root, f"{root}/*"):
        with pytest.raises(
            DataError, match=r"no readable file \(it has b\.csv, c\.json: of a kind"
        ):
            find_inputs([given])
    with pytest.raises(DataError, match="no readable file: known are"):
        find_inputs([lay_out(tmp_path / "empty", "sub/.x") + "/sub/*"])


def test_a_folder_that_cannot_be_listed_is_an_error(tmp_path, monkeypatch):
    root = lay_out(tmp_path, "a.jsonl", "sub/b.jsonl")
    listed = Path.iterdir

    def iterdir(self):
        if self.name == "sub":
            raise PermissionError(13, "Permission denied")
        return listed(self)

    monkeypatch.setattr(Path, "iterdir", iterdir)
    with pytest.raises(DataError, match="sub: Permission denied"):
        find_inputs([root])


def test_a_saved_dict_of_splits(tmp_path):
    for split in ("train", "unsupervised", "test"):
        folder = tmp_path / split
        folder.mkdir()
        table = pa.table({"text": [split]})
        with pa.ipc.new_stream(str(folder / "data-0.arrow"), table.schema) as stream:
            stream.write_table(table)
        (folder / "cache-1.arrow").write_bytes(b"left over")
        state = {"_data_files": [{"filename": "data-0.arrow"}]}
        (folder / "state.json").write_text(json.dumps(state))
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    with pytest.raises(DataError, match="holds the splits test, train, unsupervised: name one"):
        find(str(tmp_path))
    files, left = find(str(tmp_path), splits=["unsupervised", "train"])
    assert files == ["train/data-0.arrow", "unsupervised/data-0.arrow"]
    assert left["split test"] == ["test/data-0.arrow"]
    assert len(left["not part of the saved data set (state.json)"]) == 3


@pytest.mark.parametrize("name", [{}, 3, None, "../data-0.arrow", "/etc/passwd", "a/b.arrow"])
def test_a_saved_data_set_names_files_beside_it(tmp_path, name):
    (tmp_path / "state.json").write_text(json.dumps({"_data_files": [{"filename": name}]}))
    with pytest.raises(DataError, match=r"state\.json is not the state .*not the name of a file"):
        find_inputs([str(tmp_path)])


def test_a_saved_data_set_without_one_of_its_files_is_refused(tmp_path):
    lay_out(tmp_path, "data-0.arrow")
    state = {"_data_files": [{"filename": "data-0.arrow"}, {"filename": "data-1.arrow"}]}
    (tmp_path / "state.json").write_text(json.dumps(state))
    with pytest.raises(DataError, match=r"has no data-1\.arrow, a part of the saved data set"):
        find_inputs([str(tmp_path)])


def test_a_saved_choice_of_rows_is_refused(tmp_path):
    """Its files hold rows that are not in the data set, and in another order."""
    lay_out(tmp_path, "data-0.arrow", "indices.arrow")
    state = {
        "_data_files": [{"filename": "data-0.arrow"}],
        "_indices_data_files": [{"filename": "indices.arrow"}],
    }
    (tmp_path / "state.json").write_text(json.dumps(state))
    with pytest.raises(DataError, match=r"is a choice of rows .*flatten_indices"):
        find_inputs([str(tmp_path)])


def test_a_file_by_two_fields_is_refused(tmp_path):
    """It is read once: the second field would be left out."""
    root = lay_out(tmp_path / "in", "a.jsonl", "b.txt")
    for other in (f"{root}/a.jsonl:title", f"{root}/*:title"):
        with pytest.raises(DataError, match=r"means the field 'title' of .*a\.jsonl, and "):
            find_inputs([root, other])
    assert len(find_inputs([root, f"{root}/a.jsonl:text", f"{root}/b.txt:title"]).files) == 2


def test_a_pointer_is_not_the_file(tmp_path):
    text = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
    (tmp_path / "train.txt").write_text(text)
    config = PrepareConfig(out=str(tmp_path / "out"), input=(str(tmp_path / "train.txt"),),
                           workers=1, heldout_fraction=0)  # fmt: skip
    with pytest.raises(DataError, match=r"train\.txt is a Git LFS pointer.*git lfs pull"):
        prepare_dataset(config)


def test_the_command_says_what_it_read(tmp_path, capsys):
    root = lay_out(tmp_path / "repo", "train.jsonl", "test.jsonl", "LICENSE")
    arguments = ["--workers", "1", "--heldout-fraction", "0", "--out", str(tmp_path / "out")]
    said = [
        f"read       {root}: 1 document in 1 file of split train",
        f"not read   {root}: 1 file (LICENSE): of a kind that is not read",
        f"not read   {root}: 1 file (test.jsonl): split test",
    ]
    assert data_cli.prepare([*arguments, "--input", root]) == 0
    assert [x for x in capsys.readouterr().out.splitlines() if "read  " in x] == said
    assert data_cli.prepare([*arguments, "--input", root]) == 0  # nothing to do
    assert "holds this data set already" in capsys.readouterr().out
    assert data_cli.inspect([str(tmp_path / "out")]) == 0
    assert [x for x in capsys.readouterr().out.splitlines() if "read  " in x] == said
    with pytest.raises(DataError, match=r"made from other inputs \(test\.jsonl differs\)"):
        data_cli.prepare([*arguments, "--input", root, "--splits", "test"])
