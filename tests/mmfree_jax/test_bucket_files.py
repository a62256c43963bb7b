"""Single files of commands in buckets: whole, and nothing is replaced that is someone else's."""

import json

import pytest
from bucket_files import do_not_wait
from faulty_proxy import Fault

from mmfree_jax import files
from mmfree_jax.cli.main import main
from mmfree_jax.errors import OutputError, StorageError
from mmfree_jax.places import is_file, is_taken
from mmfree_jax.prefixes import names_below
from mmfree_jax.storage import ChangedError, parse_url, read_bytes, write_bytes


def test_a_file_is_written_whole_and_replaced_unless_others_did_meanwhile(bucket, monkeypatch):
    do_not_wait(monkeypatch)
    url = f"{bucket.url}/a b/x.json"
    for text in ("ü", "anew"):
        files.write_text(url, text)
        assert read_bytes(parse_url(url)) == text.encode()
    with pytest.raises(TypeError), files.open_atomically(url) as file:
        file.write("no bytes")  # type: ignore[arg-type]

    def write_while_another_does(target):
        with files.open_atomically(target) as file:
            file.write(b"of the first")
            write_bytes(parse_url(target), b"of the other")

    for target in (url, f"{bucket.url}/new"):
        with pytest.raises(ChangedError, match=f"^{target} was written by another job$"):
            write_while_another_does(target)
        assert read_bytes(parse_url(target)) == b"of the other"
    bucket.proxy.add(Fault("^(PUT|POST) ", status=403))
    with pytest.raises(StorageError, match=r"x.json cannot be written: permission denied"):
        files.write_text(url, "mine")


def test_a_file_is_replaced_that_begins_as_the_commands_own_do(gcs_bucket):
    out, figure = (parse_url(f"{gcs_bucket.url}/x.{kind}") for kind in ("json", "png"))
    files.check_file(out, r'\{\s*"law"', beside=[figure])
    write_bytes(out, b'{\n "law": 1}')
    write_bytes(figure, b"of the same")
    files.check_file(str(out), r'\{\s*"law"', beside=[figure])
    with pytest.raises(OutputError, match=f"{figure} is not replaced: it is read"):
        files.check_file(out, r'\{\s*"law"', beside=[figure], sources=["/tmp", str(figure)])
    write_bytes(out, b'{\n "name": "law"}')
    with pytest.raises(OutputError, match=f"{out} is not replaced: it is no earlier output"):
        files.check_file(out, r'\{\s*"law"', beside=[figure])
    with pytest.raises(OutputError, match=f"{figure} is not replaced: it is no earlier output"):
        files.check_file(parse_url(f"{gcs_bucket.url}/y.json"), "", beside=[figure])
    with pytest.raises(StorageError, match="there is no bucket 'nobody-has-this'"):
        files.check_file("gs://nobody-has-this/x", "")


def test_commands_write_into_buckets_what_they_write_here(s3_bucket, tmp_path, capsys):
    table, run = tmp_path / "table.csv", tmp_path / "run"
    rows = [f"{size},{2 + 30 * size**-0.2}" for size in (1e6, 3e6, 1e7, 3e7, 1e8, 3e8)]
    table.write_text("\n".join(["x,y", *rows]) + "\n")
    run.mkdir()
    logged = [{"kind": "train", "step": k, "tokens": k, "time_s": k, "loss": 5 - k} for k in (1, 2)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in logged))
    for argv, flag, name in (
        (["plot", str(run)], "--output", "curve.svg"),
        (["fit", "power", str(table), "--x", "x", "--y", "y"], "--out", "power.json"),
        (["launch", "render", "gke", "--name", "n"], "--out", "job.yaml"),
    ):
        behind = []
        if argv[0] == "launch":
            argv += ["--image", "i", "--claim", "c", "--accelerator", "nvidia", "--hosts", "1"]
            argv += ["--devices-per-host", "8"]
            behind = ["--", "--run-dir", "/mnt/shared/x"]
        for out in (f"{s3_bucket.url}/out/{name}", str(tmp_path / name)):
            assert main([*argv, flag, out, *behind]) == 0, capsys.readouterr().err
            assert main([*argv, flag, out, *behind]) == 0  # its own is replaced
            assert out in capsys.readouterr().out
        there = read_bytes(parse_url(f"{s3_bucket.url}/out/{name}"))
        if name != "curve.svg":  # which says when it was made
            assert there == (tmp_path / name).read_bytes()
        write_bytes(parse_url(f"{s3_bucket.url}/out/{name}"), b"theirs")
        assert main([*argv, flag, f"{s3_bucket.url}/out/{name}", *behind]) == 2
        assert "is not replaced: it is no earlier output" in capsys.readouterr().err
    assert names_below(parse_url(f"{s3_bucket.url}/out")) == {
        "curve.svg",
        "job.yaml",
        "power.json",
        "power.plot.csv",
        "power.png",
    }


def test_a_file_that_is_there_and_a_name_that_is_taken(bucket, tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "file")
    (tmp_path / "broken").symlink_to(tmp_path / "nothing")
    write_bytes(url := parse_url(f"{bucket.url}/file"), b"x")
    below = parse_url(f"{bucket.url}/folder")
    write_bytes(below / "file", b"x")
    places = [tmp_path / n for n in ("file", "link", "folder", "broken", "nothing")] + [url, below]
    assert [is_file(p) for p in places] == [True, True, False, False, False, True, False]
    assert [is_taken(p) for p in places] == [True, True, True, True, False, True, False]
