"""The gap between two families, run for run."""

import numpy as np
import pytest

from mmfree_jax.experiments.scaling import ScalingError, make_frame
from mmfree_jax.experiments.scaling.gap import Pairs, gap_text, pair, token_multiples, trend
from mmfree_jax.experiments.scaling.plots import plot_families, plot_gap, plot_rates, png
from mmfree_jax.experiments.sweep.rates import tried_rates

N = np.repeat([1e6, 3e6, 1e7, 6e7], 3)
D = np.tile([4e6, 1.2e7, 3.6e7], 4)


def family(loss, name, seed="0", factor=1.0):
    return make_frame(
        params_non_embedding=N * factor, tokens=D, loss=loss, family=name, seed=seed
    )  # fmt: skip


def loss(extra=0.0):
    return 2 + 40 / N**0.2 + 60 / D**0.2 + extra


def plane(per_size=-0.05, per_tokens=0.02):
    return 0.2 + per_size * np.log10(N / 1e7) + per_tokens * np.log10(D / 1.2e7)


def test_a_plane_is_found_and_the_noise_of_seeds_with_it():
    rng = np.random.default_rng(0)
    frames = []
    for sign in (1, -1):
        noise = 0.002 * rng.standard_normal(12)
        a = family(loss(plane() + noise), "a", str(sign), factor=1.004)
        frames.append(pair(a, family(loss(), "b", str(sign))))
    both = Pairs(*(np.concatenate([getattr(f, k) for f in frames])
                   for k in ("params", "tokens", "seed", "gap")), 0)  # fmt: skip
    found = trend(both)
    assert found.per_size == pytest.approx(-0.05, abs=0.003)
    assert found.per_tokens == pytest.approx(0.02, abs=0.005)
    assert found.per_both == pytest.approx(found.per_size + found.per_tokens)
    low, high = found.intervals["per_both"]
    assert low < -0.03 < high
    low, high = found.intervals["per_size"]
    assert low < -0.05 < high < 0
    assert high - low < 0.01
    assert found.at(1e7, 1.2e7) == pytest.approx(0.2, abs=0.002)
    assert 0.001 < found.seed_sd < 0.003
    assert (found.n, found.cells) == (24, 12)
    text = gap_text(found, ("a", "b"))
    assert "falls with size at fixed tokens" in text
    assert "+0.0" in text


def test_no_trend_is_said_to_be_none():
    noise = 0.01 * np.random.default_rng(1).standard_normal(12)
    found = trend(pair(family(loss(0.1 + noise), "a"), family(loss(), "b")))
    assert "no clear trend with size" in gap_text(found, ("a", "b"))
    assert np.isnan(found.seed_sd)
    assert "not measured" in gap_text(found, ("a", "b"))


def test_only_like_is_paired_with_like():
    a, b = family(loss(), "a"), family(loss(), "b")
    fewer = b.take(np.arange(12) != 4)
    assert pair(a, fewer).alone == 1
    assert len(pair(a, fewer).gap) == 11
    with pytest.raises(ScalingError, match="no run of one family"):
        pair(a, family(loss(), "b", seed="7"))
    with pytest.raises(ScalingError, match="no run of one family"):
        pair(a, family(loss(), "b", factor=1.2))
    with pytest.raises(ScalingError, match="keep one of each"):
        pair(a, b.take(np.r_[np.arange(12), 3]))
    with pytest.raises(ScalingError, match="cannot fix a plane"):
        trend(pair(a.take(D == 4e6), b.take(D == 4e6)))


def test_how_many_more_tokens_the_worse_family_needs():
    """A family that learns half as much from each token needs twice as many."""
    a = make_frame(params_non_embedding=N, tokens=D, loss=9 - 0.3 * np.log(D / 2), seed="0")
    b = make_frame(params_non_embedding=N, tokens=D, loss=9 - 0.3 * np.log(D), seed="0")
    found = token_multiples(a, b, pair(a, b))
    assert np.allclose(found[D < 3e7], 2)
    assert np.all(np.isnan(found[D > 3e7]))  # a has no run that is as good


def test_the_figures_hold_what_they_draw():
    a, b = family(loss(plane()), "a"), family(loss(), "b")
    pairs = pair(a, b)
    figure, rows = plot_gap(pairs, trend(pairs), ("a", "b"))
    assert png(figure)[:4] == b"\x89PNG"
    drawn = [r for r in rows if r["series"] == "pair"]
    assert len(drawn) == 12
    assert {round(r["gap"], 6) for r in drawn} == {round(g, 6) for g in pairs.gap}
    figure, rows = plot_families(a, b, ("a", "b"))
    assert len(rows) == 24
    (axes,) = figure.axes
    assert len(axes.lines) == 2 * 4 * 2  # points and line of each size
    legend = [text.get_text() for text in axes.get_legend().get_texts()]
    assert legend[:2] == ["a: seeds, mean", "b: seeds, mean"]
    assert len(legend) == 2 + 4
    assert all(text.endswith("M parameters") for text in legend[2:])


def test_rates_are_drawn_above_the_best_of_their_size():
    table = [
        {"family": f, "size": s, "params_non_embedding": n, "tokens": "100", "seed": seed,
         "learning_rate": str(rate), "loss": str(value)}
        for f, s, n, seed, rate, value in [
            ("a", "big", "9", "0", 1e-3, 3.0), ("a", "big", "9", "0", 2e-3, 2.9),
            ("a", "small", "1", "0", 1e-3, 4.0), ("a", "small", "1", "0", 2e-3, 4.2),
            ("a", "small", "1", "1", 4e-3, 1.0), ("b", "big", "9", "0", 1e-3, 3.0),
        ]
    ]  # fmt: skip
    tried = tried_rates(table, tokens=100)
    assert list(tried) == [("a", "small"), ("a", "big")]  # "b" was tried at one rate only
    assert tried["a", "small"] == {1e-3: 4.0, 2e-3: 4.2}
    assert tried_rates(table, tokens=7) == {}
    figure, rows = plot_rates(tried)
    (panel,) = figure.axes
    assert [min(line.get_ydata()) for line in panel.lines] == [0.0, 0.0]
    assert len(rows) == 4
