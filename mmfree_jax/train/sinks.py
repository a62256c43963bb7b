"""Where records go besides metrics.jsonl and the terminal: TensorBoard, Weights & Biases."""

import secrets
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from mmfree_jax.config import TrainConfig
from mmfree_jax.config_io import to_dict
from mmfree_jax.errors import ConfigError
from mmfree_jax.files import write_text
from mmfree_jax.installed import import_optional, install_command
from mmfree_jax.saved.history import Record
from mmfree_jax.saved.run_directory import TENSORBOARD, WANDB_ID
from mmfree_jax.train.event_file import EventFile


class Sink(Protocol):
    """Takes records."""

    def write(self, record: Record) -> None:
        """Takes one record."""
        ...

    def close(self) -> None:
        """Flushes and lets go."""
        ...


def _scalars(record: Record) -> dict[str, float]:
    skip = ("kind", "step", "unix_time")
    return {
        f"{record['kind']}/{name}": float(value)
        for name, value in record.items()
        if name not in skip and isinstance(value, (int, float)) and not isinstance(value, bool)
    }


class TensorBoard:
    """Writes TensorBoard events; those beyond the step restored are marked as purged.

    Training goes on without them where the disk is full: metrics.jsonl has it all.
    """

    def __init__(self, folder: Path, restored_step: int) -> None:
        goes_on = restored_step > 0 or (folder.is_dir() and any(folder.iterdir()))
        self._file = EventFile(folder, purge_step=restored_step + 1 if goes_on else None)
        self._lost = False

    def write(self, record: Record) -> None:
        """Writes the numbers, and samples as text."""
        texts = {"sample": record["text"]} if record["kind"] == "sample" else {}
        self._try(lambda: self._file.write(record["step"], _scalars(record), texts))

    def close(self) -> None:
        """Closes the file."""
        self._try(self._file.close)

    def _try(self, act: Callable[[], None]) -> None:
        if self._lost:
            return
        try:
            act()
        except OSError as e:
            self._lost = True
            reason = f"{self._file.path} cannot be written: {e.strerror}"
            print(f"warning: nothing more is logged to TensorBoard ({reason})", file=sys.stderr)


class WandB:
    """Logs to Weights & Biases; a resumed run goes on under the id kept in the run directory."""

    def __init__(self, project: str, group: str | None, run_dir: Path, config: TrainConfig) -> None:
        wandb = import_optional("wandb", f"log.wandb_project ({project})", install_command("wandb"))
        id_file = run_dir / WANDB_ID
        if not id_file.exists():
            write_text(id_file, secrets.token_hex(4))
        try:
            self._run = wandb.init(
                project=project,
                group=group,
                id=id_file.read_text(encoding="utf-8").strip(),
                resume="allow",
                name=run_dir.name,
                dir=str(run_dir),
                config=to_dict(config),
            )
        except Exception as e:  # its own errors, and those of what it checks settings with
            raise ConfigError(
                f"log.wandb_project is {project!r}, and Weights & Biases does not start "
                f"({' '.join(str(e).split())}): run `wandb login`, or set WANDB_MODE=offline, or "
                "leave out --log.wandb-project"
            ) from e
        self._next_step = self._run.step  # beyond 0 where the server has the run already
        self._lost = False

    def write(self, record: Record) -> None:
        """Logs the numbers, and samples as text; what the run resumed has already is left out."""
        values: dict[str, Any] = dict(_scalars(record))
        if record["kind"] == "sample":
            values["sample/text"] = record["text"]
        if record["step"] >= self._next_step:
            self._try(lambda: self._run.log(values, step=record["step"]))

    def close(self) -> None:
        """Finishes the run."""
        self._try(self._run.finish)

    def _try(self, act: Callable[[], None]) -> None:
        """Training goes on without W&B where its process is gone: metrics.jsonl has it all."""
        if self._lost:
            return
        try:
            act()
        except Exception as e:
            self._lost = True
            reason = " ".join(f"{type(e).__name__}: {e}".split())
            print(f"warning: nothing more is logged to W&B ({reason})", file=sys.stderr)


def make_sinks(config: TrainConfig, run_dir: Path, restored_step: int) -> list[Sink]:
    """TensorBoard and W&B as the config asks.

    Raises:
      ConfigError: W&B is asked for and is not installed, or does not start.
    """
    sinks: list[Sink] = []
    if config.log.tensorboard:
        sinks.append(TensorBoard(run_dir / TENSORBOARD, restored_step))
    if config.log.wandb_project:
        sinks.append(WandB(config.log.wandb_project, config.log.wandb_group, run_dir, config))
    return sinks
