"""One run of a sweep's plan: its name, what it costs, and the hash of its settings."""

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from mmfree_jax.config import TrainConfig, tokens_per_step
from mmfree_jax.config_io import model_identity, optimizer_identity, to_dict
from mmfree_jax.experiments.sweep.axes import AS_GIVEN, Setting

Stage = Literal["tuning", "main", "trunk"]

# What changes neither the model that comes out nor the loss in the table. A branch of a trunk is
# the run that it would be alone.
_NOT_IN_HASH = (
    "run_dir", "loss_chunk", "max_minutes", "stop_at", "mesh", "checkpoint", "log", "branch_from",
)  # fmt: skip


@dataclass(frozen=True)
class PlannedRun:
    """One run of the plan."""

    stage: Stage
    family: str
    size: str
    config: TrainConfig
    """As the trainer gets it, but for `run_dir` (and the rate, while that is not known)."""
    flops: float
    """Training FLOPs: 3 x forward, every component, times tokens; its trunk's are among them."""
    budget: float | None
    """The FLOP budget it belongs to, in isoFLOP designs."""
    rate_known: bool
    """Whether the learning rate is set; a main run's comes from the tuning runs."""
    setting: Setting = AS_GIVEN
    """Its values of the sweep's other axes."""
    trunk: str | None = None
    """Name of the run that makes its steps at full rate, for it and others (`branches.py`)."""

    @property
    def tokens(self) -> int:
        """Training tokens, with those of its trunk."""
        return self.config.steps * tokens_per_step(self.config)

    @property
    def seed(self) -> int:
        """Seed of the initialisation and of the data's order."""
        return self.config.seed

    @property
    def learning_rate(self) -> float:
        """Peak learning rate; NaN while it is not known."""
        return self.config.optimizer.learning_rate if self.rate_known else math.nan

    @property
    def name(self) -> str:
        """Name of the run: what it is, and so the same in both stages."""
        return (
            self.trunk_name
            if self.stage == "trunk"
            else self._named(f"t{format_tokens(self.tokens)}")
        )

    @property
    def trunk_name(self) -> str:
        """Name of the trunk that it may share with runs of other lengths."""
        return self._named("trunk")

    def _named(self, length: str) -> str:
        rate = f"{self.learning_rate:.4g}" if self.rate_known else "tuned"
        parts = (f"lr{rate}", *self.setting.parts, f"s{self.seed}")
        return "-".join((self.family, self.size, length, *parts))

    @property
    def full_rate_steps(self) -> int:
        """Steps of a WSD run before its rate falls."""
        given = self.config.optimizer
        return math.floor(max(given.warmup_steps, self.config.steps * (1 - given.decay_fraction)))

    @property
    def own_share(self) -> float:
        """Share of its steps that it makes itself."""
        return 1.0 if self.trunk is None else 1 - self.full_rate_steps / self.config.steps

    @property
    def own_flops(self) -> float:
        """FLOPs of the steps that it makes itself."""
        return self.flops * self.own_share

    @property
    def cell(self) -> tuple[Stage, str, str, int]:
        """What runs have in common that differ in rate, axes and seed alone."""
        return self.stage, self.family, self.size, self.tokens

    @property
    def program(self) -> tuple[str, str, Setting]:
        """What runs have in common that share one compiled training step."""
        return self.family, self.size, self.setting.program

    def with_rate(self, rate: float) -> "PlannedRun":
        """The same run at a learning rate."""
        optimizer = dataclasses.replace(self.config.optimizer, learning_rate=rate)
        config = dataclasses.replace(self.config, optimizer=optimizer)
        return dataclasses.replace(self, config=config, rate_known=True)


def format_tokens(tokens: float) -> str:
    """A count of tokens with four digits and its unit: 8000512 -> "8.001M"."""
    for unit, letter in ((1e9, "B"), (1e6, "M")):
        if tokens >= unit:
            return f"{tokens / unit:.4g}{letter}"
    return f"{tokens / 1e3:.4g}K"


def data_name(fingerprints: Iterable[str]) -> str:
    """Data sets in the table: sixteen hex digits of each one's fingerprint, joined by "+"."""
    return "+".join(fingerprint[:16] for fingerprint in fingerprints)


def config_hash(config: TrainConfig) -> str:
    """Sixteen hex digits of the SHA-256 of all settings that decide the result.

    Left out: where the run and its data lie (the data's fingerprint is kept apart), the mesh,
    checkpoints, logs, tasks that are scored on the way.
    """
    values = {k: v for k, v in to_dict(config).items() if k not in _NOT_IN_HASH}
    values["model"] = model_identity(config.model)
    values["optimizer"] = optimizer_identity(config.optimizer)
    if config.quantizer.is_immediate:  # as in all tables from before there was another way
        del values["quantizer"]
    values["eval"] = {k: v for k, v in values["eval"].items() if not k.startswith("tasks")}
    elsewhere = ("paths", "prefetch", "cache_gib")
    values["data"] = {k: v for k, v in values["data"].items() if k not in elsewhere}
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]
