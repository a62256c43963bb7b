"""Whether the columns of a file are raw counts, or off by 10^3 or more.

C is compared with 6 N D where the file gives all three: then a column in other units is certain
and refused. Otherwise medians are compared with what is plausible, and the reader is warned.
"""

import numpy as np

from mmfree_jax.experiments.scaling.errors import ScalingError
from mmfree_jax.experiments.scaling.frame import RunFrame, where

APART = 10.0**2.5
"""C and 6 N D differ by less than this under any count (a head may outweigh a small model 30
times); units differ by 10^3 or more."""
PLAUSIBLE: dict[str, tuple[float, float, str]] = {
    "params": (1e4, 1e13, "parameters"),
    "params_non_embedding": (1e3, 1e13, "parameters"),
    "tokens": (1e5, 1e15, "tokens"),
    "flops": (1e9, 1e29, "FLOPs"),
    "budget": (1e9, 1e29, "FLOPs"),
    "loss": (0.02, 13.0, "nats a token"),
}
"""Between which values the median of a column lies. A loss of 13 is worse than a uniform guess
among 440,000 tokens: perplexities and millinats are above it."""
TOKENS_PER_PARAMETER = (0.05, 1e4)
"""Between which values the median ratio lies: Chinchilla's is 20, a thousandth of it 0.02."""
STRAY = 10.0
"""How far outside a single run may lie before it is named."""


def check_units(frame: RunFrame, file: str) -> list[str]:
    """Warnings on the columns of one file whose values suggest other units.

    Raises:
        ScalingError: C is not near 6 N D; the message names the column that other units would
            make consistent.
    """
    size = "params" if _given(frame, "params").any() else "params_non_embedding"
    for spent in ("flops", "budget"):
        _refuse_contradiction(frame, file, size, spent)
    out = []
    for name, (low, high, unit) in PLAUSIBLE.items():
        values = getattr(frame, name)[_given(frame, name)]
        if len(values) and not low <= np.median(values) <= high:
            hint = "perplexity, or other units?" if name == "loss" else "in other units?"
            out.append(
                f"{file}: column {_called(frame, name)} has the median {np.median(values):.4g}, "
                f"outside {low:g} to {high:g} {unit} ({hint})"
            )
    return out or _implausible_ratio(frame, file, size)


def _given(frame: RunFrame, name: str) -> np.ndarray:
    values = getattr(frame, name)
    return np.isfinite(values) & (values > 0)


def _called(frame: RunFrame, name: str) -> str:
    return repr(frame.sources.get(name, name))


def _refuse_contradiction(frame: RunFrame, file: str, size: str, spent: str) -> None:
    given = _given(frame, size) & _given(frame, "tokens") & _given(frame, spent)
    n, d, c = (np.where(given, getattr(frame, name), 1.0) for name in (size, "tokens", spent))
    off = given & (np.abs(np.log(c / n / d / 6)) > np.log(APART))
    if not off.any():
        return
    row = int(np.argmax(off))
    columns = {size: n[off], "tokens": d[off], spent: c[off]}
    power = int(3 * np.round(np.log10(np.median((c / n / d / 6)[off])) / 3))
    # N and D are multiplied by what is missing on their side; C is divided by it.
    factors = dict.fromkeys(columns, 10.0**power) | {spent: 10.0**-power}
    suspects = [name for name in columns if _explains(columns, name, factors[name])]
    named = " or ".join(_called(frame, name) for name in suspects or columns)
    shown = ", ".join(f"{_called(frame, k)} {values[0]:.4g}" for k, values in columns.items())
    flag = (suspects or [spent])[0].replace("_", "-")
    raise ScalingError(
        f"{file}: column {named} is in other units, by about 10^{abs(power)}: C is not near 6 N D "
        f"in {int(off.sum())} of {len(frame)} runs, the first {where(frame, row)} ({shown}); write "
        f"raw counts, such as 1.3e9, or leave the column out by --columns.{flag} none"
    )


def _explains(columns: dict[str, np.ndarray], name: str, factor: float) -> bool:
    """Whether the medians of N, D and C are plausible once one is multiplied by a factor."""
    scaled = {k: float(np.median(v)) * (factor if k == name else 1) for k, v in columns.items()}
    n, d, _ = (v * (factor if k == name else 1) for k, v in columns.items())
    inside = [PLAUSIBLE[key][0] <= value <= PLAUSIBLE[key][1] for key, value in scaled.items()]
    return all(inside) and TOKENS_PER_PARAMETER[0] <= np.median(d / n) <= TOKENS_PER_PARAMETER[1]


def _implausible_ratio(frame: RunFrame, file: str, size: str) -> list[str]:
    """A warning on tokens a parameter, where tokens are given or follow from C."""
    for name in ("tokens", "flops", "budget"):
        given = _given(frame, size) & _given(frame, name)
        if not given.any():
            continue
        n, other = getattr(frame, size)[given], getattr(frame, name)[given]
        ratio = other / n if name == "tokens" else other / (6 * n) / n
        low, high = TOKENS_PER_PARAMETER
        middle = float(np.median(ratio))
        stray = (ratio < low / STRAY) | (ratio > high * STRAY)
        what = f"{file}: columns {_called(frame, size)} and {_called(frame, name)} give"
        if not low <= middle <= high:
            return [f"{what} {middle:.3g} tokens a parameter (median), outside {low:g} to "
                    f"{high:g}: one of them is in other units, such as millions"]  # fmt: skip
        if stray.any():
            row = int(np.flatnonzero(given)[np.argmax(stray)])
            return [f"{what} {ratio[np.argmax(stray)]:.3g} tokens a parameter in "
                    f"{where(frame, row)}, the first of {int(stray.sum())} runs outside "
                    f"{low / STRAY:g} to {high * STRAY:g}: other units?"]  # fmt: skip
        return []
    return []
