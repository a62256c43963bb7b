"""Numbers on axes."""

import pytest
from matplotlib.figure import Figure

from mmfree_jax.figures import count, number, set_ticks


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (0.001, "0.001"),
        (-2.5, "\N{MINUS SIGN}2.5"),
        (9999, "9999"),
        (0.30000000000000004, "0.3"),
        (1e4, "$10^{4}$"),
        (2.5e17, r"$2.5\times10^{17}$"),
        (-1e-5, "$-10^{-5}$"),
        (3e-4, r"$3\times10^{-4}$"),
    ],
)
def test_a_number_is_written_in_full(value, text):
    assert number(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (1250, "1250"),
        (12500, "12.5k"),
        (1e7, "10M"),
        (3e9, "3B"),
        (15e12, "15T"),
        (2e15, r"$2\times10^{15}$"),
    ],
)
def test_a_count_has_a_unit(value, text):
    assert count(value) == text


def shown(low: float, high: float, scale: str, label=number) -> list[str]:
    """Texts of the ticks within the view."""
    figure = Figure(figsize=(7, 4))
    axes = figure.subplots()
    axes.plot([low, high], [0, 1])
    axes.set(xscale=scale, xlim=(low, high))
    set_ticks(axes.xaxis, label)
    figure.draw_without_rendering()
    assert axes.xaxis.get_offset_text().get_text() == ""
    assert [t.get_text() for t in axes.xaxis.get_minorticklabels() if t.get_text()] == []
    ticks = zip(axes.get_xticks(), axes.get_xticklabels(), strict=True)
    return [text.get_text() for place, text in ticks if low <= place <= high]


def test_linear_axes_have_units_and_no_factor():
    assert shown(0, 12e6, "linear", count) == ["0", "2M", "4M", "6M", "8M", "10M", "12M"]
    assert shown(0, 3, "linear", count) == ["0", "1", "2", "3"]
    assert shown(3.5, 4, "linear") == ["3.5", "3.6", "3.7", "3.8", "3.9", "4.0"]
    assert shown(1e15, 3e15, "linear")[:3] == [
        "$10^{15}$",
        r"$1.25\times10^{15}$",
        r"$1.5\times10^{15}$",
    ]
    assert shown(0, 4e-5, "linear")[1] == r"$5\times10^{-6}$"


def test_logarithmic_axes_have_ticks_enough():
    assert shown(3, 8.5, "log") == ["3", "4", "5", "6", "7", "8"]
    assert shown(1e6, 2e7, "log", count) == ["1M", "2M", "3M", "5M", "10M", "20M"]
    assert shown(1e3, 2e5, "log", count) == [
        "1000", "2000", "5000", "10k", "20k", "50k", "100k", "200k",
    ]  # fmt: skip
    assert shown(1e17, 1e22, "log") == [f"$10^{{{e}}}$" for e in range(17, 23)]
