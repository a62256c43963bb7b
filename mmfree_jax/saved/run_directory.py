"""A run directory: the names in it, its config, and who may write to it.

The files in it are listed in ARCHITECTURE.md.
"""

import contextlib
import re
import secrets
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from mmfree_jax.config import TrainConfig
from mmfree_jax.config_io import dump_yaml, from_dict, read_yaml
from mmfree_jax.errors import CheckpointError, ConfigError
from mmfree_jax.files import lock, owner, write_text
from mmfree_jax.parallel import processes
from mmfree_jax.saved.kinds import RUN_CONFIG as CONFIG

METRICS = "metrics.jsonl"
EARLIER_METRICS = "metrics.earlier.jsonl"
"""What a start that left no checkpoint had recorded; `metrics.earlier-1.jsonl` of the next."""
CHECKPOINTS = "checkpoints"
SUMMARY = "summary.json"
LOSS_CURVE = "loss_curve.png"
SAMPLE = "sample.txt"
TENSORBOARD = "tensorboard"
WANDB_ID = "wandb_id"
RUN_ID = "run_id"
TOKENIZER = "tokenizer"
LOCK = ".lock"


def open_run_dir(run_dir: Path, held: contextlib.ExitStack, *, patience: float = 15.0) -> None:
    """Process 0 locks `run_dir` until `held` closes; the others check that they see the same.

    A folder that is made here goes if `held` closes with an error before a run is in it.

    Raises:
      InUseError: another job holds it.
      OutputError: it cannot be written to.
      CheckpointError: a process sees another folder of that name.
    """

    def take() -> str:
        held.enter_context(_locked(run_dir))
        return owner()

    found = processes.first(take)

    def held_by() -> str | None:
        with contextlib.suppress(OSError):
            return (run_dir / LOCK).read_text(encoding="utf-8")
        return None

    see_holder(  # network file systems may lag behind
        held_by,
        found,
        patience,
        f"run_dir {run_dir.absolute()} is not the folder that process 0 writes to: put it on a "
        "file system that all hosts share",
    )


@contextlib.contextmanager
def _locked(run_dir: Path) -> Iterator[None]:
    is_new = not run_dir.exists()
    with lock(run_dir / LOCK, f"run_dir {run_dir}"):
        try:
            yield
        except BaseException:
            if is_new:
                _remove_unbegun(run_dir)
            raise


def _remove_unbegun(run_dir: Path) -> None:
    """Removes a folder that holds no run yet, whose lock is held."""
    with contextlib.suppress(OSError):
        if {path.name for path in run_dir.iterdir()} <= {LOCK, RUN_ID}:
            for name in (RUN_ID, LOCK):
                (run_dir / name).unlink(missing_ok=True)
            run_dir.rmdir()  # not if another job has locked it anew


def see_holder(
    held_by: Callable[[], str | None], holder: str, patience: float, otherwise: str
) -> None:
    """All processes see that `holder`, process 0, has the run directory that each of them sees.

    Args:
      held_by: who has it, as this process sees it; None: it does not.
      holder: who should.
      patience: how long to look (s).
      otherwise: what is wrong if not.

    Raises:
      CheckpointError: a process does not see it in time.
    """

    def look() -> None:
        deadline = time.monotonic() + patience
        while held_by() != holder:
            if time.monotonic() > deadline:
                raise CheckpointError(otherwise)
            time.sleep(0.2)

    processes.together(look)


def run_identity(run_dir: Path) -> str:
    """What tells this run from any other, also from one that was in the folder before.

    Process 0 makes it once; all get it.

    Raises:
      OutputError: it cannot be written.
    """

    def make() -> str:
        path = run_dir / RUN_ID
        with contextlib.suppress(OSError):
            found = path.read_text(encoding="utf-8").strip()
            if re.fullmatch("[0-9a-f]{16}", found):
                return found
        new = secrets.token_hex(8)
        write_text(path, new + "\n")
        return new

    return processes.first(make)


def write_config(run_dir: Path, config: TrainConfig) -> None:
    """Writes the resolved config.

    Raises:
      OutputError: it cannot be written.
    """
    write_text(run_dir / CONFIG, dump_yaml(config))


def load_config(run_dir: Path) -> TrainConfig:
    """The resolved config of a run directory.

    Raises:
      ConfigError: it is missing or malformed.
    """
    path = run_dir / CONFIG
    if not path.is_file():
        raise ConfigError(f"{path} is missing: give the folder of a training run")
    return from_dict(TrainConfig, read_yaml(path))
