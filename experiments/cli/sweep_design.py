"""`mmfree sweep design`."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from mmfree_jax.cli.parse import parse
from mmfree_jax.places import PlaceOrUrl
from mmfree_jax.ranges import AboveZero, Count

if TYPE_CHECKING:
    from mmfree_jax.experiments.scaling.information import AssumedLaws, Quantity
    from mmfree_jax.experiments.sweep.config import SweepConfig

_DESCRIPTION = """Chooses the sizes and budgets of a sweep that determine a quantity best within so
many FLOPs, by Fisher information at laws that are assumed, and writes them as a sweep's config."""


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Options of `mmfree sweep design`."""

    config: Annotated[Path, tyro.conf.Positional]
    """YAML file of a sweep, for its families, rates, training settings, and its sizes where it
    names some (else shapes of the ladder); its budgets are replaced."""
    budget: AboveZero
    """Training FLOPs of all main runs together (every component, 3 x forward)."""
    quantity: Literal["alpha", "beta", "a", "floor", "loss", "gap", "crossing", "all"] = "a"
    """What to determine: an exponent, a of N* ~ C^a, the floor E, the least loss at a compute, the
    gap of two families there, where they cross; all: every parameter (D-optimality)."""
    assume: tuple[str, ...]
    """Laws that the families are taken to follow: [FAMILY:]fit.json or
    [FAMILY:]E=..,A=..,B=..,alpha=..,beta=.."""
    family: str | None = None
    """Whose exponent, floor or loss; none: the first one's."""
    at: AboveZero | None = None
    """Compute of the loss or the gap (FLOPs, 6 N D)."""
    share_floor: bool = False
    """The families will be fitted with one E."""
    paired: bool = True
    """Run all families in every cell, so that each loss has its partner."""
    runs: Count = 40
    """Most main runs."""
    repeats: Count = 1
    """Most seeds of a cell."""
    noise: AboveZero = 0.005
    """Standard deviation of a run's log loss (two seeds of one run differ by as much)."""
    objective: Literal["huber", "lad", "log-lsq"] = "huber"
    """Of the fit that will be made (as in `mmfree fit`, delta 1e-3)."""
    size: Literal["total", "non-embedding", "ternary"] | None = None
    """Which parameters N counts; none: as the fits say, else non-embedding."""
    params: tuple[AboveZero, AboveZero] = (1e6, 1e9)
    """Smallest and largest N, where the config names no sizes."""
    tokens_per_parameter: tuple[AboveZero, AboveZero] = (2.0, 200.0)
    """Smallest and largest D / N."""
    passes: AboveZero = 1.0
    """Most passes over the training data, where they are there."""
    device: str | None = None
    """Estimate the time for this device (such as "H100"), not for those here."""
    parallel: Count = 1
    """Small runs at a time on each device."""
    out: PlaceOrUrl = "design.yaml"
    """The sweep's config that is written."""


def design(argv: Sequence[str]) -> int:
    """Choose sizes and budgets that determine an exponent, a floor, a gap or a crossing best."""
    a = parse(Arguments, argv, prog="mmfree sweep design", description=_DESCRIPTION)

    from mmfree_jax.experiments.scaling.assumed import read_assumed
    from mmfree_jax.experiments.scaling.information import variance_factor
    from mmfree_jax.experiments.scaling.objectives import Objective
    from mmfree_jax.experiments.scaling.optimal_design import Limits, best_design
    from mmfree_jax.experiments.sweep import design as designs
    from mmfree_jax.experiments.sweep.config import load_sweep
    from mmfree_jax.files import check_file, write_text
    from mmfree_jax.places import check_place

    for text in a.assume:
        check_place(re.sub(r"^[^:]*:(?!//)", "", text), "assume")
    check_file(a.out, r"# Designed by `mmfree sweep design", sources=[a.config])
    sweep = load_sweep(a.config)
    families = [family.label for family in sweep.families]
    laws, counted = read_assumed(a.assume, families, shares_floor=a.share_floor)
    count = a.size or counted or "non-embedding"
    quantity = _quantity(a, laws)
    most_tokens = a.passes * designs.corpus_tokens(sweep)
    scope = designs.Scope(count, a.params, a.tokens_per_parameter, most_tokens, a.paired)
    limits = Limits(a.budget, a.runs, a.repeats)
    points = designs.points(sweep, laws, scope, limits)
    noise = a.noise * math.sqrt(variance_factor(Objective(a.objective), a.noise))
    candidates = designs.as_candidates(points, laws, noise)
    gradient = None if quantity is None else quantity.gradient
    found = best_design(candidates, gradient, limits)
    chosen = designs.designed(sweep, points, found)
    even = designs.best_even_grid(points, candidates, gradient, limits)
    lines = [designs.design_text(quantity, points, found, even, scope, limits),
             f"  for {a.objective} fits and noise {a.noise:g} of log loss"]  # fmt: skip
    lines += [f"  warning: {text}" for text in designs.design_warnings(points, found, laws)]
    text = "\n".join(lines)
    header = "".join(f"# {line}\n" for line in text.splitlines())
    write_text(a.out, f"# Designed by `mmfree sweep design {a.config}`:\n{header}"
               + designs.settings_text(chosen))  # fmt: skip
    _show_cost(chosen, a.device, a.parallel)
    print(text)
    print(f"wrote {a.out}")
    return 0


def _quantity(a: Arguments, laws: "AssumedLaws") -> "Quantity | None":
    """What the variance is to be least of; None for all parameters."""
    from mmfree_jax.errors import ConfigError
    from mmfree_jax.experiments.scaling.information import crossing_of, gap_at, loss_at, of_family

    family = a.family or laws.families[0]
    if family not in laws.families:
        raise ConfigError(f"family is {family!r}: choose {' or '.join(laws.families)}, of which a "
                          "law is assumed")  # fmt: skip
    if a.quantity in ("loss", "gap"):
        if a.at is None:
            raise ConfigError(f"at is not given: a {a.quantity} needs a compute, such as --at 1e21")
        return gap_at(laws, a.at) if a.quantity == "gap" else loss_at(laws, family, a.at)
    if a.at is not None:
        raise ConfigError(f"at is {a.at:g}, the compute of a loss or a gap: leave it out for "
                          f"{a.quantity}")  # fmt: skip
    if a.quantity == "all":
        return None
    return crossing_of(laws) if a.quantity == "crossing" else of_family(laws, a.quantity, family)


def _show_cost(sweep: "SweepConfig", device: str | None, parallel: int) -> None:
    """The designed sweep's runs, and what they cost in GPU minutes."""
    from mmfree_jax.experiments.sweep.cost import device_from_name, estimate, probe_device
    from mmfree_jax.experiments.sweep.plan import main_runs, tuning_runs, without_repeats
    from mmfree_jax.experiments.sweep.report import cost_text, plan_text
    from mmfree_jax.progress import show_progress

    runs = without_repeats(sweep, [*tuning_runs(sweep), *main_runs(sweep)])
    print(plan_text(runs, None))
    with show_progress("looking at the devices"):
        found = device_from_name(device) if device else probe_device()
    for stage in ("tuning", "main"):
        members = [run for run in runs if run.stage == stage]
        if members:
            cost = estimate(sweep, members, [], found, parallel)
            minutes = cost.seconds * found.count / 60
            print(f"{cost_text(cost, None, stage)}\n{minutes:.3g} {found.kind} minutes")
