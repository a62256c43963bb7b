"""The rule of each family's learning rate, lr = c N^a D^b, fitted to the best rates of a sweep.

Fitted are the winners that are inside their lists of rates, each moved to the lowest point of the
parabola through it and its neighbours: a winner at an end says only on which side the best rate is.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mmfree_jax.experiments.scaling.output_files import write_json
from mmfree_jax.experiments.scaling.power_relation import PowerRelation, fit_power
from mmfree_jax.experiments.sweep.rates import Choice, best_rate

_ROUNDING = 0.05  # of log tokens, as steps are whole


@dataclass(frozen=True)
class FittedRule:
    """The rule of one family, or why there is none."""

    family: str
    law: PowerRelation | None
    """Over "params" and "tokens", or the one of them that varies; None: no rule."""
    winners: tuple[tuple[float, float, float], ...]
    """(N, D, rate) that it was fitted to."""
    note: str
    """What it does not hold for, or why there is none."""

    def exponent(self, name: str) -> float:
        """Of "params" or "tokens"; 0 where that did not vary."""
        assert self.law is not None
        return self.law.exponents.get(name, 0.0)

    @property
    def coefficient(self) -> float:
        """c."""
        assert self.law is not None
        return math.exp(self.law.coefficients[0])


def fit_rules(choices: Iterable[Choice]) -> list[FittedRule]:
    """The rule of each family, by its winners that are inside their lists of rates.

    Where N or D does not vary among them, its exponent is 0 and the rule says nothing of it;
    where both vary but only together, D's is 0 and a is that of the two along that line.
    """
    families: dict[str, list[Choice]] = {}
    for choice in choices:
        if choice.tokens is not None:
            families.setdefault(choice.family, []).append(choice)
    return [_fit(family, members) for family, members in families.items()]


def _fit(family: str, tuned: list[Choice]) -> FittedRule:
    inside = [c for c in tuned if not c.at_edge and len(c.tried) > 1]
    winners = tuple(
        (c.params, float(c.tokens or 0), best_rate(dict(c.tried), "parabola")[0]) for c in inside
    )
    notes = []
    if out := len(tuned) - len(inside):
        notes.append(
            f"{out} of {len(tuned)} winners are left out, at an end of their list or alone"
        )
    params, tokens, rate = np.array(winners).reshape(-1, 3).T
    columns = {"params": params, "tokens": tokens}
    inputs = {name: x for name, x in columns.items() if len(np.unique(x)) > 1}
    if not inputs:
        notes.append("give two sizes or budgets whose best rate is inside its list")
        return FittedRule(family, None, winners, "; ".join(notes))
    notes += [f"{name} did not vary" for name in columns if name not in inputs]
    if len(inputs) == 2 and _on_a_line(np.log(params), np.log(tokens)):
        del inputs["tokens"]
        notes.append("params and tokens did not vary apart: a holds along that line alone")
    law = fit_power({"learning_rate": rate, **inputs}, "learning_rate", tuple(inputs))
    return FittedRule(family, law, winners, "; ".join(notes))


def _on_a_line(x: np.ndarray, y: np.ndarray) -> bool:
    """Whether y follows x but for the rounding of budgets to steps."""
    slope, level = np.polyfit(x, y, 1)
    return bool(np.abs(y - level - slope * x).max() < _ROUNDING)


def rules_text(rules: Iterable[FittedRule]) -> str:
    """The rules, a line each, with 95% intervals of their exponents."""
    lines = ["rate rule lr = c N^a D^b (N without embedding and head; 95% intervals)"]
    for rule in rules:
        if rule.law is None:
            lines.append(f"  {rule.family}: none; {rule.note}")
            continue
        parts = [f"c {rule.coefficient:.4g}"]
        for letter, name in (("a", "params"), ("b", "tokens")):
            if name in rule.law.exponents:
                ends = rule.law.intervals.get(name)
                about = "(no interval)" if ends is None else f"[{ends[0]:.3f}, {ends[1]:.3f}]"
                parts.append(f"{letter} {rule.exponent(name):.3f} {about}")
        note = f"; {rule.note}" if rule.note else ""
        lines.append(f"  {rule.family}: {', '.join(parts)}, from {len(rule.winners)} winners{note}")
    return "\n".join(lines)


def write_rules(path: Path, rules: Iterable[FittedRule]) -> None:
    """Writes the rules that there are, for `families.rate_rule.file`."""
    found = []
    for rule in rules:
        if rule.law is not None:
            params, tokens, _ = zip(*rule.winners, strict=True)
            found.append({
                "family": rule.family, "coefficient": rule.coefficient,
                "params_exponent": rule.exponent("params"),
                "tokens_exponent": rule.exponent("tokens"),
                "intervals": rule.law.intervals,
                "residual_log_rate": rule.law.residual, "winners": len(rule.winners),
                "params_range": (min(params), max(params)),
                "tokens_range": (min(tokens), max(tokens)), "note": rule.note,
            })  # fmt: skip
    rule = (
        "learning rate = coefficient * N ** params_exponent * D ** tokens_exponent; N: "
        "parameters without embedding and head, D: training tokens"
    )
    write_json(path, {"rule": rule, "families": found})
