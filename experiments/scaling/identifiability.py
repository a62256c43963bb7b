"""What the data cannot tell: warnings before and after a fit, each one sentence."""

import numpy as np

from mmfree_jax.experiments.scaling.descent import residuals
from mmfree_jax.experiments.scaling.laws import Law
from mmfree_jax.experiments.scaling.models import Inputs, Model
from mmfree_jax.experiments.scaling.objectives import Objective
from mmfree_jax.experiments.scaling.search import Search


def distinct(values: np.ndarray, within: float = 0.01) -> int:
    """How many values differ by more than a fraction `within`."""
    return int(1 + np.count_nonzero(np.diff(np.sort(np.log(values))) > within))


def before_fit(law: Law, x: Inputs) -> list[str]:
    """Warnings that follow from the design alone."""
    out = []
    n = len(next(iter(x.values())))
    size = len(law.parameters)
    if n == size:
        out.append(f"{n} runs and {size} parameters: the law passes through every run, so nothing "
                   "tests it")  # fmt: skip
    elif n < 3 * size:
        out.append(f"{n} runs for {size} parameters is few; intervals are rough")
    axes = [a for a in law.inputs if not (law.name == "gadre" and a == "compute")]
    for axis in axes:
        levels = distinct(x[axis])
        if levels == 1:
            out.append(f"all runs have the same {axis}: what the law says of it is set by nothing")
        elif law.floor and levels <= 3:
            out.append(f"{levels} distinct values of {axis}: three points cannot fix a floor, so "
                       f"{law.floor} and the exponent are set by the noise")  # fmt: skip
        elif not law.floor and levels <= 3:
            out.append(f"{levels} distinct values of {axis}: too few to test the form of the law")
        span = np.log10(x[axis].max() / x[axis].min())
        if law.floor and span < 1.5:
            out.append(f"{axis} spans {span:.2f} decades: a floor can hardly be told from a power "
                       "law over less than two")  # fmt: skip
    if "bits" in law.also and distinct(x["bits"]) < 2:
        out.append("all runs have the same bits: gamma cannot be told from A")
    if "unique_tokens" in law.also:
        repeats = float((x["tokens"] / x["unique_tokens"]).max())
        if repeats < 1.5:
            out.append(f"no run sees its data more than {max(repeats, 1):.3g} times: R_D is set by "
                       "the noise")  # fmt: skip
    if {"params", "tokens"} <= set(law.inputs) and n > 2:
        a, b = np.log(x["params"]), np.log(x["tokens"])
        if a.std() > 1e-9 and b.std() > 1e-9:
            r = float(np.corrcoef(a, b)[0, 1])
            if abs(r) > 0.98:
                out.append(f"log params and log tokens correlate at {r:.3f}: their terms cannot be "
                           "told apart (vary tokens at fixed size)")  # fmt: skip
    return out


def after_fit(
    law: Law,
    model: Model,
    objective: Objective,
    x: Inputs,
    log_loss: np.ndarray,
    found: Search,
    parameters: dict[str, float],
    intervals: dict[str, tuple[float | None, float | None]],
) -> list[str]:
    """Warnings about the optimum: bounds, flat valleys, unphysical values, wide intervals."""
    out = []
    loss = np.exp(log_loss)
    lowest = float(loss.min())
    if law.floor:
        floor = parameters[law.floor]
        low, high = intervals.get(law.floor, (None, None))
        if floor < 1e-3 * lowest:
            out.append(f"{law.floor} = {floor:.3g} is on its bound at 0: the data show no floor")
        elif low is not None and low < 0.05 * lowest:
            out.append(f"the interval of {law.floor} reaches {low:.3g}: the data do not show a "
                       "floor")  # fmt: skip
        elif low is not None and high is not None and high - low > 0.5 * lowest:
            out.append(f"{law.floor} is known only to within {high - low:.2g} nats")
    for name in law.exponents:
        value = parameters[name]
        if value <= 0:
            out.append(f"{name} = {value:.3g} is not positive: the loss does not fall along its "
                       "axis")  # fmt: skip
        elif value > 2:
            out.append(f"{name} = {value:.3g} is so steep that its term touches only the smallest "
                       "runs")  # fmt: skip
    if law.name == "broken":
        if not x["compute"].min() < parameters["C_break"] < x["compute"].max():
            out.append(f"C_break = {parameters['C_break']:.3g} lies outside the data: the break is "
                       "not observed")  # fmt: skip
        if parameters["c0"] + parameters["c1"] <= 0:
            out.append("c0 + c1 is not positive: beyond the break the loss would rise")
    if law.target == "accuracy" and parameters["ceiling"] > 1:
        out.append(f"ceiling = {parameters['ceiling']:.3g} is above 1: the data do not show where "
                   "accuracy levels off")  # fmt: skip
    if law.name == "repeated" and min(parameters["alpha"], parameters["beta"]) > 0:
        _, a, b, alpha, beta, *_ = parameters.values()
        unique = np.minimum(x["unique_tokens"], x["tokens"])
        deserved = (alpha * a / (beta * b) * unique**beta) ** (1 / alpha)
        if not np.any(x["params"] > 1.1 * deserved):
            out.append("no run has more parameters than its unique tokens deserve: R_N is set by "
                       "nothing")  # fmt: skip
    prefactors = [p for p in law.parameters if p in ("A", "B", "K", "a", "b")]
    dead = set()
    for name in prefactors:
        if _largest_share(law, parameters, x, loss, name) < 1e-3:
            out.append(f"the term of {name} is below 0.1% of every loss: it is on its bound at 0, "
                       "and its exponent means nothing")  # fmt: skip
            dead.add(name)
    for j, name in enumerate(law.parameters):
        low, high = intervals.get(name, (None, None))
        # Prefactors are quoted at N = 1 or C = 1, so decades are normal; many are a valley.
        if name in dead or name == law.floor:  # said above
            continue
        if model.positive[j] and low is not None and high is not None and low > 0:
            decades = np.log10(high / low)
            if decades > 3:
                out.append(f"flat valley: the interval of {name} spans {decades:.1f} decades; only "
                           "combinations of parameters are determined")  # fmt: skip
    gradient = model.evaluate(found.point[None]).gradient[0]
    values = np.linalg.eigvalsh(gradient @ gradient.T)
    if values[0] <= 1e-12 * values[-1]:
        out.append("flat valley: some combination of parameters does not change any prediction")
    near = found.ends_objectives <= found.objective * 1.001 + 1e-15
    if near.sum() > 1 and law.exponents and found.objective > 1e-12:
        ends = model.to_parameters(found.ends[near])
        for name in law.exponents:
            column = ends[:, law.index(name)]
            if np.ptp(column) > 0.2 * max(abs(parameters[name]), 1e-6):
                out.append(f"flat valley: within 0.1% of the best objective {name} ranges over "
                           f"{column.min():.3g} to {column.max():.3g}")  # fmt: skip
    if found.starts_at_best < 0.01 * found.starts:
        out.append(f"only {found.starts_at_best} of {found.starts} starts reached the optimum: the "
                   "objective is rugged, and a lower one may exist")  # fmt: skip
    target = log_loss if objective.space == "log" else loss
    residual = np.abs(residuals(model, objective.space, target, found.point[None])[0])
    if objective.kind == "huber" and np.mean(residual <= objective.delta) < 0.05 and len(loss) > 20:
        out.append(f"fewer than 5% of residuals are below delta = {objective.delta:g}: the "
                   "objective acts as least absolute deviation")  # fmt: skip
    return out


def _largest_share(
    law: Law, parameters: dict[str, float], x: Inputs, loss: np.ndarray, name: str
) -> float:
    """The greatest fraction of any loss that vanishes when one prefactor is set to zero."""
    whole = np.array([parameters[p] for p in law.parameters])
    without = whole.copy()
    without[law.index(name)] = 0.0
    with np.errstate(all="ignore"):
        return float(np.max((law.loss(whole, x) - law.loss(without, x)) / loss))
