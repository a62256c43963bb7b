"""Sizes and budgets that determine a quantity best: a sweep designed by Fisher information.

Candidates are the sweep's sizes (or the shapes of the ladder) at budgets of tokens that are the
same at all of them, by exact FLOPs; `scaling.optimal_design` chooses among them, and the choice
becomes the cells of a sweep's config.
"""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import yaml

from mmfree_jax.config import TrainConfig, replace_model, tokens_per_step
from mmfree_jax.data.row_source import open_rows
from mmfree_jax.errors import DataError
from mmfree_jax.experiments.scaling.identifiability import before_fit
from mmfree_jax.experiments.scaling.information import AssumedLaws, Quantity
from mmfree_jax.experiments.scaling.laws import get_law
from mmfree_jax.experiments.scaling.optimal_design import (
    Candidates,
    Design,
    Limits,
    criterion_of,
)
from mmfree_jax.experiments.sweep.cells import CellConfig, ReplicateConfig
from mmfree_jax.experiments.sweep.config import SweepConfig, base_train_config
from mmfree_jax.experiments.sweep.errors import SweepError
from mmfree_jax.experiments.sweep.family import FamilyConfig
from mmfree_jax.experiments.sweep.plan import flops_per_token
from mmfree_jax.experiments.sweep.planned_run import format_tokens
from mmfree_jax.experiments.sweep.shapes import ANY_SHAPE, shape_ladder
from mmfree_jax.train.flops import count_parameters

_BETWEEN_SIZES = 1.25  # smallest factor between the sizes that are taken of the ladder
_BETWEEN_BUDGETS = math.sqrt(2)
_OF_EVEN_GRID = range(
    3, 13
)  # sizes, and budgets a size, of the grids that a design is held against


@dataclass(frozen=True)
class Scope:
    """Where candidates lie."""

    count: str = "non-embedding"
    """Which parameters N means: "total", "non-embedding" or "ternary"."""
    params: tuple[float, float] = (1e6, 1e9)
    """Smallest and largest N, of the sizes that the sweep does not name."""
    tokens_per_parameter: tuple[float, float] = (2.0, 200.0)
    """Smallest and largest D / N."""
    tokens: float = math.inf
    """Most tokens of a run."""
    is_paired: bool = True
    """Whether all families are run in every cell."""


@dataclass(frozen=True)
class Point:
    """A candidate: one cell for one family or for all."""

    size: str
    tokens: float
    families: tuple[str, ...]
    params: tuple[float, ...]
    """N of each family's model."""
    trained: tuple[float, ...]
    """Tokens of each family's run, in whole steps."""
    flops: float
    """Training FLOPs of all its runs, every component, of all rates and axes that are tried."""
    runs: int


def corpus_tokens(sweep: SweepConfig) -> float:
    """Training tokens of the data, of the smallest set there is; infinite where none is here."""
    size = (sweep.named_sizes or (ANY_SHAPE,))[0]
    sets = {base_train_config(sweep, family, size).data.paths for family in sweep.families}
    try:
        return min(float(sum(open_rows(p).num_tokens for p in paths)) or math.inf
                   for paths in sets)  # fmt: skip
    except DataError:
        return math.inf


def points(sweep: SweepConfig, laws: AssumedLaws, scope: Scope, limits: Limits) -> list[Point]:
    """The candidates that are within the limits by themselves.

    Raises:
      SweepError: there are none.
      ConfigError: a shape needs learning rates that a family lacks.
    """
    families = [family for family in sweep.families if family.label in laws.families]
    low, high = scope.tokens_per_parameter
    found = []
    for size in _sizes(sweep, families[0], scope):
        configs = {f.label: base_train_config(sweep, f, size) for f in families}
        params = {label: _params(config, scope.count) for label, config in configs.items()}
        least, most = max(params.values()) * low, min(scope.tokens, min(params.values()) * high)
        for tokens in _budgets(least, most):
            runs = [_run(sweep, f, size, configs[f.label], tokens) for f in families]
            if any(run is None for run in runs):
                continue
            each = [
                Point(size, tokens, (f.label,), (params[f.label],), (run[0],), run[1], run[2])
                for f, run in zip(families, runs, strict=True) if run is not None
            ]  # fmt: skip
            found += [_together(each)] if scope.is_paired else each
    found = [point for point in found if point.flops <= limits.cost and point.runs <= limits.runs]
    if not found:
        raise SweepError(f"budget is {limits.cost:.3g} FLOPs, runs is {limits.runs}: no cell is "
                         "within both; raise them, or allow other sizes, tokens a parameter or "
                         "passes")  # fmt: skip
    return found


def _sizes(sweep: SweepConfig, family: FamilyConfig, scope: Scope) -> list[str]:
    if sweep.named_sizes:
        return list(sweep.named_sizes)
    base, counted = base_train_config(sweep, family, ANY_SHAPE), {}
    for size in shape_ladder():
        layers, width = map(int, size.split("x"))
        shaped = replace_model(base, num_layers=layers, hidden_size=width)
        counted[size] = _params(shaped, scope.count)
    kept: list[str] = []
    for size in sorted(counted, key=counted.__getitem__):
        far = not kept or counted[size] >= _BETWEEN_SIZES * counted[kept[-1]]
        if far and scope.params[0] <= counted[size] <= scope.params[1]:
            kept.append(size)
    return kept


def _params(config: TrainConfig, count: str) -> float:
    found = count_parameters(config.model)
    return float({"total": found.total, "non-embedding": found.non_embedding,
                  "ternary": found.ternary}[count])  # fmt: skip


def _budgets(least: float, most: float) -> list[float]:
    """Tokens between the two, of one list for all sizes, to four digits."""
    if not 0 < least <= most < math.inf:
        return []
    step = math.log(_BETWEEN_BUDGETS)
    first, last = math.ceil(math.log(least) / step), math.floor(math.log(most) / step)
    return [float(f"{math.exp(k * step):.4g}") for k in range(first, last + 1)]


def _run(
    sweep: SweepConfig, family: FamilyConfig, size: str, config: TrainConfig, tokens: float
) -> tuple[float, float, int] | None:
    """Tokens of a family's run in whole steps, FLOPs and number of its runs; None: too short."""
    settings = sweep.axes.settings()
    whole = sweep.axes.rows(config.batch_size) * config.data.seq_len
    trained = round(tokens / whole) * whole
    longest = max(tokens_per_step(setting.applied(config)) for setting in settings)
    if trained < sweep.min_steps * longest:
        return None
    tried = 1 if sweep.tuning.is_on else max(1, len(family.rates_at(size))) * len(settings)
    return float(trained), tried * trained * flops_per_token(config), tried


def _together(each: Sequence[Point]) -> Point:
    first = each[0]
    return Point(
        first.size, first.tokens, tuple(p.families[0] for p in each),
        tuple(p.params[0] for p in each), tuple(p.trained[0] for p in each),
        sum(p.flops for p in each), sum(p.runs for p in each),
    )  # fmt: skip


def as_candidates(found: Sequence[Point], laws: AssumedLaws, noise: float) -> Candidates:
    """What each cell would tell, for noise of that standard deviation in log loss."""
    rows = np.zeros((len(found), max(len(p.families) for p in found), laws.size))
    for i, point in enumerate(found):
        for r, family in enumerate(point.families):
            at = np.array([point.params[r]]), np.array([point.trained[r]])
            rows[i, r] = laws.gradient(family, *at)[0] / noise
    return Candidates(rows, np.array([p.flops for p in found]), np.array([p.runs for p in found]))


def best_even_grid(
    found: Sequence[Point], candidates: Candidates, gradient: np.ndarray | None, limits: Limits
) -> float:
    """The criterion of the best grid of sizes and tokens a parameter within the limits.

    Of so many sizes, evenly spaced in log N from the smallest on, and so many budgets each,
    evenly spaced in log D / N over the whole range. What a design without information would be.
    """
    by_size: dict[tuple[str, tuple[str, ...]], list[int]] = {}
    for i, point in enumerate(found):
        by_size.setdefault((point.size, point.families), []).append(i)
    sizes = list(dict.fromkeys(size for size, _ in by_size))
    best = math.inf
    for n in _OF_EVEN_GRID:
        for last in range(n, len(sizes) + 1):
            chosen = [sizes[j] for j in np.linspace(0, last - 1, n).round().astype(int)]
            for m in _OF_EVEN_GRID:
                counts = np.zeros(len(found))
                for (size, _), members in by_size.items():
                    if size in chosen:
                        at = np.linspace(0, len(members) - 1, m).round().astype(int)
                        counts[[members[k] for k in at]] = 1
                if counts @ candidates.cost > limits.cost or counts @ candidates.runs > limits.runs:
                    break
                best = min(best, criterion_of(candidates.information(counts), gradient))
    return best


def designed(sweep: SweepConfig, found: Sequence[Point], design: Design) -> SweepConfig:
    """The sweep with the design's cells in place of its sizes, budgets and replicates.

    One seed stays, and of sizes that are named elsewhere those that the design has.
    """
    cells = _cells(sweep, found, design)
    sizes = {cell.size for cell in cells}
    families = [
        dataclasses.replace(f, learning_rates_at={
            size: rates for size, rates in f.learning_rates_at.items() if size in sizes
        }) for f in sweep.families
    ]  # fmt: skip
    tuned = tuple(size for size in sweep.tuning.sizes if size in sizes)
    return dataclasses.replace(
        sweep, sizes=(), tokens=(), tokens_per_parameter=(), flop_budgets=(), cells=cells,
        seeds=sweep.seeds[:1], replicates=ReplicateConfig(), families=tuple(families),
        tuning=dataclasses.replace(sweep.tuning, sizes=tuned),
    )  # fmt: skip


def _cells(sweep: SweepConfig, found: Sequence[Point], design: Design) -> tuple[CellConfig, ...]:
    """From the smallest size on, those of one size, families and seeds together."""
    labels = {family.label for family in sweep.families}
    grouped: dict[tuple[str, tuple[str, ...], int], list[float]] = {}
    for point, count in zip(found, design.counts.astype(int), strict=True):
        if count:
            families = () if set(point.families) == labels else point.families
            grouped.setdefault((point.size, families, count), []).append(point.tokens)
    first = sweep.seeds[0]
    return tuple(
        CellConfig(size, tuple(tokens), families,
                   tuple(range(first, first + count)) if count > 1 else ())
        for (size, families, count), tokens in grouped.items()
    )  # fmt: skip


def settings_text(sweep: SweepConfig) -> str:
    """The YAML of a sweep's config: what differs from the defaults."""
    return yaml.safe_dump(_given(sweep), sort_keys=False, default_flow_style=None, width=100)


def _given(config: Any) -> dict[str, Any]:
    """A config's fields that are not as they are by default, as plain values."""
    out = {}
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        made = f.default_factory is not dataclasses.MISSING
        if value != (f.default_factory() if made else f.default):  # type: ignore[misc]
            out[f.name] = _plain(value)
    return out


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return _given(value)
    return [_plain(v) for v in value] if isinstance(value, tuple) else value


def design_text(
    quantity: Quantity | None, found: Sequence[Point], design: Design, even: float, scope: Scope,
    limits: Limits,
) -> str:  # fmt: skip
    """What a design promises, beside the best that there could be and an even grid."""
    if quantity is None:
        lines = ["all parameters: standard error along the axes of the confidence ellipsoid of "
                 "(log E, log A, log B, alpha, beta), geometric mean"]  # fmt: skip
    else:
        lines = [f"{quantity.name}: {quantity.value:.4g} under the assumed laws"]
    error = math.sqrt(design.criterion)
    lines.append(f"  standard error {error:.3g}; no choice among the {len(found)} candidates is "
                 f"below {math.sqrt(design.bound):.3g}")  # fmt: skip
    if math.isfinite(even):
        lines.append(f"  best even grid of sizes and tokens a parameter {math.sqrt(even):.3g}: "
                     f"{even / design.criterion:.3g} times the runs to be as sure")  # fmt: skip
    else:
        lines.append("  no even grid of sizes and tokens a parameter fits these limits")
    taken = [point for point, count in zip(found, design.counts, strict=True) if count]
    params = [n for point in taken for n in point.params]
    cost = sum(p.flops * k for p, k in zip(found, design.counts, strict=True))
    runs = sum(p.runs * k for p, k in zip(found, design.counts, strict=True))
    lines.append(
        f"  {runs:.0f} runs, {cost:.3g} of {limits.cost:.3g} FLOPs; {len({p.size for p in taken})} "
        f"sizes, N ({scope.count}) {min(params):.3g} to {max(params):.3g}, D "
        f"{format_tokens(min(p.tokens for p in taken))} to "
        f"{format_tokens(max(p.tokens for p in taken))}"
    )
    return "\n".join(lines)


def design_warnings(found: Sequence[Point], design: Design, laws: AssumedLaws) -> list[str]:
    """What fits of the design's runs could not tell, as `mmfree fit` would say it."""
    lines = []
    for family in laws.families:
        runs = [
            (n, d) for point, k in zip(found, design.counts.astype(int), strict=True)
            for name, n, d in zip(point.families, point.params, point.trained, strict=True)
            if name == family for _ in range(k)
        ]  # fmt: skip
        if runs:
            params, tokens = np.array(runs).T
            told = before_fit(get_law("chinchilla"), {"params": params, "tokens": tokens})
            lines += [f"{family}: {text}" for text in told]
    return lines
