"""Tables of the second study's cells out of known laws: what its analysis is tried on.

Sizes, budgets, seeds, the tuning of rates and the held-out documents are the plan's
(docs/scaling-study-plan.md). How much documents, seeds and rates do to a loss is assumed where no
run has shown it. `Truth` is the mean loss at the best rate on tokens that are not repeated.
"""

from dataclasses import dataclass

import numpy as np

from mmfree_jax.experiments.scaling.repetition_law import effective_count
from mmfree_jax.experiments.scaling.training_cost import TrainingCost
from mmfree_jax.experiments.study.documents import DocumentLosses
from mmfree_jax.experiments.study.rate_excess import MOST_APART, RuleDraws, draw_rule
from mmfree_jax.experiments.study.runs import Runs, gather, losses_of, tried_rates
from mmfree_jax.experiments.study.trunk_noise import TrunkNoise, trunk_noise
from mmfree_jax.experiments.sweep.table import Row

NAMES = ("matmulfree", "transformer")
CELLS = ((1.055e6, 6, 3), (2.668e6, 6, 3), (6.841e6, 5, 3), (17.74e6, 4, 1), (34.14e6, 3, 1))
"""Sizes, budgets of each (in doublings of D / N from 5 on) and seeds."""
TUNED = ((1.055e6, 20), (1.055e6, 80), (2.668e6, 20), (6.841e6, 20), (17.74e6, 5))
"""Sizes and D / N at which rates are tried, at factors of two around about the best one."""
TRIED = (-2, -1, 0, 1, 2)
UNIQUE = 176.7e6
HELDOUT = ((15, 2.855e6), (21, 2.348e6), (10, 0.766e6), (6, 1.215e6), (6, 0.380e6), (106, 0.244e6),
           (316, 0.075e6), (36, 0.318e6), (81, 0.333e6), (626, 0.645e6))  # fmt: skip
"""Documents and tokens of each held-out source."""
COSTS = {"matmulfree": TrainingCost(4.35e3, 0.605), "transformer": TrainingCost(1.73e3, 0.5216)}
"""FLOPs a token as the first study's models have them."""
LAWS = {"matmulfree": (2.2, 180.0, 0.335, 560.0, 0.36),
        "transformer": (2.2, 150.0, 0.330, 529.0, 0.36)}  # fmt: skip
"""E, A, alpha, B, beta that the plan's design assumed."""
RATES = {"matmulfree": (8e-3, -0.7, -0.15, 0.05), "transformer": (4e-3, -0.3, -0.15, 0.2)}
"""Best rate at 2.7M parameters and 20 tokens a parameter, its exponents of N and D, and curvature
(nats a squared log rate)."""
NOISE = TrunkNoise()
DOCUMENTS = (0.3, 0.03)
"""How much a document's loss differs: alike for all runs, and between the families (nats)."""
MIDDLE = (6e6, 1.5e8)
"""Size and tokens around which curves bend and terms break."""


@dataclass(frozen=True)
class Truth:
    """Losses of both families: E + A / N^alpha + B / D^beta, and what that law cannot express.

    Attributes:
        about: in words.
        floor: added to E of each family, which the analysis takes to be one for both (nats).
        product: of the square root of both terms' product.
        bend: of log A / N^alpha in squared log N.
        steeper: exponents by which B / D^beta falls faster beyond `MIDDLE` tokens.
        worth: R_D, how many repetitions are worth something; the analysis takes 15.39.
    """

    about: str
    floor: tuple[float, float] = (0.0, 0.0)
    product: tuple[float, float] = (0.0, 0.0)
    bend: tuple[float, float] = (0.0, 0.0)
    steeper: tuple[float, float] = (0.0, 0.0)
    worth: float = 15.39

    def loss(self, name: str, params: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        """Nats a token [n] on tokens none of which is repeated."""
        k = NAMES.index(name)
        floor, a, alpha, b, beta = LAWS[name]
        size = a / params**alpha * np.exp(self.bend[k] * np.log(params / MIDDLE[0]) ** 2)
        data = b / tokens**beta * (1 + tokens / MIDDLE[1]) ** -self.steeper[k]
        return floor + self.floor[k] + size + data + self.product[k] * np.sqrt(size * data)

    def run_loss(self, name: str, params: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        """The same of runs on the study's text, which they may repeat [n]."""
        worth = effective_count(tokens, np.full(len(tokens), UNIQUE), np.array(self.worth))
        return self.loss(name, params, worth)


@dataclass(frozen=True)
class Table:
    """What the analysis is given: runs of both families with their draws, and their noise."""

    families: dict[str, Runs]
    noise: TrunkNoise


def best_rate(name: str, params: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """The true best rates [n]."""
    rate, by_size, by_tokens, _ = RATES[name]
    return rate * (params / 2.668e6) ** by_size * (tokens / 53.36e6) ** by_tokens


def rows_at(
    name: str, params: np.ndarray, tokens: np.ndarray, seeds: np.ndarray, rates: np.ndarray
) -> list[Row]:
    """Rows of a results table without their losses."""
    flops = tokens * np.exp(COSTS[name].log_per_token(np.log(params)))
    return [
        {"run": f"{name}-{n:.4g}-{d:.4g}-{rate:.4g}-{seed}", "family": name, "size": f"{n:.4g}",
         "trunk": f"{name}-{n:.4g}-{rate:.4g}-{seed}", "seed": str(seed), "params": repr(float(n)),
         "params_non_embedding": repr(float(n)), "tokens": repr(float(d)),
         "flops": repr(float(c)), "learning_rate": repr(float(rate))}
        for n, d, c, rate, seed in zip(params, tokens, flops, rates, seeds, strict=True)
    ]  # fmt: skip


def with_losses(truth: Truth, name: str, rows: list[Row], rng: np.random.Generator) -> np.ndarray:
    """Losses of runs over all documents that there could be, with training's noise [n]."""
    columns = ("params_non_embedding", "tokens", "learning_rate")
    params, tokens, rates = (np.array([float(row[c]) for row in rows]) for c in columns)
    off = np.clip(np.log(rates / best_rate(name, params, tokens)), -MOST_APART, MOST_APART)
    excess = RATES[name][3] / 2 * off**2
    return (truth.run_loss(name, params, tokens) + excess) * np.exp(NOISE.draw(rows, 1, rng)[0])


@dataclass(frozen=True)
class Heldout:
    """Held-out documents: sources [K], tokens [K], and what each adds to a family's loss [K]."""

    sources: tuple[str, ...]
    tokens: np.ndarray
    adds: dict[str, np.ndarray]

    def losses(self, name: str, rows: list[Row], means: np.ndarray) -> DocumentLosses:
        """Of a family's runs, with their means over all documents that there could be [n]."""
        documents = tuple(f"{source}/{k}" for k, source in enumerate(self.sources))
        sums = self.tokens * (means[:, None] + self.adds[name])
        return DocumentLosses(
            tuple(row["run"] for row in rows), documents, self.sources, self.tokens, sums
        )


def heldout(rng: np.random.Generator) -> Heldout:
    """Documents of the plan's sources, of lengths a factor e apart."""
    sources, tokens = [], []
    for k, (count, total) in enumerate(HELDOUT):
        length = np.exp(rng.standard_normal(count))
        tokens.append(total * length / length.sum())
        sources += [f"source {k}"] * count
    alike = DOCUMENTS[0] * rng.standard_normal(len(sources))
    adds = {name: alike + DOCUMENTS[1] * rng.standard_normal(len(sources)) for name in NAMES}
    return Heldout(tuple(sources), np.concatenate(tokens), adds)


def tuned_rule(
    truth: Truth, name: str, documents: Heldout, resamples: int, rng: np.random.Generator, seed: int
) -> RuleDraws:
    """The rule of a family's rates by runs around the best ones."""
    n, ratio, step = (np.array(c) for c in zip(
        *((n, r, s) for n, r in TUNED for s in TRIED), strict=True))  # fmt: skip
    near = 2 ** np.round(np.log2(best_rate(name, n, n * ratio)))
    rows = rows_at(name, n, n * ratio, np.zeros(len(n), int), near * 2.0**step)
    seen = documents.losses(name, rows, with_losses(truth, name, rows, rng))
    tried = tried_rates(rows, losses_of(rows, seen, resamples, seed))
    return draw_rule(tried, np.random.default_rng(seed + 1))


def draw_table(
    truth: Truth, resamples: int, rng: np.random.Generator, *, rates_known: bool = False
) -> Table:
    """One table: rates are tuned, runs have the rule's, and all is drawn anew as the study does.

    With `rates_known` every run has its best rate, and no rule is in the draws.
    """
    documents, seed = heldout(rng), int(rng.integers(2**31))
    rows_of, seen, rules = {}, {}, {}
    for name in NAMES:
        n, d, seeds = (np.array(c) for c in zip(
            *((n, n * 5 * 2.0**k, s) for n, budgets, count in CELLS for s in range(count)
              for k in range(budgets)), strict=True))  # fmt: skip
        rates, rules[name] = best_rate(name, n, d), None
        if not rates_known:
            rules[name] = rule = tuned_rule(truth, name, documents, resamples, rng, seed)
            at_20 = np.stack([np.ones(len(n)), np.log(n), np.log(20 * n)])
            rates = np.exp(rule.coefficients.mean(0) @ at_20)
        rows = rows_of[name] = rows_at(name, n, d, seeds, rates)
        seen[name] = documents.losses(name, rows, with_losses(truth, name, rows, rng))
        for row, loss in zip(rows, seen[name].means(), strict=True):
            row["loss"] = repr(float(loss))
    noise = trunk_noise([row for rows in rows_of.values() for row in rows])
    families = {
        name: gather(rows_of[name], seen[name], rules[name], noise, resamples, seed)
        for name in NAMES
    }
    return Table(families, noise)
