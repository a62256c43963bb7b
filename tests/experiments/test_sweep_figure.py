"""The figure of `mmfree sweep report`: which numbers it draws, and that it says what they are."""

import pytest

from mmfree_jax.experiments.scaling.plots import png
from mmfree_jax.experiments.sweep.figure import plot_report
from mmfree_jax.experiments.sweep.rates import Choice


def row(family, size, tokens, loss, seed="0", flops="1e15", budget=""):
    return {"family": family, "size": size, "tokens": tokens, "budget": budget, "flops": flops,
            "loss": loss, "seed": seed}  # fmt: skip


ROWS = [
    row("a", "8x256", "1000", "3.5", flops="1e15"),
    row("a", "8x256", "1000", "3.3", seed="1", flops="1e15"),
    row("a", "8x256", "3000", "3.0", flops="3e15"),
    row("b", "8x256", "1000", "3.1", flops="2e15"),
    row("b", "8x256", "1000", "3.2", seed="1", flops="2e15"),
    row("b", "4x128", "1000", "3.9", flops="5e14"),
]
CHOICES = [Choice("a", "8x256", 1e6, 4e-3, 3.5, True), Choice("b", "8x256", 1e6, 2e-3, 3.1, False)]


def values(rows, series):
    return [(r.get("flops", r.get("params")), pytest.approx(r["value"])) for r in rows
            if r["series"] == series]  # fmt: skip


def test_losses_are_means_over_seeds_and_gaps_of_partners():
    figure, rows = plot_report(ROWS, CHOICES, ("a", "b"))
    assert values(rows, "loss a") == [(1e15, 3.4), (3e15, 3.0)]
    assert values(rows, "loss b") == [(2e15, 3.15), (5e14, 3.9)]
    assert values(rows, "gap a less b") == [(1e15, 0.4), (1e15, 0.1)]
    assert values(rows, "rate a") == [(1e6, 4e-3)]
    assert [r["at_edge"] for r in rows if r["series"].startswith("rate")] == [True, False]
    losses, rates, gaps = figure.axes
    assert losses.get_ylabel() == "held-out loss, nats a token"
    assert gaps.get_xlabel() == "training FLOPs of a"
    keys = [[t.get_text() for t in axes.get_legend().get_texts()] for axes in (losses, rates, gaps)]
    assert keys == [["a", "b", "8x256", "4x128"], ["a", "b", "at an end of its list"],
                    ["a less b"]]  # fmt: skip
    assert png(figure).startswith(b"\x89PNG")


def test_budgets_pair_runs_whose_tokens_differ():
    rows = [row("a", "8x256", "1000", "3.5", budget="1e15"),
            row("b", "8x256", "1200", "3.25", budget="1e15")]  # fmt: skip
    _, drawn = plot_report(rows, [], ("a", "b"))
    assert values(drawn, "gap a less b") == [(1e15, 0.25)]


@pytest.mark.parametrize(
    ("rows", "choices", "families", "panels"),
    [(ROWS[:3], [], ("a",), 1), ([], CHOICES, ("a", "b"), 1), (ROWS[:4], CHOICES, ("b", "c"), 2)],
)
def test_what_is_not_there_has_no_panel(rows, choices, families, panels):
    figure, _ = plot_report([r for r in rows if r["family"] in families], choices, families)
    assert len(figure.axes) == panels
