"""A small run, shared by the tests of training and the command line, and a cut network."""

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import jax
import pytest

from mmfree_jax.config import (
    CheckpointConfig,
    DataConfig,
    EvalConfig,
    LogConfig,
    MeshConfig,
    OptimizerConfig,
    TrainConfig,
)
from mmfree_jax.model_config import ModelConfig


@pytest.fixture(scope="session")
def small_run(byte_data: Path) -> TrainConfig:
    """A run of a second or so, without samples; give it a run_dir."""
    return TrainConfig(
        steps=12,
        batch_size=8,
        model=ModelConfig(
            vocab_size=256,
            hidden_size=32,
            num_layers=1,
            intermediate_size=32,
            compute_dtype="float32",
            residual_dtype="float32",
            remat="none",
        ),
        data=DataConfig(paths=(str(byte_data),), seq_len=16),
        optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=2),
        mesh=MeshConfig(fsdp=2),
        checkpoint=CheckpointConfig(every_steps=4),
        eval=EvalConfig(every_steps=6, batches=2, sample_tokens=0),
        log=LogConfig(every_steps=1, ternary_every_steps=4, tensorboard=False, progress="plain"),
    )


@pytest.fixture(scope="session")
def compilation_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for compiled programs, which restarts of one run share."""
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture(scope="session")
def keep_compiled(compilation_cache: Path) -> Callable[[], AbstractContextManager[None]]:
    """Within what this returns each program is compiled once."""

    @contextlib.contextmanager
    def keep() -> Iterator[None]:
        options = {
            "jax_compilation_cache_dir": str(compilation_cache),
            "jax_persistent_cache_min_compile_time_secs": 0.0,
            "jax_persistent_cache_min_entry_size_bytes": -1,
        }
        before = {name: getattr(jax.config, name) for name in options}
        for name, value in options.items():
            jax.config.update(name, value)
        try:
            yield
        finally:
            for name, value in before.items():
                jax.config.update(name, value)

    return keep


@pytest.fixture
def cached_compilation(keep_compiled: Callable[[], AbstractContextManager[None]]):
    """Runs of one test module compile each program once."""
    with keep_compiled():
        yield


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails whoever asks for the network."""

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("the network was asked for")

    monkeypatch.setattr("socket.socket.connect", refuse)
    monkeypatch.setattr("socket.getaddrinfo", refuse)
