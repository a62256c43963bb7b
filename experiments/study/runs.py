"""Runs of a family as the study's analysis takes them: losses with all that is drawn anew.

Shapes: n runs, B draws.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mmfree_jax.experiments.scaling.errors import ScalingError
from mmfree_jax.experiments.scaling.frame import RunFrame, make_frame
from mmfree_jax.experiments.scaling.repetition_law import effective_count
from mmfree_jax.experiments.study.documents import DocumentLosses
from mmfree_jax.experiments.study.rate_excess import RuleDraws, TriedRates
from mmfree_jax.experiments.study.trunk_noise import TrunkNoise
from mmfree_jax.experiments.sweep.table import Row

REPEATS_WORTH = 15.39
"""R_D of Muennighoff et al. (2023): repetitions until new ones are worth 1/e."""


@dataclass(frozen=True)
class Runs:
    """Runs of one family, smallest compute first, with their losses in every draw.

    Attributes:
        rows: of the table [n].
        fitted: losses less what the rate costs (nats a token) [n].
        draws: the same in every draw of documents, of the rate's rule and of noise [B, n].
        without_noise: in every draw of documents and of the rate's rule [B, n].
    """

    rows: list[Row]
    fitted: np.ndarray
    draws: np.ndarray
    without_noise: np.ndarray

    def column(self, name: str) -> np.ndarray:
        """Numbers of the table [n]."""
        return np.array([float(row[name]) for row in self.rows])


def losses_of(
    rows: Sequence[Row], documents: DocumentLosses | None, count: int, seed: int
) -> np.ndarray:
    """Losses of runs in `count` draws of the held-out documents [B, n], the same for all runs.

    Raises:
        ScalingError: a run is not among those whose documents were read.
    """
    if documents is None:
        return np.tile([float(row["loss"]) for row in rows], (count, 1))
    place = {name: i for i, name in enumerate(documents.runs)}
    if missing := [row["run"] for row in rows if row["run"] not in place]:
        raise ScalingError(f"documents: {len(missing)} runs have no losses by document, the first "
                           f"{missing[0]}; run document_losses for them")  # fmt: skip
    drawn = documents.resampled(count, np.random.default_rng(seed))
    return drawn[:, [place[row["run"]] for row in rows]]


def tried_rates(rows: Sequence[Row], losses: np.ndarray) -> list[TriedRates]:
    """The cells of a family that were run at three rates or more, on their first seed."""
    cells: dict[tuple[str, str], dict[float, int]] = {}
    for i, row in enumerate(rows):
        if float(row["seed"]) == min(float(r["seed"]) for r in rows):
            cells.setdefault((row["size"], row["tokens"]), {})[float(row["learning_rate"])] = i
    found = []
    for by_rate in cells.values():
        order = [by_rate[rate] for rate in sorted(by_rate)]
        if len(order) >= 3:
            first = rows[order[0]]
            found.append(TriedRates(
                float(first["params_non_embedding"]), float(first["tokens"]),
                np.log(sorted(by_rate)), losses[:, order],
            ))  # fmt: skip
    return found


def gather(
    rows: Sequence[Row], documents: DocumentLosses | None, rule: RuleDraws | None,
    noise: TrunkNoise, count: int, seed: int,
) -> Runs:  # fmt: skip
    """The runs of one family with all that is drawn anew in each resample."""
    ordered = sorted(rows, key=lambda row: float(row["flops"]))
    losses = losses_of(ordered, documents, count, seed)
    found = Runs(ordered, losses.mean(0), losses, losses)
    # Noise is of the family's own, while documents are drawn alike for all.
    rng = np.random.default_rng([seed, *ordered[0]["family"].encode()])
    drawn = losses * np.exp(noise.draw(ordered, count, rng))
    if rule is None:
        return Runs(ordered, found.fitted, drawn, losses)
    params, tokens, rates = map(found.column, ("params_non_embedding", "tokens", "learning_rate"))
    excess = rule.excess(params, tokens, rates)
    return Runs(ordered, found.fitted - excess.mean(0), drawn - excess, losses - excess)


def frame_of(runs: Runs, losses: np.ndarray, unique_tokens: float | None, worth: float) -> RunFrame:
    """The runs for a fit; repeated tokens count as `worth` says."""
    tokens = runs.column("tokens")
    if unique_tokens is not None:
        tokens = effective_count(tokens, np.full(len(tokens), unique_tokens), np.array(worth))
    return make_frame(
        params=runs.column("params"), params_non_embedding=runs.column("params_non_embedding"),
        tokens=tokens, flops=runs.column("flops"), loss=losses,
        family=[row["family"] for row in runs.rows], run=[row["run"] for row in runs.rows],
    )  # fmt: skip
