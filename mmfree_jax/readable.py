"""Numbers and values for people."""

from typing import Any


def brief(value: Any, longest: int = 100) -> str:
    """A value as Python writes it, cut where it is longer than a message may be."""
    text = repr(value)
    return text if len(text) <= longest else f"{text[:longest]}..."


def format_count(value: float) -> str:
    """A number with a unit: 12_345 -> 12.3k."""
    for limit, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit:
            return f"{value / limit:.1f}{unit}"
    return f"{value:.0f}"


def format_seconds(seconds: float) -> str:
    """A duration: 3_725 -> 1h02m."""
    total = round(max(0.0, seconds))
    minutes, s = divmod(total, 60)
    hours, m = divmod(minutes, 60)
    if hours >= 48:
        return f"{hours // 24}d{hours % 24:02d}h"
    if hours:
        return f"{hours}h{m:02d}m"
    return f"{m}m{s:02d}s" if m else f"{s}s"
