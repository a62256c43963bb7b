"""A part of a sweep: some of its families, sizes and seeds, in the folder of the whole.

A part is itself a sweep, whose runs have the names and settings that they have in the whole, so
that the table grows part by part and the whole finds it done.
"""

import dataclasses
from collections.abc import Sequence
from typing import TypeVar

from mmfree_jax.errors import ConfigError
from mmfree_jax.experiments.sweep.cells import CellConfig, ReplicateConfig
from mmfree_jax.experiments.sweep.config import SweepConfig

T = TypeVar("T")


def part_of(
    sweep: SweepConfig,
    families: Sequence[str] = (),
    sizes: Sequence[str] = (),
    seeds: Sequence[int] = (),
) -> SweepConfig:
    """The sweep with those families, sizes and seeds alone; an empty list takes all.

    Raises:
      ConfigError: the sweep has no such family, size or seed, the part has no run, or its rates
        would follow from runs of the rest.
    """
    cells = list(sweep.cells)
    if families:
        _among("families", families, [family.label for family in sweep.families])
        cells = [_of_families(cell, families) for cell in cells
                 if not cell.families or set(cell.families) & set(families)]  # fmt: skip
    if sizes:
        _check_sizes(sweep, sizes)
        cells = [cell for cell in cells if cell.size in sizes]
    if seeds:
        _check_seeds(sweep, seeds)
        cells = [dataclasses.replace(cell, seeds=_those(cell.seeds or sweep.seeds, seeds))
                 for cell in cells]  # fmt: skip
        cells = [cell for cell in cells if cell.seeds]
    if sweep.cells and not cells:
        raise ConfigError("cells: none of the sweep's is in this part: choose other families, "
                          "sizes or seeds")  # fmt: skip
    left = {cell.size for cell in cells} or set(sizes or sweep.sizes)
    kept = [
        dataclasses.replace(family, learning_rates_at={
            size: rates for size, rates in family.learning_rates_at.items()
            if size in left or not left  # derived sizes are not known yet
        })
        for family in sweep.families if not families or family.label in families
    ]  # fmt: skip
    repeated = _those(sweep.replicates.sizes, sizes)
    return dataclasses.replace(
        sweep, families=tuple(kept), cells=tuple(cells), sizes=_those(sweep.sizes, sizes),
        seeds=_those(sweep.seeds, seeds) or tuple(seeds),
        tuning=dataclasses.replace(sweep.tuning, sizes=_those(sweep.tuning.sizes, sizes)),
        replicates=dataclasses.replace(sweep.replicates, sizes=repeated)
        if repeated else ReplicateConfig(),
    )  # fmt: skip


def _those(there: Sequence[T], chosen: Sequence[T]) -> tuple[T, ...]:
    return tuple(value for value in there if not chosen or value in chosen)


def _among(name: str, chosen: Sequence[T], there: Sequence[T]) -> None:
    if unknown := [value for value in chosen if value not in there]:
        raise ConfigError(f"{name} is {list(chosen)}: the sweep has no {unknown[0]!r}, choose "
                          f"among {', '.join(map(str, there)) or 'none'}")  # fmt: skip


def _of_families(cell: CellConfig, families: Sequence[str]) -> CellConfig:
    own = tuple(name for name in cell.families if name in families)
    return dataclasses.replace(cell, families=own)


def _check_sizes(sweep: SweepConfig, sizes: Sequence[str]) -> None:
    _among("sizes", sizes, sweep.named_sizes)
    if sweep.tuning.is_on and sweep.tuning.sizes and not set(sizes) <= set(sweep.tuning.sizes):
        raise ConfigError(f"sizes is {list(sizes)}: the rate of one follows from the sizes of "
                          f"tuning.sizes ({', '.join(sweep.tuning.sizes)}), so run the whole "
                          "sweep, or a part of those")  # fmt: skip


def _check_seeds(sweep: SweepConfig, seeds: Sequence[int]) -> None:
    there = {*sweep.seeds, *sweep.replicates.seeds, *(s for c in sweep.cells for s in c.seeds)}
    _among("seeds", seeds, sorted(there))
    if (sweep.tuning.is_on or sweep.is_adaptive) and sweep.seeds[0] not in seeds:
        raise ConfigError(f"seeds is {list(seeds)}: rates are chosen by the runs of seed "
                          f"{sweep.seeds[0]}, name it as well")  # fmt: skip
    if sweep.replicates.seeds:
        raise ConfigError(f"seeds is {list(seeds)}: with replicates a part has all seeds; give "
                          "cells with seeds of their own")  # fmt: skip
