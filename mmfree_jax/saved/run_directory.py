"""A run directory: the names in it, its config, and who may write to it.

The files in it are listed in ARCHITECTURE.md.
"""

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path

from mmfree_jax.config import TrainConfig
from mmfree_jax.config_io import dump_yaml, from_dict, read_yaml
from mmfree_jax.errors import CheckpointError, ConfigError
from mmfree_jax.parallel import processes
from mmfree_jax.saved.checkpoint import write_text_atomically
from mmfree_jax.saved.kinds import RUN_CONFIG as CONFIG

METRICS = "metrics.jsonl"
CHECKPOINTS = "checkpoints"
SUMMARY = "summary.json"
LOSS_CURVE = "loss_curve.png"
SAMPLE = "sample.txt"
TENSORBOARD = "tensorboard"
TOKENIZER = "tokenizer"
LOCK = ".lock"


@contextlib.contextmanager
def lock_run_dir(run_dir: Path) -> Iterator[None]:
    """Creates `run_dir` and holds it against other jobs; the system lets go at death.

    Raises:
      CheckpointError: it cannot be written to, or another job holds it.
    """
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(run_dir / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as e:
        raise CheckpointError(
            f"run_dir {run_dir} cannot be written to: {e.strerror}; choose a writable folder"
        ) from e
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as e:
            holder = os.pread(descriptor, 64, 0).decode(errors="replace").strip() or "unknown"
            raise CheckpointError(
                f"run_dir {run_dir} is in use by another job ({holder}): wait for it to end, "
                "or choose another run_dir"
            ) from e
        try:
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, _owner().encode(), 0)
        except OSError as e:
            raise CheckpointError(f"run_dir {run_dir} cannot be written to: {e.strerror}") from e
        yield
    finally:
        os.close(descriptor)  # also unlocks


def _owner() -> str:
    return f"process {os.getpid()} on {os.uname().nodename}"


def open_run_dir(run_dir: Path, held: contextlib.ExitStack, *, patience: float = 15.0) -> None:
    """Process 0 locks `run_dir` until `held` closes; the others check that they see the same.

    Raises:
      CheckpointError: another job holds it, or a process sees another folder of that name.
    """

    def lock() -> str:
        held.enter_context(lock_run_dir(run_dir))
        return _owner()

    owner = processes.first(lock)

    def look() -> None:
        deadline = time.monotonic() + patience  # network file systems may lag behind
        while True:
            with contextlib.suppress(OSError):
                if (run_dir / LOCK).read_text(encoding="utf-8") == owner:
                    return
            if time.monotonic() > deadline:
                raise CheckpointError(
                    f"run_dir {run_dir.absolute()} is not the folder that process 0 writes to: "
                    "put it on a file system that all hosts share"
                )
            time.sleep(0.2)

    processes.together(look)


def write_config(run_dir: Path, config: TrainConfig) -> None:
    """Writes the resolved config.

    Raises:
      CheckpointError: the folder cannot be written to.
    """
    try:
        write_text_atomically(run_dir / CONFIG, dump_yaml(config))
    except OSError as e:
        raise CheckpointError(
            f"run_dir {run_dir} cannot be written to: {e.strerror}; choose a writable folder"
        ) from e


def load_config(run_dir: Path) -> TrainConfig:
    """The resolved config of a run directory.

    Raises:
      ConfigError: it is missing or malformed.
    """
    path = run_dir / CONFIG
    if not path.is_file():
        raise ConfigError(f"{path} is missing: give the folder of a training run")
    return from_dict(TrainConfig, read_yaml(path))
