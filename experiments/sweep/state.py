"""What a sweep's folder says: which runs are done, failed, cut off or under way.

The folder holds results.csv, and for each run: configs/NAME.yaml (as the trainer got it),
runs/NAME/ (its run directory; trunks/NAME/ of a trunk, which gets no row), logs/NAME.log (what
it printed), failures/NAME.json (why it failed, gone once it succeeds), pauses/NAME.json (its losses
where it paused) and locks/NAME.lock (held while it runs).
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from mmfree_jax.config import TrainConfig, replace_model
from mmfree_jax.config_io import from_dict, read_yaml
from mmfree_jax.data.mqar import is_mqar
from mmfree_jax.data.row_source import open_rows
from mmfree_jax.errors import ConfigError, DataError
from mmfree_jax.experiments.sweep.axes import Setting
from mmfree_jax.experiments.sweep.branches import (
    TRUNKS,
    trunk_data,
    trunk_hash,
    trunk_state,
    trunks_first,
    up_to,
    with_trunks,
)
from mmfree_jax.experiments.sweep.config import SweepConfig
from mmfree_jax.experiments.sweep.errors import SweepError
from mmfree_jax.experiments.sweep.pauses import Halved, halve, read_pauses
from mmfree_jax.experiments.sweep.plan import (
    cheapest_first,
    main_runs,
    parameters,
    tuning_runs,
    without_repeats,
)
from mmfree_jax.experiments.sweep.planned_run import PlannedRun, config_hash, data_name
from mmfree_jax.experiments.sweep.rates import Choice, choose_rates
from mmfree_jax.experiments.sweep.table import RESULTS, Row, read_results
from mmfree_jax.experiments.sweep.widening import widened
from mmfree_jax.files import is_locked
from mmfree_jax.json_shape import fault
from mmfree_jax.places import locate
from mmfree_jax.storage import Url, find_object
from mmfree_jax.text_files import read_json

Status = Literal[
    "done", "failed", "running", "cut off", "paused", "dropped", "pending", "waiting"
]  # fmt: skip


@dataclass(frozen=True)
class Snapshot:
    """A sweep's plan and how far it has come."""

    sweep: SweepConfig
    rows: dict[str, Row]
    """The table, by run."""
    failures: dict[str, dict[str, Any]]
    """Why runs failed, by run."""
    tuning: list[PlannedRun]
    main: list[PlannedRun]
    choices: dict[tuple[str, str], Choice]
    """Tuned rates, as far as the tuning runs behind them have ended."""
    trunks: list[PlannedRun] = field(default_factory=list)
    """Of a branched sweep: what main runs branch from."""
    halved: Halved = field(default_factory=Halved)
    """Which tuning runs pause, and which have ended at a pause."""

    @property
    def runs(self) -> list[PlannedRun]:
        """All runs, each once: a main run may be one of the tuning runs."""
        return without_repeats(self.sweep, (*self.tuning, *self.of_stage("main")))

    def of_stage(self, stage: Literal["tuning", "main"]) -> list[PlannedRun]:
        """The runs of a stage; among the main ones each trunk before its branches."""
        return self.tuning if stage == "tuning" else trunks_first(self.trunks, self.main)

    def left_of(self, trunk: str) -> list[PlannedRun]:
        """The branches of a trunk that are not in the table."""
        return [r for r in self.main if r.trunk == trunk and r.name not in self.rows]

    def loss(self, run: PlannedRun) -> float | None:
        """A run's held-out loss; infinite where it diverged, None while that is not known."""
        return _loss(self.rows, self.failures, run)

    def status(self, run: PlannedRun) -> Status:
        """How far one run has come."""
        out = Path(self.sweep.out)
        if not run.rate_known:
            return "waiting"
        if run.name in self.rows or (run.stage == "trunk" and self._has_served(run)):
            return "done"
        if is_locked(out / "locks" / f"{run.name}.lock"):
            return "running"
        if _failure_of(self.failures, run) is not None:
            return "failed"
        if run.name in self.halved.dropped:
            return "dropped"
        if run.name in self.halved.paused:
            return "paused"
        if (run_folder(out, run) / "metrics.jsonl").exists():
            return "cut off"
        if run.trunk is not None and not trunk_state(out, run.trunk).is_ready_for(run):
            return "waiting"
        return "pending"

    def _has_served(self, trunk: PlannedRun) -> bool:
        """Whether all the branches that are left can start."""
        left = self.left_of(trunk.name)
        state = trunk_state(Path(self.sweep.out), trunk.name) if left else None
        return state is None or all(map(state.is_ready_for, left))


def run_folder(out: Path, run: PlannedRun) -> Path:
    """The run directory of a run, or of a trunk."""
    return out / (TRUNKS if run.stage == "trunk" else "runs") / run.name


def data_fingerprint(run: PlannedRun) -> str | None:
    """The `data_name` of a run's data; None before they are there.

    Raises:
      DataError: the data are there and damaged.
    """
    paths = run.config.data.paths
    if not paths or not all(map(_is_there, paths)):
        return None
    return data_name(open_rows(p).fingerprint for p in paths)


def settings_hash(run: PlannedRun) -> str:
    """`config_hash` of a run, of a trunk `trunk_hash`."""
    return (trunk_hash if run.stage == "trunk" else config_hash)(run.config)


def _failure_of(failures: Mapping[str, dict[str, Any]], run: PlannedRun) -> dict[str, Any] | None:
    """Why a run failed; None: it did not, or under other settings, or these are not known yet.

    Records of older versions do not say under which, and count.
    """
    failure = failures.get(run.name)
    made = None if failure is None else failure.get("config_hash")
    return failure if made in (None, settings_hash(run)) else None


def _is_there(path: str) -> bool:
    if is_mqar(path):
        return True
    place = locate(path, "data.paths")
    if isinstance(place, Url):
        return find_object(place / "index.json") is not None
    return (place / "index.json").is_file()


def read_failures(out: Path) -> dict[str, dict[str, Any]]:
    """Why runs failed, by name: kind ("diverged", "memory", "error"), reason, code, time, host."""
    found = {}
    for path in sorted((out / "failures").glob("*.json")):
        try:
            found[path.stem] = read_json(path)
        except (OSError, ValueError) as e:
            raise SweepError(f"{path} cannot be read ({e}); delete it") from e
        if wrong := fault(found[path.stem], {"kind": str, "reason": str}):
            raise SweepError(f"{path} is damaged ({wrong}); delete it")
    return found


def snapshot(sweep: SweepConfig) -> Snapshot:
    """Reads a sweep's folder.

    Raises:
      SweepError: the table is damaged, or holds runs of another config or of other data.
      ConfigError: the plan is impossible.
    """
    out = Path(sweep.out)
    rows = {row["run"]: row for row in read_results(out)}
    failures = {k: v for k, v in read_failures(out).items() if k not in rows}
    loss_of = functools.partial(_loss, rows, failures)

    def loss_of_branch(run: PlannedRun) -> float | None:
        """As `loss_of`, and infinite where the trunk diverged that it would branch from."""
        failed = _failed_trunk(out, failures, run, run.trunk_name) if sweep.is_branched else None
        diverged = failed is not None and failed["kind"] == "diverged"
        return math.inf if diverged and run.name not in rows else loss_of(run)

    def wider(
        runs: Sequence[PlannedRun], loss_of: Callable[[PlannedRun], float | None]
    ) -> list[PlannedRun]:
        most, seed = sweep.widen_rates, sweep.seeds[0]
        return cheapest_first(widened(runs, loss_of, most=most, first_seed=seed))

    tuning = tuning_runs(sweep)
    halved = Halved()
    if sweep.halving.is_on:
        of_paths = {run.config.data.paths: run for run in tuning}
        data = {paths: data_fingerprint(run) for paths, run in of_paths.items()}
        losses = {r.name: read_pauses(out, r, data=data[r.config.data.paths]) for r in tuning}
        halved = halve(tuning, sweep.halving, lambda r, step: losses[r.name].get(step), loss_of)

    def loss_of_tuning(run: PlannedRun) -> float | None:
        return math.inf if run.name in halved.dropped else loss_of(run)

    tuning = wider(tuning, loss_of_tuning)
    choices = _choices(sweep, tuning, loss_of_tuning, halved.dropped)
    main = main_runs(sweep, choices)
    if not sweep.tuning.is_on:
        main = wider(main, loss_of_branch)
    trunks: list[PlannedRun] = []
    if sweep.is_branched:
        kept = {run.name for run in without_repeats(sweep, main)}
        alone = {run.name for run in tuning} | {r.name for r in main if r.name not in kept}
        trunks, main = with_trunks(main, alone)
        for run in main:
            failed = _failed_trunk(out, failures, run, run.trunk)
            if failed is not None and run.name not in rows and not _failure_of(failures, run):
                failures[run.name] = failed
    found = Snapshot(sweep, rows, failures, tuning, main, choices, trunks, halved)
    _check_rows(found)
    for trunk in trunks:
        if found.left_of(trunk.name):
            _check_trunk(trunk, run_folder(out, trunk))
    return found


def _failed_trunk(
    out: Path, failures: dict[str, dict[str, Any]], run: PlannedRun, trunk: str | None
) -> dict[str, Any] | None:
    """Why a trunk failed before it came to where a run branches; None where it did not."""
    failure = None
    if trunk in failures:
        failure = _failure_of(failures, up_to(run, [max(1, run.full_rate_steps)]))
    if failure is None or trunk_state(out, trunk or "").is_ready_for(run):
        return None
    return {
        **failure,
        "config_hash": config_hash(run.config),
        "reason": f"its trunk {trunk} failed: {failure['reason']}",
    }


def _loss(
    rows: dict[str, Row], failures: dict[str, dict[str, Any]], run: PlannedRun
) -> float | None:
    if run.name in rows:
        return float(rows[run.name]["loss"])
    return math.inf if (_failure_of(failures, run) or {}).get("kind") == "diverged" else None


def _check_rows(found: Snapshot) -> None:
    """Rows of the same name must be of the same settings and data."""
    path, fingerprints = Path(found.sweep.out) / RESULTS, {}
    for run in found.runs:
        row = found.rows.get(run.name)
        if row is None:
            continue
        said = {"family": run.family, "size": run.size, "seed": str(run.seed)}
        if changed := [name for name, value in said.items() if row[name] != value]:
            raise SweepError(f"{path}: {run.name} has {changed[0]} {row[changed[0]]!r}, where its "
                             f"name says {said[changed[0]]!r}: restore the file")  # fmt: skip
        if run.rate_known and not math.isclose(float(row["learning_rate"]), run.learning_rate,
                                               rel_tol=1e-6):  # fmt: skip
            raise SweepError(f"{path}: {run.name} has learning_rate {row['learning_rate']}, where "
                             f"its plan says {run.learning_rate:g}: restore the file")  # fmt: skip
        if row["config_hash"] != config_hash(run.config):
            way_out = "give another --out"
            if row["config_hash"] == config_hash(replace_model(run.config, vocab_size=32_000)):
                # Rungs and shapes had it once, whatever their data.
                way_out = "set train.model.vocab_size to 32000, as it was, or " + way_out
            raise SweepError(f"{path}: {run.name} was run with other settings (hash "
                             f"{row['config_hash']}): {way_out}")  # fmt: skip
        paths = run.config.data.paths
        if paths not in fingerprints:
            fingerprints[paths] = data_fingerprint(run)
        now = fingerprints[paths]
        if now is not None and row["data_fingerprint"] != now:
            raise SweepError(f"{path}: {run.name} was run on other data ({row['data_fingerprint']},"
                             f" now {now}): give another --out")  # fmt: skip


def _check_trunk(trunk: PlannedRun, folder: Path) -> None:
    """What is there of a trunk must be of the same settings and data: its branches rest on it."""
    try:
        there = from_dict(TrainConfig, read_yaml(folder / "config.yaml"))
    except ConfigError:  # not begun, or the trainer says what is wrong with it
        return
    if trunk_hash(there) != trunk_hash(trunk.config):
        raise SweepError(f"{folder} is a trunk of other settings: give another --out, or delete it")
    if (made_on := trunk_data(folder)) is not None and data_fingerprint(trunk) not in (
        None, made_on,
    ):  # fmt: skip
        raise SweepError(f"{folder} is a trunk that was trained on other data ({made_on}): give "
                         "another --out, or delete it")  # fmt: skip


def _choices(
    sweep: SweepConfig,
    tuning: Sequence[PlannedRun],
    loss_of: Callable[[PlannedRun], float | None],
    dropped: frozenset[str],
) -> dict[tuple[str, str], Choice]:
    """The rates that are known: of a tuned size once its tuning runs are all in the table or
    diverged, of the other sizes once those of the whole family are."""
    tried: dict[tuple[str, str], dict[Setting, dict[float, float]]] = {}
    unfinished = set()
    for run in tuning:
        by_setting, loss = tried.setdefault((run.family, run.size), {}), loss_of(run)
        if loss is None:
            unfinished.add((run.family, run.size))
        else:
            by_setting.setdefault(run.setting, {})[run.learning_rate] = loss
    open_families = {family for family, _ in unfinished}
    sizes = {(r.family, r.size): float(parameters(r.config, "non-embedding"))
             for r in (*main_runs(sweep), *tuning)}  # fmt: skip
    tuned = {key: losses for key, losses in tried.items() if key not in unfinished}
    wanted = {key: n for key, n in sizes.items()
              if key in tuned or (key not in tried and key[0] not in open_families)}  # fmt: skip
    chosen = choose_rates(tuned, wanted, sweep.tuning.rule)
    for key, choice in chosen.items():
        own = [r for r in tuning if (r.family, r.size, r.setting) == (*key, choice.setting)]
        if own and not choice.is_transferred:
            lost = tuple(run.learning_rate for run in own if run.name in dropped)
            chosen[key] = dataclasses.replace(choice, tokens=own[0].tokens, dropped=lost)
    return chosen


def check_data(runs: Sequence[PlannedRun]) -> dict[tuple[str, ...], int]:
    """Training tokens of each set of data folders that the runs use, checked to be there.

    Raises:
      DataError: there is none, or it does not fit the models.
    """
    found: dict[tuple[str, ...], int] = {}
    for run in runs:
        data = run.config.data
        if data.paths in found:
            continue
        if not data.paths:
            raise DataError("train.data.paths is empty: name a folder from `mmfree data prepare`, "
                            "in the config or with --data")  # fmt: skip
        found[data.paths] = sum(open_rows(p).num_tokens for p in data.paths)
    return found
