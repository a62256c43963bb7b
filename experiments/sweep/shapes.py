"""Which shapes a sweep takes where its sizes are derived from FLOP budgets and ratios.

A budget of C FLOPs at r tokens a parameter asks for the N at which the exact training FLOPs of
r N tokens are C. One list of shapes serves all families and all budgets, so that every loss of
one family has its partner in the others, and few programs are compiled:

* a shape may stand for an N that is at most `FURTHEST` times as large or small, in each family;
* the budgets are gone through from the smallest: a ratio takes the nearest shape that the list
  has already and that its budget has not, else the nearest of all, which joins the list (of two
  that are about as near the one closer to `CHANNELS` a layer);
* a ratio without a shape in reach is left out, and a budget with fewer than `FEWEST` is refused.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mmfree_jax.config import TrainConfig, replace_model
from mmfree_jax.errors import ConfigError
from mmfree_jax.train.flops import count_flops, count_parameters

FURTHEST = 1.25
"""Largest factor between the N asked for and that of the shape taken."""
FEWEST = 3
"""Sizes at each budget: what a parabola takes."""
ANY_SHAPE = "2x64"
"""For what is the same at every shape."""
CHANNELS = 40
"""Of width a layer: the middle of the ladder's."""
_ASPECT_WEIGHT = 0.1  # half as deep as the middle counts like an N that is 7% off


@dataclass(frozen=True)
class DerivedSize:
    """A shape at one budget, for all families."""

    budget: float
    """Training FLOPs."""
    ratio: float
    """Tokens a parameter asked for."""
    size: str
    """LAYERSxWIDTH."""


@dataclass(frozen=True)
class Derived:
    """What the budgets and ratios of a sweep come to."""

    sizes: tuple[DerivedSize, ...]
    """By budget, from the smallest, and by ratio as they are given."""
    left_out: tuple[str, ...]
    """Of each ratio that no shape is near at some budget, why."""


@dataclass(frozen=True)
class _Family:
    """One family's models of every shape; arrays over `shape_ladder()`."""

    label: str
    log_params: np.ndarray
    """Log of the parameters that ratios count."""
    log_product: np.ndarray
    """Log of parameters times training FLOPs a token."""

    def asked(self, budget: float, ratio: float) -> float:
        """Log of the N asked for: between shapes by interpolation, beyond them by their slope."""
        order = np.argsort(self.log_product)
        x, y = self.log_product[order], self.log_params[order]
        at = math.log(budget / ratio)
        # Beyond the last shape N is in proportion to the root of N x FLOPs a token.
        beyond = min(0.0, at - x[0]) + max(0.0, at - x[-1])
        return float(np.interp(at, x, y)) + beyond / 2


def shape_ladder() -> tuple[str, ...]:
    """Shapes that sizes are derived from: 28 to 56 channels of width a layer, 2 layers at least.

    The preset ladder has 32 to 53. Widths are multiples of 64 and, below 320, others between
    them, as far as they divide into attention heads.
    """
    widths = (32, 48, 80, 96, 160, 288, *range(64, 2049, 64))
    return tuple(
        f"{layers}x{width}"
        for width in sorted(widths)
        for layers in range(max(2, -(-width // 56)), max(2, width // 28) + 1)
    )


def derive_sizes(
    bases: Sequence[tuple[str, TrainConfig]],
    budgets: Sequence[float],
    ratios: Sequence[float],
    count: str,
) -> Derived:
    """One list of shapes for all families.

    Args:
      bases: each family's name and its config at any shape.
      budgets: training FLOPs.
      ratios: tokens a parameter.
      count: the parameters that ratios mean, "total" or "non-embedding".

    Raises:
      ConfigError: fewer than `FEWEST` sizes at a budget.
    """
    if len(ratios) < FEWEST:
        raise ConfigError(
            f"tokens_per_parameter is {list(ratios)}: give {FEWEST} or more, each of which derives "
            "a size at every budget, or name sizes"
        )
    shapes = shape_ladder()
    families = [_family(label, config, count) for label, config in bases]
    aspect = _ASPECT_WEIGHT * np.abs(np.log([_channels(shape) / CHANNELS for shape in shapes]))
    listed: list[int] = []
    found, left_out = [], []
    for budget in sorted(budgets):
        taken: list[int] = []
        missed: list[str] = []
        for ratio in ratios:
            asked = [f.asked(budget, ratio) for f in families]
            distance = np.max(
                [np.abs(f.log_params - a) for f, a in zip(families, asked, strict=True)], axis=0
            )
            near = [i for i in np.argsort(distance + aspect, kind="stable").tolist()
                    if distance[i] <= math.log(FURTHEST) and i not in taken]  # fmt: skip
            if not near:
                missed.append(_missed(ratio, shapes, families, asked, distance, taken))
                continue
            index = next((i for i in near if i in listed), near[0])
            taken.append(index)
            listed.append(index)
            found.append(DerivedSize(budget, ratio, shapes[index]))
        where = f"flop_budgets: {budget:.3g} FLOPs"
        if len(taken) < FEWEST:
            raise ConfigError(
                f"{where} leave {len(taken)} of {len(ratios)} sizes, {FEWEST} are the fewest "
                f"({'; '.join(missed)}): raise the budget, change tokens_per_parameter, or name "
                "sizes"
            )
        left_out += [f"{where}: {text}; left out" for text in missed]
    return Derived(tuple(found), tuple(left_out))


def _layers_and_width(shape: str) -> tuple[int, int]:
    layers, width = map(int, shape.split("x"))
    return layers, width


def _channels(shape: str) -> float:
    """Of width a layer."""
    layers, width = _layers_and_width(shape)
    return width / layers


@functools.lru_cache(maxsize=16)
def _family(label: str, base: TrainConfig, count: str) -> _Family:
    params, product = [], []
    for shape in shape_ladder():
        layers, width = _layers_and_width(shape)
        config = replace_model(base, num_layers=layers, hidden_size=width)
        counted = count_parameters(config.model)
        n = counted.total if count == "total" else counted.non_embedding
        params.append(n)
        product.append(n * count_flops(config.model, config.data.seq_len).training)
    return _Family(label, np.log(params), np.log(product))


def _missed(
    ratio: float, shapes: Sequence[str], families: Sequence[_Family], asked: Sequence[float],
    distance: np.ndarray, taken: Sequence[int],
) -> str:  # fmt: skip
    """Why no shape stands for a ratio."""
    nearest = int(np.argmin(distance))
    wanted = " and ".join(dict.fromkeys(_count(math.exp(a)) for a in asked))
    text = f"{ratio:g} tokens a parameter ask for N = {wanted}"
    if distance[nearest] <= math.log(FURTHEST):
        return f"{text}, whose nearest shape, {shapes[nearest]}, stands for another ratio"
    there = " and ".join(dict.fromkeys(_count(math.exp(f.log_params[nearest])) for f in families))
    return (f"{text}, the nearest shape, {shapes[nearest]}, has {there}, not within a factor of "
            f"{FURTHEST:g}")  # fmt: skip


def _count(number: float) -> str:
    """A number of parameters with three digits: 57344 -> "57.3K"."""
    for unit, letter in ((1e9, "B"), (1e6, "M")):
        if number >= unit:
            return f"{number / unit:.3g}{letter}"
    return f"{number / 1e3:.3g}K"
