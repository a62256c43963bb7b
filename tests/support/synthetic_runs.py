"""Runs drawn from a known law, to test a fit or plan a sweep."""

import numpy as np

from mmfree_jax.experiments.scaling.frame import RunFrame, make_frame
from mmfree_jax.experiments.scaling.laws import get_law


def isoflop_design(
    budgets: np.ndarray, sizes: int = 8, tokens_per_param: float = 20.0, spread: float = 8.0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Params, tokens and budget of `sizes` runs a budget, by C = 6 N D, each flattened.

    Sizes spread by a factor `spread` either way of the one at `tokens_per_param`.
    """
    c = np.repeat(np.asarray(budgets, dtype=float), sizes)
    factor = np.tile(np.geomspace(1 / spread, spread, sizes), len(budgets))
    params = np.sqrt(c / 6 / tokens_per_param) * factor
    return params, c / 6 / params, c


def draw_runs(
    law: str,
    parameters: dict[str, float],
    params: np.ndarray,
    tokens: np.ndarray,
    *,
    noise: float = 0.0,
    tail: float = 0.0,
    budget: np.ndarray | None = None,
    family: str = "",
    seed: int = 0,
) -> RunFrame:
    """Runs whose loss is a law's times exp(noise).

    Args:
        law, parameters: the truth.
        params, tokens: raw counts [n].
        noise: standard deviation of log loss; 0.005 is what two seeds of one run differ by.
        tail: share of runs with ten times that noise, as runs read off a figure have.
        budget, family: columns of the frame.
        seed: of the noise.
    """
    form, rng = get_law(law), np.random.default_rng(seed)
    x = {"params": params, "tokens": tokens, "compute": 6 * params * tokens}
    loss = form.loss(np.array([parameters[p] for p in form.parameters]), x)
    width = noise * np.where(rng.random(len(params)) < tail, 10.0, 1.0)
    loss = loss * np.exp(width * rng.standard_normal(len(params)))
    return make_frame(
        params=params, tokens=tokens, flops=x["compute"], loss=loss, family=family,
        budget=np.nan if budget is None else budget, provenance=f"synthetic, seed {seed}",
    )  # fmt: skip
