"""The files that the trials' commands name: a small one of every kind, made once."""

import gzip
import json
import os
import shutil
import socket
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fuzz import read_files
from mmfree_jax.experiments.scaling import fit_law, read_runs
from mmfree_jax.experiments.scaling.output_files import write_json
from mmfree_jax.experiments.scaling.report import fit_document

ROOT = Path(__file__).resolve().parents[3]
SPECIAL = "special"
"""Folder of what is no ordinary file."""

_OLD = ROOT / "tests" / "mmfree_jax" / "saved" / "old"
_TEXTS = [f"We hold these truths to be self-evident, naïve 日本 {i}.\n" for i in range(40)]
_TRAIN = """\
steps: 2
batch_size: 2
max_minutes: 0.5
model: {vocab_size: 258, hidden_size: 16, num_layers: 1, intermediate_size: 32, remat: none}
data: {paths: [data], seq_len: 16, prefetch: 0}
eval: {batches: 1, sample_tokens: 2}
log: {tensorboard: false, progress: none}
"""
_SWEEP = """\
out: sweep
families:
  - {base: matmulfree, learning_rates: [0.01]}
sizes: [2x32, 2x64, 3x96, 4x128]
tokens: [1000]
train:
  batch_size: 2
  data: {paths: [data], seq_len: 16}
  log: {tensorboard: false, progress: none}
"""


def make(folder: Path, *, exports: bool = True) -> None:
    """Makes the workplace: data, a run, a packed model, exports, tables and configurations.

    The run, the packed model and the session are the committed ones of an earlier version, so that
    nothing is trained for this.

    Args:
      folder: to make.
      exports: make them too, which takes most of the time (ten seconds).
    """
    folder.mkdir(parents=True)
    for name in ("run", "packed", "session.safetensors"):
        source = _OLD / name
        (shutil.copytree if source.is_dir() else shutil.copyfile)(source, folder / name)
    _make_texts(folder)
    _make_tables(folder)
    (folder / "train.yaml").write_text(_TRAIN)
    (folder / "sweep.yaml").write_text(_SWEEP)
    (folder / "slurm.yaml").write_text("name: job\nnodes: 2\n")
    (folder / "prompts.txt").write_text("We hold\nthese truths\n")
    (folder / "prompts.jsonl").write_text('{"prompt": "We hold"}\n{"prompt_ids": [1, 2]}\n')
    read_files.add(folder, _TEXTS)
    _make_models(folder, exports)


def _make_texts(folder: Path) -> None:
    text = folder / "text"
    text.mkdir()
    (text / "a.txt").write_text("".join(_TEXTS[:10]))
    (text / "b.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in _TEXTS))
    with gzip.open(text / "c.jsonl.gz", "wt") as file:
        file.write(json.dumps({"text": _TEXTS[0]}) + "\n")


def _make_tables(folder: Path) -> None:
    ladder = (ROOT / "experiments" / "results" / "synthetic_ladder.csv").read_text().splitlines()
    (folder / "runs.csv").write_text("\n".join(ladder) + "\n")
    (folder / "few.csv").write_text("\n".join(ladder[:3]) + "\n")
    fit = fit_law(read_runs([folder / "runs.csv"]), "gadre", resamples=30, profile=False)
    write_json(folder / "fit.json", fit_document(fit))
    shutil.copytree(
        ROOT / "experiments" / "results" / "loss_curves" / "matmulfree", folder / "curve"
    )


def _make_models(folder: Path, exports: bool) -> None:
    """What is made of the run by the commands themselves."""
    from mmfree_jax.cli.main import main

    def run(*argv: str) -> None:
        if code := main([str(word) for word in argv]):
            raise RuntimeError(f"mmfree {' '.join(argv)} ended with {code}")

    before = Path.cwd()
    os.chdir(folder)
    try:
        run("data", "prepare", "--input", "text/b.jsonl", "--out", "data", "--workers", "1",
            "--heldout-fraction", "0.3")  # fmt: skip
        run("tokenizer", "train", "--input", "text/b.jsonl", "--out", "tokenizer",
            "--vocab-size", "300")  # fmt: skip
        run("export-hf", "run", "hf")
        read_files.add_models(folder, run, session=exports)
        if not exports:
            return
        run("export", "onnx", "--model", "run", "--out", "onnx", "--no-web")
        run("hardware", "compile", "--model", "run", "--out", "program")
    finally:
        os.chdir(before)


def add_special(folder: Path) -> None:
    """Adds what is no ordinary file, which cannot be copied: pipes, sockets, links."""
    special = folder / SPECIAL
    special.mkdir()
    os.mkfifo(special / "fifo")
    (special / "loop").symlink_to("loop")
    (special / "dangling").symlink_to("nothing")
    (special / "null").symlink_to("/dev/null")
    (special / "empty").touch()
    (special / "empty.jsonl").touch()
    (special / "empty-folder").mkdir()
    (special / "file.json").write_text('{"x": 1}')
    (special / "latin1.yaml").write_bytes("name: Grün\n".encode("latin-1"))
    (special / "latin1.jsonl").write_bytes('{"prompt": "Grün"}\n'.encode("latin-1"))
    (special / "latin1.txt").write_bytes("Grün\n".encode("latin-1"))
    (special / "surrogate.jsonl").write_text('{"prompt": "\\ud800", "text": "\\ud800"}\n')
    (special / "surrogate.yaml").write_text('run_dir: "\\ud800"\nname: "\\ud800"\n')
    (special / "nul.yaml").write_text('run_dir: "a\\0b"\nname: "a\\0b"\n')
    (special / "deep.yaml").write_text("[" * 5000)
    (special / "deep.json").write_text("[" * 100_000)
    (special / "deep.jsonl").write_text('{"prompt": ' + "[" * 100_000 + "\n")
    (special / "huge.yaml").write_text(f"steps: {10**400}\nbatch_size: {10**30}\nname: 1\n")
    bomb = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    bomb += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12)]
    (special / "bomb.yaml").write_text("\n".join(bomb) + "\nsteps: *a11\nname: *a11\n")
    (special / "random").write_bytes(np.random.default_rng(0).bytes(2000))
    with socket.socket(socket.AF_UNIX) as made:
        before = Path.cwd()
        os.chdir(special)  # the name of a socket may have 107 bytes
        try:
            made.bind("socket")
        finally:
            os.chdir(before)


def special_paths() -> Sequence[str]:
    """Paths that no command expects where it expects a file or folder of its own kind."""
    names = ["fifo", "loop", "dangling", "null", "empty", "empty.jsonl", "empty-folder",
             "file.json", "latin1.yaml", "latin1.jsonl", "latin1.txt", "surrogate.jsonl",
             "surrogate.yaml", "nul.yaml", "deep.yaml", "deep.json", "deep.jsonl", "huge.yaml",
             "bomb.yaml", "random", "socket"]  # fmt: skip
    inside = [f"{SPECIAL}/{name}" for name in names]
    outside = ["/dev/null", "/dev/full", "/dev/zero", "/dev/tty", "/proc/self/mem", "/proc/self",
               "/proc/new", "/sys/new", "/", ".", "..", "", " ", "~", "missing", "missing/below",
               "missing/", "text/a.txt/below", "run", "packed", "hf", "onnx", "data", "program",
               "runs.csv", "train.yaml", "text", "tokenizer", "session.safetensors", "sweep.yaml",
               "x" * 300, "x/" * 3000, "a\nb", "a\tb", "a:b", "gs://bucket/x", "s3://x",
               "http://127.0.0.1:9/x", "-", "*", "[", "text/*", "日本", "a\x1b[31mb"]  # fmt: skip
    return [*inside, *outside]
