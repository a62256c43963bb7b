"""What a run measures of itself, and the one consistent history it keeps on disk.

A record is a dict of plain values with at least `kind` ("train", "eval", "tasks", "sample" or
"event"), `step`, `tokens` and `time_s`. Losses are in nats a token; a `_share` is in [0, 1].
"""

import contextlib
import functools
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from mmfree_jax.errors import TrainingError
from mmfree_jax.files import disk_errors, write_text
from mmfree_jax.model.weights import ternary_weights
from mmfree_jax.model_config import ModelConfig
from mmfree_jax.readable import perplexity
from mmfree_jax.saved.history import Record, read_history
from mmfree_jax.saved.run_directory import EARLIER_METRICS

# Where a loop's time goes: waiting for data while no step runs; the step; held-out loss, samples
# and the shares of ternary weights; and what a checkpoint keeps the loop waiting for.
SECTIONS = ("data", "step", "eval", "checkpoint")
_OF_A_START = ("compile", "restore")


class Stopwatch:
    """Seconds spent in named sections since they were last taken.

    Sections may nest (the inner one counts) and may be open when the times are taken. Beside
    `SECTIONS` there are those of a start, "compile" and "restore"; the rest is "other".
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._seconds: dict[str, float] = dict.fromkeys((*SECTIONS, *_OF_A_START, "other"), 0.0)
        self._taken = dict(self._seconds)
        self._open = ["other"]
        self._at = clock()

    def _credit(self) -> None:
        now = self._clock()
        self._seconds[self._open[-1]] += now - self._at
        self._at = now

    @contextlib.contextmanager
    def section(self, name: str) -> Iterator[None]:
        """Counts the time inside `with` towards `name`."""
        self._credit()
        self._open.append(name)
        try:
            yield
        finally:
            self._credit()
            self._open.pop()

    def take(self) -> dict[str, float]:
        """Seconds by section and in all (`total`) since the last call, which starts anew."""
        self._credit()
        taken, self._seconds = self._seconds, dict.fromkeys(self._seconds, 0.0)
        self._taken = {name: self._taken[name] + seconds for name, seconds in taken.items()}
        return {**{name: taken[name] for name in SECTIONS}, "total": sum(taken.values())}

    @property
    def totals(self) -> dict[str, float]:
        """Seconds by section since the beginning, taken or not."""
        self._credit()
        return {name: self._taken[name] + seconds for name, seconds in self._seconds.items()}


class Window:
    """Means over the steps since the last train record.

    Its sums travel in the checkpoints, so that a resumed run writes the very records that an
    uninterrupted one would have.
    """

    def __init__(self, state: dict[str, float] | None = None) -> None:
        self.state = dict(state) if state else {}

    def add(self, metrics: dict[str, float], rows_tokens: int) -> None:
        """Counts one step's metrics; one that is not finite only counts as skipped."""
        s = self.state
        s["steps"] = s.get("steps", 0) + 1
        s["positions"] = s.get("positions", 0) + rows_tokens
        if not metrics["finite"]:
            s["skipped"] = s.get("skipped", 0) + 1
            return
        for name in ("loss", "grad_norm", "accuracy", "z_loss"):
            s[name] = s.get(name, 0.0) + metrics[name]
        s["grad_norm_max"] = max(s.get("grad_norm_max", 0.0), metrics["grad_norm"])

    def take(self) -> Record:
        """The means, and starts anew. Empty of losses when every step was skipped."""
        s, self.state = self.state, {}
        skipped = s.get("skipped", 0)
        counted = s.get("steps", 0) - skipped
        record: Record = {"skipped_steps": int(skipped)}
        if counted:
            loss = s["loss"] / counted
            record |= {
                "loss": loss,
                "perplexity": perplexity(loss),
                "accuracy": s["accuracy"] / counted,
                "grad_norm": s["grad_norm"] / counted,
                "grad_norm_max": s["grad_norm_max"],
            }
            if s["z_loss"]:
                record["z_loss"] = s["z_loss"] / counted
        return record


class TernaryMonitor:
    """Shares of zero weights, and of weights whose trit changed since the last look.

    Keeps one int8 copy of the ternary weights on the devices, sharded as the weights are.
    """

    def __init__(
        self, config: ModelConfig, measure: Callable[[Any, Any], tuple[Any, Any]] | None = None
    ) -> None:
        """`measure`: what `jit_ternary_shares` makes of `config`, if it is kept somewhere."""
        self._measure = measure or jit_ternary_shares(config)
        self._trits: Any = None

    def __call__(self, params: Any) -> Record:
        """`zero_share` and `changed_share` (None at the first look), in all and by component."""
        is_first = self._trits is None
        self._trits, on_device = self._measure(params, self._trits)
        shares = {}
        for path, (zero, changed, size) in jax.device_get(on_device).items():
            shares[path] = (zero, None if is_first else changed, size)
        record: Record = {}
        for i, name in enumerate(("zero_share", "changed_share")):
            groups: dict[str, list[tuple[float, float]]] = {}
            for path, values in shares.items():
                if values[i] is not None:
                    pair = (float(values[i]), float(values[2]))
                    for group in ("", f"_{_component(path)}"):
                        groups.setdefault(group, []).append(pair)
            for group, pairs in groups.items():
                size = sum(n for _, n in pairs)
                record[name + group] = sum(share * n for share, n in pairs) / size
            if not groups and shares:
                record[name] = None
        return record


def _component(path: str) -> str:
    return next(name for name in ("mixer", "glu", "head") if f"'{name}'" in path)


def jit_ternary_shares(config: ModelConfig) -> Callable[[Any, Any], tuple[Any, Any]]:
    """(params, trits before or None) -> (trits now, their shares by path), compiled."""
    return jax.jit(functools.partial(_ternary_shares, config=config))


def _ternary_shares(params: Any, before: Any, *, config: ModelConfig) -> tuple[Any, Any]:
    """Trits by path, and for each path its share of zeros, of changes, and its size."""
    leaves = jax.tree_util.tree_leaves_with_path(ternary_weights(params, config))
    names = {jax.tree_util.keystr(path): leaf for path, leaf in leaves}
    trits = {name: leaf for name, leaf in names.items() if name.endswith("['trits']")}
    shares = {}
    for name, now in trits.items():
        zero = jnp.mean((now == 0).astype(jnp.float32))
        changed = 0.0 if before is None else jnp.mean((now != before[name]).astype(jnp.float32))
        shares[name] = (zero, changed, float(now.size))
    return trits, shares


def _json_value(value: Any) -> Any:
    """JSON has no infinities: they become null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {k: _json_value(v) for k, v in value.items()}
    return value


def to_json_line(record: Record) -> str:
    """One line of metrics.jsonl."""
    return json.dumps(_json_value(record), ensure_ascii=False) + "\n"


def _keep_aside(path: Path) -> Path | None:
    """Gives a metrics.jsonl with records of steps another name; None: there is none."""
    with contextlib.suppress(TrainingError):  # a damaged one is kept too
        if not any(record.get("step") for record in read_history(path)):
            return None
    target, number = path.with_name(EARLIER_METRICS), 1
    while target.exists():
        name = f"{Path(EARLIER_METRICS).stem}-{number}{path.suffix}"
        target, number = path.with_name(name), number + 1
    return path.rename(target)


class History:
    """The run's metrics.jsonl. Opening it drops what lies beyond the step restored.

    Without such a step the records of an earlier start, which saved nothing, are kept aside.

    Attributes:
      kept_as: the file that has them; None: there are none.
    """

    def __init__(self, path: Path, restored_step: int) -> None:
        self.path = path
        with disk_errors(path):
            self.kept_as = None if restored_step else _keep_aside(path)
        found = read_history(path) if restored_step else []
        kept = [r for r in found if r.get("step", 0) <= restored_step]
        write_text(path, "".join(map(to_json_line, kept)))
        with disk_errors(path):
            self._file = path.open("a", encoding="utf-8")
        self.last: dict[str, Record] = {r["kind"]: r for r in kept if "kind" in r}
        """The newest record kept of each kind."""
        self.seconds = max((r.get("time_s") or 0.0 for r in kept), default=0.0)
        """Time the run had taken at the last record kept."""

    def write(self, record: Record) -> None:
        """Appends one record and hands it to the system, so that a kill cannot lose it."""
        try:
            self._file.write(to_json_line(record))
            self._file.flush()
        except OSError as e:
            raise TrainingError(
                f"{self.path} cannot be written: {e.strerror}; free some space and run the "
                "command again: it resumes"
            ) from e

    def sync(self) -> None:
        """Forces the records to disk, so that no checkpoint outlives them."""
        with contextlib.suppress(OSError):
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Closes the file."""
        with contextlib.suppress(OSError):
            self._file.close()
