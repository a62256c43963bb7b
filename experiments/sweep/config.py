"""Every setting of a sweep, as frozen dataclasses that check themselves; YAML in.

Strict as `TrainConfig`: an unknown key or a value of the wrong type is a `ConfigError` that
names it. `train` and a family's `train` are settings of `TrainConfig`, nested as in a
training config.
"""

import dataclasses
import os
from dataclasses import dataclass, field
from itertools import product
from typing import Literal

from mmfree_jax.config import TrainConfig, replace_model
from mmfree_jax.config_io import from_dict, read_yaml, underscored
from mmfree_jax.data.vocabulary import gives_vocabulary, with_data_vocabulary
from mmfree_jax.errors import ConfigError
from mmfree_jax.experiments.sweep.axes import AxesConfig
from mmfree_jax.experiments.sweep.cells import SHAPE, CellConfig, ReplicateConfig, check_size
from mmfree_jax.experiments.sweep.family import FamilyConfig
from mmfree_jax.experiments.sweep.halving import HalvingConfig
from mmfree_jax.places import PlaceOrUrl
from mmfree_jax.presets import names_vocabulary, preset
from mmfree_jax.ranges import (
    AboveZero,
    CountOrZero,
    NotNegative,
    PositiveShare,
    Seed,
    ShareBelowOne,
    TwoOrMore,
    check_numbers,
    require,
    require_distinct,
)

# What the plan itself decides; `train` may not.
_PLANNED = ("run_dir", "steps", "seed", "init_from", "branch_from", "max_minutes", "stop_at")


@dataclass(frozen=True)
class TuningConfig:
    """Choose each size's learning rate by short runs, before the others.

    Off (no tokens given): every rate is tried in every cell of the plan.
    """

    tokens: AboveZero | None = None
    """Length of a tuning run (tokens)."""
    tokens_per_parameter: AboveZero | None = None
    """The same in tokens a parameter."""
    sizes: tuple[str, ...] = ()
    """Sizes to tune at; empty: all. The others' rate follows from these (docs/sweeps.md)."""
    rule: Literal["grid", "parabola"] = "grid"
    """grid: the rate of lowest held-out loss; parabola: the lowest point of the parabola in log
    rate through that rate and its two neighbours."""

    @property
    def is_on(self) -> bool:
        """Whether there is a tuning stage."""
        return self.tokens is not None or self.tokens_per_parameter is not None

    def __post_init__(self) -> None:
        both = self.tokens is not None and self.tokens_per_parameter is not None
        require(not both, "tuning.tokens", self.tokens, "give it or tokens_per_parameter")
        check_numbers(self, "tuning.")
        require(self.is_on or not self.sizes, "tuning.sizes", list(self.sizes),
                "set tuning.tokens or tuning.tokens_per_parameter as well")  # fmt: skip
        require_distinct("tuning.sizes", self.sizes)


@dataclass(frozen=True)
class SweepConfig:
    """A set of runs: families x sizes x budgets x learning rates x seeds."""

    out: PlaceOrUrl = "sweeps/default"
    """Folder of the results table, the runs, their logs and the compilation cache, or its URL in a
    bucket."""
    families: tuple[FamilyConfig, ...] = ()
    """Families to compare."""
    sizes: tuple[str, ...] = ()
    """Presets ("rung-7M") or shapes "LAYERSxWIDTH" ("8x256"). Empty: derived from flop_budgets
    and tokens_per_parameter."""
    tokens: tuple[AboveZero, ...] = ()
    """Token budgets, each at every size."""
    tokens_per_parameter: tuple[AboveZero, ...] = ()
    """Alone: budgets as tokens a parameter. With flop_budgets: the ratios that derive sizes,
    or, with sizes, the range in which a size must lie to be run at a budget."""
    flop_budgets: tuple[AboveZero, ...] = ()
    """Training FLOPs (every component, 3 x forward), each spent at several sizes."""
    cells: tuple[CellConfig, ...] = ()
    """Sizes with budgets of their own, in place of `sizes` and of budgets for all of them."""
    count: Literal["non-embedding", "total"] = "non-embedding"
    """Which parameters tokens_per_parameter means."""
    seeds: tuple[Seed, ...] = (0,)
    """Seeds of the initialisation and of the order of the data."""
    replicates: ReplicateConfig = field(default_factory=ReplicateConfig)
    tuning: TuningConfig = field(default_factory=TuningConfig)
    halving: HalvingConfig = field(default_factory=HalvingConfig)
    """End the worse of a size's tuning runs early."""
    widen_rates: CountOrZero = 0
    """Most rates to add at each end of a list of rates while the best one is at that end; 0:
    none, the best one is marked."""
    axes: AxesConfig = field(default_factory=AxesConfig)
    """Settings to try beside the rate."""
    schedule: Literal["train", "wsd-branched"] = "train"
    """train: each run by itself, under train.optimizer.schedule. wsd-branched: constant rate, then
    a decay over train.optimizer.decay_fraction of the steps; runs that differ in their budget
    alone share the steps before it, made once by a trunk."""
    warmup_fraction: ShareBelowOne = 0.0
    """Share of the steps of each run that warm up; wsd-branched: of the shortest of its size."""
    min_steps: TwoOrMore = 10
    """Fewest steps that a run may come to."""
    pack_below: NotNegative = 2e7
    """Runs of at most this many non-embedding parameters share a device under --parallel; a
    larger one runs alone."""
    keep_checkpoints: bool = True
    """Keep the checkpoints of runs that are in the table."""
    utilisation: PositiveShare = 0.2
    """For the time estimate on a device in the table of data sheets: model FLOPs utilisation at
    width 1024 and above; narrower models are taken to reach it in proportion to their width."""
    overhead_seconds: NotNegative = 30.0
    """For the time estimate: start, compilation and evaluation of one run (seconds)."""
    train: dict = field(default_factory=dict)
    """Settings common to all runs, over the presets (data, batch_size, eval, ...)."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "train", underscored(self.train, "train"))
        check_numbers(self)
        require(bool(self.out), "out", self.out, "name a folder")
        require(bool(self.families), "families", [], "give at least one, such as "
                "- {base: matmulfree}")  # fmt: skip
        require_distinct("families.name", tuple(f.label for f in self.families))
        require_distinct("sizes", self.sizes)
        for name in ("tokens", "tokens_per_parameter", "flop_budgets"):
            require_distinct(name, getattr(self, name))
        kinds = [n for n in ("tokens", "tokens_per_parameter", "flop_budgets", "cells")
                 if getattr(self, n)]  # fmt: skip
        require(
            len(kinds) == 1 or kinds == ["tokens_per_parameter", "flop_budgets"],
            "budgets",
            kinds,
            "give tokens, or tokens_per_parameter, or flop_budgets (with tokens_per_parameter), or "
            "cells",
        )
        require(bool(self.sizes) or bool(self.cells) or len(kinds) == 2, "sizes", [],
                "name some, or give flop_budgets and tokens_per_parameter")  # fmt: skip
        for size in (*self.sizes, *self.tuning.sizes, *self.replicates.sizes):
            check_size(size)
        named = self.named_sizes
        if named:
            for family in self.families:
                unknown = set(family.learning_rates_at) - set(named)
                require(not unknown, "families.learning_rates_at", sorted(unknown),
                        f"choose among sizes ({', '.join(named)})")  # fmt: skip
            for name in ("tuning", "replicates"):
                unknown = set(getattr(self, name).sizes) - set(named)
                require(not unknown, f"{name}.sizes", sorted(unknown),
                        f"choose among sizes ({', '.join(named)})")  # fmt: skip
        require(bool(self.seeds), "seeds", [], "give at least one")
        self._check_cells()
        require_distinct("seeds", self.seeds)
        again = set(self.seeds) & set(self.replicates.seeds)
        require(not again, "replicates.seeds", sorted(again), "use seeds that `seeds` lacks")
        if self.tuning.is_on:
            bare = [f.label for f in self.families if not f.has_rates]
            require(not bare, "families.learning_rates", bare, "tuning needs rates to try")
        both = self.warmup_fraction > 0 and self.axes.warmup_fraction
        require(not both, "warmup_fraction", self.warmup_fraction,
                "leave it out, or axes.warmup_fraction")  # fmt: skip
        require(self.tuning.is_on or not self.halving.is_on, "halving.eta", self.halving.eta,
                "set tuning.tokens as well: it ends tuning runs")  # fmt: skip
        if self.widen_rates:
            lists = [rates for f in self.families
                     for rates in (f.rate_rule.around if f.rate_rule.is_on else f.learning_rates,
                                   *f.learning_rates_at.values())]  # fmt: skip
            require(all(len(rates) > 1 for rates in lists), "widen_rates", self.widen_rates,
                    "give each family two rates or more, whose ratio goes on")  # fmt: skip
        for i, family in enumerate(self.families):
            for where, values in (("train", self.train), (f"families[{i}].train", family.train)):
                for name in _PLANNED:
                    require(name not in values, f"{where}.{name}", values.get(name),
                            "leave it out: the plan sets it")  # fmt: skip
                given = values.get("optimizer", {})
                for name in self.axes.given:
                    twice = name in values or (isinstance(given, dict) and name in given)
                    require(not twice, f"axes.{name}", list(self.axes.given[name]),
                            f"leave it out of {where}, which sets it too")  # fmt: skip
                in_optimizer = given if isinstance(given, dict) else {}
                for name in ("learning_rate", "warmup_steps"):
                    require(name not in in_optimizer, f"{where}.optimizer.{name}",
                            in_optimizer.get(name),
                            "families.learning_rates, warmup_fraction stand for it")  # fmt: skip
                self._check_schedule(where, given)
            for size in named:
                base_train_config(self, family, size)

    def _check_schedule(self, where: str, optimizer: object) -> None:
        if not self.is_branched or not isinstance(optimizer, dict):
            return
        schedule = optimizer.get("schedule", "wsd")
        require(schedule == "wsd", f"{where}.optimizer.schedule", schedule,
                "leave it out: schedule is wsd-branched")  # fmt: skip

    @property
    def is_adaptive(self) -> bool:
        """Whether runs of a cell decide which others are made."""
        return self.widen_rates > 0 or self.halving.is_on

    @property
    def is_branched(self) -> bool:
        """Whether runs of several budgets are decays branched from one trunk."""
        return self.schedule == "wsd-branched"

    @property
    def named_sizes(self) -> tuple[str, ...]:
        """The sizes that are named, each once; none where the plan derives them."""
        return self.sizes or tuple(dict.fromkeys(cell.size for cell in self.cells))

    def _check_cells(self) -> None:
        require(
            not (self.cells and self.sizes),
            "sizes",
            list(self.sizes),
            "leave it out: cells name theirs",
        )
        labels = [family.label for family in self.families]
        seen: set[tuple[str, str, float, int]] = set()
        for cell in self.cells:
            unknown = set(cell.families) - set(labels)
            require(not unknown, "cells.families", sorted(unknown),
                    f"choose among families ({', '.join(labels)})")  # fmt: skip
            require(not cell.seeds or self.seeds[0] in cell.seeds, "cells.seeds", list(cell.seeds),
                    f"keep {self.seeds[0]}, the first of `seeds`")  # fmt: skip
            for key in product(cell.families or labels, [cell.size], cell.tokens,
                               cell.seeds or self.seeds):  # fmt: skip
                require(key not in seen, "cells", f"{key[1]} at {key[2]:g} tokens",
                        f"give it once for {key[0]} and seed {key[3]}")  # fmt: skip
                seen.add(key)


def base_train_config(sweep: SweepConfig, family: FamilyConfig, size: str) -> TrainConfig:
    """The training config of one family at one size, before budget, rate and seed.

    A shape or a rung has the vocabulary of its data where `train` names none and they are there.

    Raises:
      ConfigError: a setting in `train` is unknown or malformed, or a bare shape has no rate.
      DataError: the data are damaged.
    """
    suffix = "-transformer" if family.base == "transformer" else ""
    shape = SHAPE.fullmatch(size)
    if shape:
        layers, width = map(int, shape.groups())
        config = preset("rung-1M" + suffix)
        config = replace_model(config, num_layers=layers, hidden_size=width)
        require(family.has_rates, "families.learning_rates", [],
                f"give some: the shape {size} has no preset rate")  # fmt: skip
    else:
        config = preset(size + suffix)
    config = from_dict(TrainConfig, sweep.train, config, "train")
    config = from_dict(TrainConfig, family.train, config, f"families.{family.label}.train")
    if sweep.is_branched:
        optimizer = dataclasses.replace(config.optimizer, schedule="wsd")
        config = dataclasses.replace(config, optimizer=optimizer)
        warmup = max((sweep.warmup_fraction, *sweep.axes.warmup_fraction))
        require(0 < optimizer.decay_fraction < 1 - warmup, "train.optimizer.decay_fraction",
                optimizer.decay_fraction,
                "use one above 0 that leaves steps between warm-up and decay")  # fmt: skip
        _check_shared(config)
    return with_data_vocabulary(config) if leaves_vocabulary(sweep, family, size) else config


def _check_shared(config: TrainConfig) -> None:
    """Refuses what would come at another step in each of the budgets that share a trunk."""
    optimizer, quantizer = config.optimizer, config.quantizer
    for name, value, default in (
        ("optimizer.second_stage_at", optimizer.second_stage_at, 1),
        ("optimizer.weight_decay_until", optimizer.weight_decay_until, 1),
        ("quantizer.float_fraction", quantizer.float_fraction, 0),
        ("quantizer.warmup_fraction", quantizer.warmup_fraction, 0),
    ):
        require(value == default, f"train.{name}", value,
                "leave it out, or set schedule: train: it is a share of each run's own steps, and "
                "wsd-branched makes those before the decay once for all budgets")  # fmt: skip


def leaves_vocabulary(sweep: SweepConfig, family: FamilyConfig, size: str) -> bool:
    """Whether the vocabulary of a family at a size is up to the data."""
    named = gives_vocabulary(sweep.train) or gives_vocabulary(family.train)
    return not named and (SHAPE.fullmatch(size) is not None or not names_vocabulary(size))


def load_sweep(
    path: str | os.PathLike[str], *, out: str | None = None, data: tuple[str, ...] = ()
) -> SweepConfig:
    """Reads a sweep from a YAML file.

    Args:
      path: the file.
      out: takes the place of its `out`.
      data: takes the place of its `train.data.paths`.

    Raises:
      ConfigError: the file is missing, is not YAML, or a field is unknown or malformed.
    """
    values = read_yaml(path)
    if not isinstance(values, dict):
        raise ConfigError(f"config file {path}: give a mapping of fields, not {values!r}")
    try:
        if out is not None:
            values["out"] = out
        if data:
            train = values.setdefault("train", {})
            section = train.setdefault("data", {}) if isinstance(train, dict) else None
            if not isinstance(section, dict):
                raise ConfigError(f"train.data is {section!r}: give a mapping of fields")
            section["paths"] = list(data)
        return from_dict(SweepConfig, values)
    except ConfigError as e:
        raise ConfigError(f"config file {path}: {e}") from e
