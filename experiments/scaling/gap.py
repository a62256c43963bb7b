"""Two families, run for run: what one loses to the other, and whether that changes with scale.

Where both families have runs of the same size, tokens and seed, their difference in loss needs
no law and no extrapolation, and what the runs share (text, order of the data, evaluation)
cancels. Its trend is a plane in log size and log tokens.
"""

from dataclasses import dataclass

import numpy as np

from mmfree_jax.experiments.scaling.errors import ScalingError
from mmfree_jax.experiments.scaling.frame import RunFrame, sizes
from mmfree_jax.experiments.scaling.sandwich import scatter

__all__ = ["GapTrend", "Pairs", "gap_text", "pair", "token_multiples", "trend"]


@dataclass(frozen=True)
class Pairs:
    """Runs of family a beside those of family b.

    Attributes:
        params: of b's run; tokens: of both [n].
        seed: of both [n].
        gap: loss of a less loss of b (nats a token) [n]; above 0 where b is better.
        alone: runs of either family that have no partner.
    """

    params: np.ndarray
    tokens: np.ndarray
    seed: np.ndarray
    gap: np.ndarray
    alone: int


@dataclass(frozen=True)
class GapTrend:
    """gap = centre + per_size log10(N / N_mid) + per_tokens log10(D / D_mid).

    Attributes:
        centre, per_size, per_tokens: the least-squares plane; nats, and nats a decade.
        per_both: per_size + per_tokens: a decade of size and of tokens together, which is how
            models grow at a constant number of tokens a parameter.
        intervals: name -> (low, high), by cells' own residuals (`sandwich`) and Student's t.
        budgets: the numbers of tokens in the fit.
        mid_params, mid_tokens: geometric means, where the plane is `centre`.
        residual: standard deviation of what the plane leaves (nats).
        seed_sd: of one run's gap between seeds (nats); NaN without repeated cells.
        level: of the intervals.
        n, cells: pairs, and different (size, tokens) among them.
    """

    centre: float
    per_size: float
    per_tokens: float
    per_both: float
    intervals: dict[str, tuple[float, float]]
    budgets: tuple[float, ...]
    mid_params: float
    mid_tokens: float
    residual: float
    seed_sd: float
    level: float
    n: int
    cells: int

    def at(self, params: float, tokens: float) -> float:
        """The plane's gap at a size and a number of tokens, in raw counts."""
        return (
            self.centre
            + self.per_size * float(np.log10(params / self.mid_params))
            + self.per_tokens * float(np.log10(tokens / self.mid_tokens))
        )


def pair(
    a: RunFrame, b: RunFrame, *, size: str = "non-embedding", tolerance: float = 0.03
) -> Pairs:
    """Puts runs of the same tokens and seed, and of nearly the same size, beside each other.

    Args:
        a, b: one family each, one run a (size, tokens, seed).
        size: which parameters count.
        tolerance: sizes differ by less than this share.

    Raises:
        ScalingError: a column is missing, a run has two partners, or no run has one.
    """
    size_a, size_b = sizes(a, size), sizes(b, size)
    rows: list[tuple[int, int]] = []
    for i in range(len(a)):
        same = (
            (np.abs(np.log(size_b / size_a[i])) < tolerance)
            & (b.tokens == a.tokens[i])
            & (b.seed == a.seed[i])
        )
        found = np.flatnonzero(same)
        if len(found) > 1:
            raise ScalingError(
                f"pairs: {len(found)} runs of the second family have {size_a[i]:.3g} parameters, "
                f"{a.tokens[i]:.4g} tokens and seed {a.seed[i] or 'none'}; keep one of each"
            )
        rows += [(i, int(j)) for j in found]
    if not rows:
        raise ScalingError("pairs: no run of one family has the size, tokens and seed of another's")
    i, j = np.array(rows).T
    alone = len(a) + len(b) - 2 * len(rows)
    return Pairs(size_b[j], b.tokens[j], b.seed[j], a.loss[i] - b.loss[j], alone)


def trend(pairs: Pairs, *, level: float = 0.95) -> GapTrend:
    """Fits the plane; its intervals let cells differ in noise and the seeds of one be alike.

    Raises:
        ScalingError: the pairs are fewer than four cells, or of one size or one budget.
    """
    from scipy.stats import t

    cell, inverse = np.unique(np.stack([pairs.params, pairs.tokens]), axis=1, return_inverse=True)
    inverse = inverse.ravel()
    if cell.shape[1] < 4 or min(len(np.unique(row)) for row in cell) < 2:
        raise ScalingError(
            f"gap: {cell.shape[1]} cells of {len(np.unique(cell[0]))} sizes and "
            f"{len(np.unique(cell[1]))} budgets cannot fix a plane; pair at least two of each"
        )
    mid = np.exp(np.mean(np.log(cell), axis=1))
    x = np.stack([
        np.ones(len(pairs.gap)), np.log10(pairs.params / mid[0]), np.log10(pairs.tokens / mid[1])
    ], axis=1)  # fmt: skip
    plane, *_ = np.linalg.lstsq(x, pairs.gap, rcond=None)
    left = pairs.gap - x @ plane

    names = ("centre", "per_size", "per_tokens", "per_both")
    combinations = np.array([[1, 0, 0], [0, 1, 0], [0, 0, 1], [0, 1, 1]])
    values = combinations @ plane
    known = scatter(x, left, np.ones(len(left)), inverse, combinations)
    half = t.ppf((1 + level) / 2, known.freedom) * np.sqrt(known.variance)

    repeated = [pairs.gap[inverse == k] for k in range(cell.shape[1]) if np.sum(inverse == k) > 1]
    freedom = sum(len(g) - 1 for g in repeated)
    spread = sum(float(np.sum((g - g.mean()) ** 2)) for g in repeated)
    return GapTrend(
        *map(float, values),
        intervals={k: (float(v - h), float(v + h))
                   for k, v, h in zip(names, values, half, strict=True)},
        budgets=tuple(np.unique(pairs.tokens)), mid_params=float(mid[0]), mid_tokens=float(mid[1]),
        residual=float(np.sqrt(np.sum(left**2) / max(1, len(left) - 3))),
        seed_sd=float(np.sqrt(spread / freedom)) if freedom else float("nan"),
        level=level, n=len(pairs.gap), cells=cell.shape[1],
    )  # fmt: skip


def token_multiples(a: RunFrame, b: RunFrame, pairs: Pairs) -> np.ndarray:
    """By which factor family a needs more tokens to reach b's loss at the same size [n].

    Read off a's own losses at that size and seed, linear in log tokens between two budgets;
    NaN where b's loss lies outside them. No law is assumed.
    """
    size_a = sizes(a, "non-embedding")
    size_b = sizes(b, "non-embedding")
    out = np.full(len(pairs.gap), np.nan)
    for k in range(len(out)):
        near = np.abs(np.log(size_a / pairs.params[k])) < 0.03
        own = np.flatnonzero(near & (a.seed == pairs.seed[k]))
        own = own[np.argsort(a.tokens[own])]
        target = b.loss[
            (size_b == pairs.params[k]) & (b.tokens == pairs.tokens[k]) & (b.seed == pairs.seed[k])
        ]
        loss, log_tokens = a.loss[own], np.log(a.tokens[own])
        falls = np.all(np.diff(loss) < 0)
        if len(own) > 1 and falls and loss[-1] <= target[0] <= loss[0]:
            reached = np.interp(-target[0], -loss, log_tokens)
            out[k] = np.exp(reached) / pairs.tokens[k]
    return out


def gap_text(result: GapTrend, names: tuple[str, str]) -> str:
    """The trend in words and numbers, and what its intervals allow one to say."""
    first, second = names

    def value(name: str) -> str:
        low, high = result.intervals[name]
        return f"{getattr(result, name):+.4f} [{low:+.4f}, {high:+.4f}]"

    lines = [
        f"loss of {first} less that of {second}, {result.n} pairs in {result.cells} cells "
        f"({result.level:.0%} intervals, by cells)",
        f"  at N {result.mid_params:.3g}, D {result.mid_tokens:.3g}: {value('centre')} nats",
        f"  a decade of size:   {value('per_size')} nats",
        f"  a decade of tokens: {value('per_tokens')} nats",
        f"  a decade of both:   {value('per_both')} nats",
        f"  residual {result.residual:.4f} nats; between seeds "
        + (f"{result.seed_sd:.4f}" if np.isfinite(result.seed_sd) else "not measured"),
    ]
    for name, what in (
        ("per_size", "size at fixed tokens"),
        ("per_tokens", "tokens at fixed size"),
        ("per_both", "both at a fixed ratio"),
    ):
        low, high = result.intervals[name]
        verdict = "falls" if high < 0 else "rises" if low > 0 else "has no clear trend"
        lines.append(f"Within these runs the gap {verdict} with {what}.")
    return "\n".join(lines)
