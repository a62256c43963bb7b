"""Weights & Biases, the real package without a network: what its run files hold is read back."""

import dataclasses
import json
import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from whole_runs import replace, stop_at

from mmfree_jax.config import LogConfig, TrainConfig
from mmfree_jax.config_io import from_dict
from mmfree_jax.errors import ConfigError
from mmfree_jax.experiments.sweep.config import SweepConfig
from mmfree_jax.experiments.sweep.plan import main_runs
from mmfree_jax.experiments.sweep.tracking import grouped
from mmfree_jax.saved.history import read_history
from mmfree_jax.train.sinks import make_sinks
from mmfree_jax.train.training import train

wandb = pytest.importorskip("wandb", reason="wandb (the extra `wandb`) is not installed")

CONFIG = TrainConfig(log=LogConfig(tensorboard=False, wandb_project="ternary"))
TRAIN = {"kind": "train", "step": 20, "tokens": 2048, "loss": 2.5, "mfu": None, "zero_share": 0.31}
EVAL = {"kind": "eval", "step": 20, "loss": 2.0, "bits_per_byte": 1.1}
SAMPLE = {"kind": "sample", "step": 20, "prompt": "we", "text": "we\nhold [bold] \u2713"}


@pytest.fixture(autouse=True)
def nobody(monkeypatch, tmp_path_factory):
    """A user who is logged in nowhere, in a process of wandb's own."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path_factory.mktemp("home")))
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    monkeypatch.setenv("WANDB_SILENT", "true")
    yield
    wandb.teardown()  # else it goes on with the settings that it has read


def _read(path: Path) -> Iterator[Any]:
    """The records of a run file: protocol buffers in LevelDB's log format behind seven bytes.

    wandb had a reader, `sdk.internal.datastore`, until it went into its Go program. On files of
    0.18.0 the two agree.
    """
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, whole = path.read_bytes(), 7, b""
    assert data[:4] == b":W&B"
    while at < len(data):
        if (left := -at % 32768) and left < 7:
            at += left
            continue
        _, size, kind = struct.unpack_from("<IHB", data, at)
        whole += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or the last part
            record = Record()
            record.ParseFromString(whole)
            whole = b""
            yield record


def _history(path: Path) -> list[dict[str, Any]]:
    return [
        {
            item.key or "/".join(item.nested_key): json.loads(item.value_json)
            for item in r.history.item
        }
        for r in _read(path)
        if r.WhichOneof("record_type") == "history"
    ]


def _started(path: Path) -> Any:
    (run,) = (r.run for r in _read(path) if r.WhichOneof("record_type") == "run")
    return run


def test_a_resumed_run_goes_on_under_its_id(tmp_path):
    run_dir = tmp_path / "rung-7M"
    run_dir.mkdir()
    for records in ([TRAIN, EVAL, SAMPLE], [TRAIN | {"step": 30, "loss": 2.25}]):
        (sink,) = make_sinks(dataclasses.replace(CONFIG), run_dir, 0)
        for record in records:
            sink.write(record)
        sink.close()
    wandb.teardown()  # its process writes until it ends
    first, second = sorted(run_dir.glob("wandb/offline-run-*/*.wandb"))
    number = (run_dir / "wandb_id").read_text()
    assert first.name == second.name == f"run-{number}.wandb"
    for path in (first, second):
        run = _started(path)
        assert (run.run_id, run.project, run.display_name) == (number, "ternary", "rung-7M")
        values = {item.key: json.loads(item.value_json) for item in run.config.update}
        assert values["model"]["hidden_size"] == 1024
        assert values["optimizer"]["schedule"] == "paper"
    (row,) = _history(first)
    expected = {
        "_step": 20,
        "train/tokens": 2048,
        "train/loss": 2.5,
        "train/zero_share": 0.31,
        "eval/loss": 2.0,
        "eval/bits_per_byte": 1.1,
        "sample/text": "we\nhold [bold] \u2713",
    }
    assert {name: row[name] for name in expected} == expected
    assert {name for name in row if not name.startswith("_")} | {"_step"} == set(expected)
    (row,) = _history(second)
    assert (row["_step"], row["train/loss"]) == (30, 2.25)


@pytest.mark.usefixtures("cached_compilation", "traced_once")
def test_all_numbers_of_an_interrupted_run_are_in_its_files(small_run, tmp_path):
    config = replace(small_run, run_dir=str(tmp_path), log__wandb_project="ternary")
    assert train(config, on_step=stop_at(7))["stopped_by"] == "SIGTERM"
    assert train(config)["step"] == 12
    wandb.teardown()
    sent: dict[tuple[int, str], list[Any]] = {}
    paths = sorted(tmp_path.glob("wandb/offline-run-*/*.wandb"))
    assert len(paths) == 2
    for path in paths:
        for row in _history(path):
            for name, value in row.items():  # both attempts tell of the step between them
                sent.setdefault((row["_step"], name), []).append(value)
    records = read_history(tmp_path / "metrics.jsonl")
    assert {record["kind"] for record in records} >= {"train", "eval", "event"}
    # Goodput is a running sum, told of several times at one step: W&B keeps the last.
    for record in {(record["kind"], record["step"]): record for record in records}.values():
        for name, value in record.items():
            if isinstance(value, int | float) and name not in ("step", "unix_time"):
                assert value in sent[record["step"], f"{record['kind']}/{name}"]


def test_a_sweeps_runs_are_one_group(tmp_path):
    """Two runs of a sweep as its runner configures them, and one that stands alone."""
    values = {
        "out": str(tmp_path / "rates-of-7M"), "families": [{"learning_rates": [1e-3, 2e-3]}],
        "sizes": ["tiny"], "tokens": [1e6],
        "train": {"log": {"wandb_project": "ternary", "tensorboard": False}},
    }  # fmt: skip
    sweep = from_dict(SweepConfig, values)
    configs = {run.name: grouped(run.config, sweep) for run in main_runs(sweep)} | {"alone": CONFIG}
    for name, config in configs.items():
        (tmp_path / name).mkdir()
        (sink,) = make_sinks(config, tmp_path / name, 0)
        sink.close()
    wandb.teardown()
    runs = [_started(path) for path in tmp_path.glob("*/wandb/offline-run-*/*.wandb")]
    assert {run.display_name: run.run_group for run in runs} == {
        "matmulfree-tiny-t999.4K-lr0.001-s0": "rates-of-7M",
        "matmulfree-tiny-t999.4K-lr0.002-s0": "rates-of-7M",
        "alone": "",
    }
    own = LogConfig(wandb_project="ternary", wandb_group="mine")
    assert grouped(TrainConfig(log=own), sweep).log.wandb_group == "mine"
    assert grouped(TrainConfig(), sweep).log.wandb_group is None


def test_two_runs_have_two_ids(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (sink,) = make_sinks(CONFIG, tmp_path / name, 0)
        sink.close()
    assert (tmp_path / "a" / "wandb_id").read_text() != (tmp_path / "b" / "wandb_id").read_text()


@pytest.mark.parametrize(
    ("project", "mode", "reason"),
    [
        ("ternary", "online", "login"),
        ("ternary", "sideways", "sideways"),
        ("a/b", "offline", "Invalid project name 'a/b'"),
    ],
)
def test_what_wandb_refuses_is_one_line_with_its_reason(
    tmp_path, monkeypatch, project, mode, reason
):
    monkeypatch.setenv("WANDB_MODE", mode)
    config = dataclasses.replace(CONFIG, log=LogConfig(tensorboard=False, wandb_project=project))
    with pytest.raises(ConfigError, match=f"log.wandb_project is {project!r}") as e:
        make_sinks(config, tmp_path, 0)
    assert reason in str(e.value)
    assert "WANDB_MODE=offline" in str(e.value)
    assert "\n" not in str(e.value)


LOST = """
import os, signal, sys, time
from pathlib import Path
from mmfree_jax.config import LogConfig, TrainConfig
from mmfree_jax.train.sinks import make_sinks
config = TrainConfig(log=LogConfig(tensorboard=False, wandb_project="p"))
(sink,) = make_sinks(config, Path(sys.argv[1]), 0)
children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
assert children
for child in map(int, children):
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
for step in range(1, 40):
    sink.write({"kind": "train", "step": step, "loss": 2.0})
    time.sleep(0.02)
sink.close()
print("trained on", flush=True)
os._exit(0)  # what W&B says at its own exit is not ours
"""


def test_training_goes_on_when_its_process_is_gone(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", LOST, str(tmp_path)], capture_output=True, text=True, timeout=120
    )
    assert done.stdout.splitlines()[-1:] == ["trained on"], done.stderr
    assert done.stderr.count("warning: nothing more is logged to W&B (") == 1
