"""From a sweep's config to its runs: a pure function of the config (and of tuned rates)."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mmfree_jax.config import TrainConfig, tokens_per_step
from mmfree_jax.errors import ConfigError
from mmfree_jax.experiments.sweep.axes import AS_GIVEN, Setting
from mmfree_jax.experiments.sweep.config import SweepConfig, base_train_config
from mmfree_jax.experiments.sweep.family import FamilyConfig
from mmfree_jax.experiments.sweep.planned_run import PlannedRun, Stage, config_hash
from mmfree_jax.experiments.sweep.rates import Choice
from mmfree_jax.experiments.sweep.shapes import ANY_SHAPE, Derived, derive_sizes
from mmfree_jax.train.flops import count_flops, count_parameters


@dataclass(frozen=True)
class Cell:
    """What main runs of one family have in common: a size and a budget."""

    size: str
    tokens: float
    budget: float | None
    """FLOPs, in isoFLOP designs."""
    seeds: tuple[int, ...]
    warming: float
    """Tokens whose share (`warmup_fraction`) warms up: its own, or in a branched sweep those of
    the shortest run of the size."""


def parameters(config: TrainConfig, count: str) -> int:
    """Parameters of a run's model, `total` or `non-embedding`."""
    found = count_parameters(config.model)
    return found.total if count == "total" else found.non_embedding


def flops_per_token(config: TrainConfig) -> float:
    """Training FLOPs a token, every component."""
    return count_flops(config.model, config.data.seq_len).training


def _cells(sweep: SweepConfig, family: FamilyConfig) -> list[Cell]:
    """The cells of one family's main runs."""
    if sweep.cells:
        found = [
            Cell(cell.size, tokens, None, cell.seeds or sweep.seeds, tokens)
            for cell in sweep.cells if family.label in (cell.families or (family.label,))
            for tokens in cell.tokens
        ]  # fmt: skip
    else:
        found = [
            Cell(size, tokens, budget, sweep.seeds, tokens)
            for size, tokens, budget in _grid(sweep, family)
        ]
    return _warmed_alike(found, _tuning_cells(sweep, family, found)) if sweep.is_branched else found


def _tuning_cells(sweep: SweepConfig, family: FamilyConfig, main: Sequence[Cell]) -> list[Cell]:
    """The cells of one family's tuning runs."""
    if not sweep.tuning.is_on:
        return []
    cells = []
    for size in sweep.tuning.sizes or tuple(dict.fromkeys(cell.size for cell in main)):
        tokens = sweep.tuning.tokens
        if tokens is None:
            assert sweep.tuning.tokens_per_parameter is not None
            base = base_train_config(sweep, family, size)
            tokens = sweep.tuning.tokens_per_parameter * parameters(base, sweep.count)
        cells.append(Cell(size, tokens, None, sweep.seeds[:1], tokens))
    return _warmed_alike(cells, main) if sweep.is_branched else cells


def _warmed_alike(cells: Sequence[Cell], others: Sequence[Cell]) -> list[Cell]:
    """`cells` with the warm-up of the shortest run of their size, here or among `others`."""
    return [
        dataclasses.replace(
            cell, warming=min(c.warming for c in (*cells, *others) if c.size == cell.size)
        )
        for cell in cells
    ]


def _grid(sweep: SweepConfig, family: FamilyConfig) -> list[tuple[str, float, float | None]]:
    """(size, tokens, budget) where all sizes have the same budgets."""

    def base(size: str) -> TrainConfig:
        return base_train_config(sweep, family, size)

    if sweep.tokens:
        return [(s, t, None) for s in sweep.sizes for t in sweep.tokens]
    ratios = sweep.tokens_per_parameter
    if not sweep.flop_budgets:
        sizes = [(s, parameters(base(s), sweep.count)) for s in sweep.sizes]
        return [(size, ratio * n, None) for size, n in sizes for ratio in ratios]
    if not sweep.sizes:
        return [
            (d.size, d.budget / flops_per_token(base(d.size)), d.budget)
            for d in derived_sizes(sweep).sizes
        ]
    low, high = (min(ratios), max(ratios)) if ratios else (0.0, math.inf)
    cells: list[tuple[str, float, float | None]] = []
    for budget in sweep.flop_budgets:
        every = [(size, budget / flops_per_token(base(size))) for size in sweep.sizes]
        chosen = [(size, tokens) for size, tokens in every
                  if low <= tokens / parameters(base(size), sweep.count) <= high]  # fmt: skip
        if not chosen:
            raise ConfigError(f"flop_budgets: {budget:.3g} FLOPs leave no size with {low:g} to "
                              f"{high:g} tokens a parameter; change either")  # fmt: skip
        cells += [(size, tokens, budget) for size, tokens in chosen]
    return cells


def derived_sizes(sweep: SweepConfig) -> Derived:
    """The sizes of a sweep that names none; nothing where it does.

    Raises:
      ConfigError: too few shapes at a budget.
    """
    if sweep.named_sizes:
        return Derived((), ())
    bases = [(f.label, base_train_config(sweep, f, ANY_SHAPE)) for f in sweep.families]
    return derive_sizes(bases, sweep.flop_budgets, sweep.tokens_per_parameter, sweep.count)


def _planned(
    sweep: SweepConfig, family: FamilyConfig, stage: Stage, cell: Cell, seed: int,
    setting: Setting = AS_GIVEN,
) -> PlannedRun:  # fmt: skip
    size, tokens = cell.size, cell.tokens
    base = base_train_config(sweep, family, size)
    config = setting.applied(base)
    rows = sweep.axes.rows(base.batch_size)

    def whole_steps(tokens: float) -> int:
        return round(tokens / (rows * base.data.seq_len)) * rows // config.batch_size

    steps = whole_steps(tokens)
    if steps < sweep.min_steps:
        raise ConfigError(
            f"{family.label} {size}: {tokens:.3g} tokens are {steps} steps of "
            f"{tokens_per_step(config)} tokens, fewer than min_steps ({sweep.min_steps}): raise "
            "the budget or lower the batch size"
        )
    warmup = setting.warmup_fraction
    warmup = sweep.warmup_fraction if warmup is None else warmup
    warmup_steps = round(warmup * whole_steps(cell.warming))
    optimizer = dataclasses.replace(config.optimizer, warmup_steps=warmup_steps)
    config = dataclasses.replace(
        config, steps=steps, seed=seed, optimizer=optimizer,
        data=dataclasses.replace(config.data, seed=seed),
    )  # fmt: skip
    flops = flops_per_token(config) * steps * tokens_per_step(config)
    return PlannedRun(stage, family.label, size, config, flops, cell.budget, False, setting)


def _tried(
    sweep: SweepConfig, family: FamilyConfig, stage: Stage, cell: Cell, seed: int
) -> list[PlannedRun]:
    """Every rate at every setting of the other axes."""
    return [
        run.with_rate(rate)
        for setting in sweep.axes.settings()
        for run in (_planned(sweep, family, stage, cell, seed, setting),)
        for rate in _rates(family, run)
    ]


def _rates(family: FamilyConfig, run: PlannedRun) -> tuple[float, ...]:
    listed = family.rates_at(run.size)
    if family.rate_rule.is_on and not listed:
        params = parameters(run.config, "non-embedding")
        return family.rate_rule.rates(family.label, params, run.tokens)
    return listed or (run.config.optimizer.learning_rate,)


def cheapest_first(runs: Sequence[PlannedRun]) -> list[PlannedRun]:
    """Cheapest first, so that an early end leaves the most finished runs."""
    return sorted(runs, key=lambda r: (r.flops, r.family, r.size, r.seed, r.learning_rate))


def tuning_runs(sweep: SweepConfig) -> list[PlannedRun]:
    """The runs that choose the learning rates; none without a tuning stage."""
    runs: list[PlannedRun] = []
    if not sweep.tuning.is_on:
        return runs
    for family in sweep.families:
        for cell in _tuning_cells(sweep, family, _cells(sweep, family)):
            runs += _tried(sweep, family, "tuning", cell, sweep.seeds[0])
    return cheapest_first(runs)


def main_runs(
    sweep: SweepConfig, choices: Mapping[tuple[str, str], Choice] | None = None
) -> list[PlannedRun]:
    """The runs that are compared.

    Args:
      sweep: the config.
      choices: with a tuning stage, the rates and other settings of (family, size) that are known.
    """
    runs: list[PlannedRun] = []
    for family in sweep.families:
        for cell in _cells(sweep, family):
            size = cell.size
            more = sweep.replicates.seeds if size in sweep.replicates.sizes else ()
            for seed in dict.fromkeys((*cell.seeds, *more)):
                if not sweep.tuning.is_on:
                    runs += _tried(sweep, family, "main", cell, seed)
                elif choice := (choices or {}).get((family.label, size)):
                    run = _planned(sweep, family, "main", cell, seed, choice.setting)
                    runs.append(run.with_rate(choice.rate))
                else:
                    any_setting = sweep.axes.settings()[0]
                    runs.append(_planned(sweep, family, "main", cell, seed, any_setting))
    runs = cheapest_first(runs)
    _check_names(runs)
    return runs


def without_repeats(sweep: SweepConfig, runs: Sequence[PlannedRun]) -> list[PlannedRun]:
    """`runs`, each once, without the main runs that tuning runs will turn out to be.

    Under the rule `grid` the rate of a main run at a tuned size is one of those tried, so that
    at the tuning budget and seed the run exists already.
    """
    tuned = {(r.family, r.size, r.tokens, r.seed) for r in tuning_runs(sweep)}
    grid = sweep.tuning.rule == "grid"
    left = [
        run for run in runs
        if run.rate_known or not grid or run.stage == "trunk"
        or (run.family, run.size, run.tokens, run.seed) not in tuned
    ]  # fmt: skip
    return list({(run.name, run.flops): run for run in left}.values())


def _check_names(runs: Sequence[PlannedRun]) -> None:
    seen: dict[str, str] = {}
    for run in runs:
        digest = config_hash(run.config)
        if run.name in seen:
            what = "twice" if seen[run.name] == digest else "for two different runs"
            raise ConfigError(f"plan: the name {run.name} occurs {what}: two budgets are closer "
                              "than a step or four digits; leave one out")  # fmt: skip
        seen[run.name] = digest


def shard(
    sweep: SweepConfig, runs: Sequence[PlannedRun], index: int, count: int
) -> list[PlannedRun]:
    """Every `count`-th run from the `index`-th (from 0): disjoint, complete, about equal.

    Where the runs of a cell decide about each other (`widen_rates`, `halving`), every `count`-th
    cell instead, so that one shard has all that a decision needs. In a branched
    sweep a trunk and its branches are one part; with both, all runs of a size.
    """

    def part(run: PlannedRun) -> tuple[str, ...]:
        if sweep.is_branched:
            return (run.family, run.size) if sweep.is_adaptive else (run.trunk or run.name,)
        return tuple(map(str, run.cell)) if sweep.is_adaptive else (run.name,)

    own = set(list(dict.fromkeys(map(part, runs)))[index::count])
    return [run for run in runs if part(run) in own]


def parse_shard(text: str | None) -> tuple[int, int]:
    """ "i/n" with i from 0 to n - 1, as SLURM counts; None is "0/1".

    Raises:
      ConfigError: it is anything else.
    """
    if text is None:
        return 0, 1
    first, _, second = text.partition("/")
    if first.isdecimal() and second.isdecimal() and int(first) < int(second):
        return int(first), int(second)
    raise ConfigError(f"shard is {text!r}: give --shard i/n with i from 0 to n - 1, such as 0/4")
