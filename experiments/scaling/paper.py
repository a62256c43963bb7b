"""What arXiv 2406.02528 (v7) published about scaling, as data.

The paper prints no formula. Its figure `scaling_law.png` draws two straight lines of loss
against log10 FLOPs through three sizes a family; the numbers here were read off that figure,
so the lines carry about 0.01 in slope-times-decade and the end losses about 0.05 nats.
"""

from pathlib import Path

import numpy as np

__all__ = [
    "DRAWN_STAR",
    "ENDPOINTS",
    "MATMUL_FREE",
    "PUBLISHED_CROSSING",
    "TRANSFORMER",
    "line_loss",
    "lines_cross_at",
]

MATMUL_FREE = {"intercept": 9.68, "slope": -0.351}
"""The line of the MatMul-free models: nats a token, and nats a decade of FLOPs."""
TRANSFORMER = {"intercept": 7.79, "slope": -0.268}
"""The line of Transformer++, likewise."""
PUBLISHED_CROSSING = 23.0
"""log10 FLOPs, as the text says (about 10^23)."""
DRAWN_STAR = float(np.log10(6.0e22))
"""log10 FLOPs of the star drawn in the figure."""
ENDPOINTS = Path(__file__).with_name("paper_endpoints.csv")
"""Sizes, tokens and end losses (by eye) of the three models a family."""


def line_loss(line: dict[str, float], log10_c: np.ndarray) -> np.ndarray:
    """Loss of a published line at log10 FLOPs."""
    return line["intercept"] + line["slope"] * log10_c


def lines_cross_at() -> float:
    """log10 FLOPs at which the two published lines meet."""
    return (MATMUL_FREE["intercept"] - TRANSFORMER["intercept"]) / (
        TRANSFORMER["slope"] - MATMUL_FREE["slope"]
    )
