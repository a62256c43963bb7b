"""Whole runs in one process, which share their traced programs."""

import dataclasses
import functools
import io
from typing import Any

import pytest
from bucket_servers import new_bucket

from mmfree_jax.config import DataConfig, TrainConfig
from mmfree_jax.train import loop, training
from mmfree_jax.train import step as step_module

# What no compiled program depends on.
_SETTINGS_OF_THE_LOOP = (
    "run_dir",
    "branch_from",
    "steps",
    "seed",
    "checkpoint",
    "eval",
    "log",
    "max_minutes",
    "stop_at",
    "on_nonfinite",
)
_COMPILE = {
    name: getattr(step_module, name) for name in ("jit_init", "jit_train_step", "jit_eval_step")
}
_TRACED: dict[tuple[Any, ...], Any] = {}


@pytest.fixture
def traced_once(monkeypatch):
    """Runs of one shape share their traced programs: a module may make some thirty runs.

    Their curves are drawn, but not rendered, which took as long as their steps; those of the run
    `finished` are.
    """
    _share_traces(monkeypatch)
    monkeypatch.setattr(
        "matplotlib.figure.Figure.savefig",
        lambda self, file, *, format, **_: file.write(_empty_image(format)),
    )


@functools.cache
def _empty_image(kind: str) -> bytes:
    from matplotlib.figure import Figure

    file = io.BytesIO()
    Figure(figsize=(1, 1)).canvas.print_figure(file, format=kind)
    return file.getvalue()


@pytest.fixture(scope="session")
def share_traces():
    """As `traced_once`, for fixtures that outlast a test."""
    return _share_traces


def _share_traces(patch: pytest.MonkeyPatch) -> None:
    for name in _COMPILE:
        patch.setattr(
            step_module if name == "jit_init" else loop, name, functools.partial(_traced, name)
        )


@pytest.fixture(scope="session")
def finished(small_run, tmp_path_factory, keep_compiled):
    """An uninterrupted run: its config, folder and summary. Leave the folder as it is."""
    run_dir = tmp_path_factory.mktemp("runs") / "whole"
    config = dataclasses.replace(small_run, run_dir=str(run_dir))
    with keep_compiled(), pytest.MonkeyPatch.context() as patch:
        _share_traces(patch)
        return config, run_dir, training.train(config)


def _traced(name: str, config: TrainConfig, *args: Any) -> Any:
    default = TrainConfig()
    same = {field: getattr(default, field) for field in _SETTINGS_OF_THE_LOOP}
    same["data"] = DataConfig(seq_len=config.data.seq_len)
    key = (name, dataclasses.replace(config, **same), *args[2:])  # the form of the step
    if key not in _TRACED:
        _TRACED[key] = _COMPILE[name](config, *args)
    return _TRACED[key]


@pytest.fixture(scope="module")
def bucket_of_runs(gcs_server):
    """One that the tests of a module share."""
    with new_bucket(gcs_server) as bucket:
        yield bucket
