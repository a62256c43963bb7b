"""A fitted law as its file keeps it: what predictions need, and nothing of the search."""

from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import numpy as np

from mmfree_jax.experiments.scaling.errors import ScalingError
from mmfree_jax.experiments.scaling.fit import Fit
from mmfree_jax.experiments.scaling.frame import definitions
from mmfree_jax.experiments.scaling.laws import LAWS, Law, get_law
from mmfree_jax.experiments.scaling.training_cost import SIX, TrainingCost
from mmfree_jax.experiments.scaling.uncertainty import on_bound
from mmfree_jax.fetched import local_copy
from mmfree_jax.files import StrPath
from mmfree_jax.json_shape import fault
from mmfree_jax.text_files import read_json

FORMAT = 1
"""Of the block `for_predictions` in a fit's JSON."""
POWER = "power-of-columns"
"""What `mmfree fit power` writes as its law."""
AGAIN = "fit the runs again with this version"

Range = tuple[float, float]
_NUMBER = (int, float)


@dataclass(frozen=True)
class FittedLaw:
    """A law fitted to the runs of one family.

    Attributes:
        family: name; "" where the runs name none.
        source: where it was read from; rows of `resamples` of one source belong together.
        law: the form.
        parameters: at the optimum [P].
        resamples: of bootstrap refits [R, P]; R = 0 without.
        log_residuals: log L - log L fitted of every run [n]; n = 0 where the file has none.
        ranges: least and greatest of the runs, by `params`, `tokens` and `compute` as the law
            takes them, by `6nd` and `tokens_per_param`, and by `flops_per_6nd` where the runs'
            own FLOPs are known; empty where the file has none.
        conventions: how `params` and `flops` are counted, by name.
        definitions: what `N` and `C` are, in words.
        level: of the fit's intervals.
        cost: FLOPs a token, by which a compute is shared out between size and tokens.
        on_bound: whether a term vanished, so that the refits' bias is not to be corrected.
        lacks: what an older file does not hold, a sentence each.
    """

    family: str
    source: str
    law: Law
    parameters: np.ndarray
    resamples: np.ndarray
    log_residuals: np.ndarray
    ranges: dict[str, Range]
    conventions: dict[str, str]
    definitions: dict[str, str]
    level: float
    on_bound: bool = False
    cost: TrainingCost = SIX
    lacks: tuple[str, ...] = ()


def fitted_law(fit: Fit, source: str = "") -> FittedLaw:
    """What predictions need of a fit."""
    families = {str(f) for f in fit.frame.family}
    columns = dict(fit.inputs)
    if "params" in columns:
        columns["6nd"] = 6 * columns["params"] * columns["tokens"]
        columns["tokens_per_param"] = columns["tokens"] / columns["params"]
        if np.isfinite(fit.frame.flops).all():
            columns["flops_per_6nd"] = fit.frame.flops / columns["6nd"]
    with np.errstate(invalid="ignore", divide="ignore"):
        residuals = fit.log_loss - np.log(fit.predict(fit.inputs))
    size = len(fit.law.parameters)
    return FittedLaw(
        family=families.pop() if len(families) == 1 else "",
        source=source,
        law=fit.law,
        parameters=fit.vector(),
        resamples=np.empty((0, size)) if fit.bootstrap is None else fit.bootstrap.parameters,
        log_residuals=residuals,
        ranges={
            name: (float(v.min()), float(v.max()))
            for name, v in columns.items()
            if v.min() > 0 and v.max() < np.inf
        },
        conventions={"params": fit.size, "flops": fit.flops},
        definitions=definitions(fit.frame, fit.size, fit.flops),
        level=fit.level,
        on_bound=on_bound(fit.model, fit.search),
        cost=fit.cost,
    )


def prediction_block(fit: Fit) -> dict[str, Any]:
    """What a fit's document keeps for predictions: one line of text a column of numbers."""
    kept = fitted_law(fit)
    return {
        "format": FORMAT,
        "family": kept.family,
        "on_bound": kept.on_bound,
        "cost": asdict(kept.cost),
        "ranges": {name: list(ends) for name, ends in kept.ranges.items()},
        "log_residuals": _line(kept.log_residuals),
        "resamples": {name: _line(column) for name, column in
                      zip(kept.law.parameters, kept.resamples.T, strict=True)},
    }  # fmt: skip


def _line(values: np.ndarray) -> str:
    return " ".join(f"{v:.9g}" for v in values)


def read_fits(place: StrPath) -> list[FittedLaw]:
    """The law of every family in what `mmfree fit` wrote, alone or with `--joint`.

    Args:
        place: the JSON file, or a folder that holds it as fit.json; or its URL.

    Raises:
        ScalingError: it cannot be read, is no fit, is damaged, or is of a newer version.
        StorageError: it lies in a bucket, and cannot be read.
    """
    path = local_copy(place, "fit", lambda name: name.name == "fit.json", lambda _: False)
    if path.is_dir():
        if not (path / "fit.json").is_file():
            raise ScalingError(f"{path}: holds no fit.json; name the file that mmfree fit wrote")
        path = path / "fit.json"
    try:
        document = read_json(path)
    except OSError as error:
        raise ScalingError(f"{path}: cannot be read ({error.strerror or error}); give the file "
                           "that mmfree fit wrote") from None  # fmt: skip
    except ValueError as error:
        raise ScalingError(f"{path}: is no whole JSON ({error}); {AGAIN}") from None
    if not isinstance(document, dict) or "law" not in document:
        raise ScalingError(f"{path}: is no fit; give the file that mmfree fit wrote")
    families = document.get("families")
    if families is None:
        return [_read_family(document, str(path))]
    _check(families, {}, str(path), "families")
    _hold(bool(families), "families is empty", str(path))
    out = []
    for name, own in families.items():
        where = f"{path}: family {name!r}"
        _check(own, {}, where)
        out.append(replace(_read_family(own, where), family=name, source=str(path)))
    _hold(len({len(fitted.resamples) for fitted in out}) == 1,
          "the families have different numbers of resamples", str(path))  # fmt: skip
    return out


def _read_family(document: dict[str, Any], where: str) -> FittedLaw:
    """One family's part of a fit's document."""
    name = document.get("law")
    if name == POWER:
        raise ScalingError(f"{where}: is a power between columns (mmfree fit power), not a law of "
                           "the loss; give the file that mmfree fit wrote")  # fmt: skip
    if not isinstance(name, str) or name not in LAWS:
        raise ScalingError(f"{where}: 'law' is {str(name)[:100]!r}, which this version does not "
                           f"know ({', '.join(LAWS)}); use the version that fitted it")  # fmt: skip
    law = get_law(name)  # with `also`, what it reads besides is asked for by `predict.Place`
    if law.target != "loss":
        raise ScalingError(f"{where}: the law {name} gives {law.target}, not a loss; use its "
                           "formula with the parameters of the file")  # fmt: skip
    _check(document, {
        "parameters": dict.fromkeys(law.parameters, _NUMBER), "interval_level": _NUMBER,
        "conventions": {"params": str, "flops": str},
    }, where)  # fmt: skip
    parameters = np.array([document["parameters"][p] for p in law.parameters], dtype=float)
    level, conventions = document["interval_level"], document["conventions"]
    _hold(np.isfinite(parameters).all(), "its parameters are not finite", where)
    _hold(0 < level < 1, f"interval_level is {level}, not between 0 and 1", where)
    words = document.get("definitions", {})
    _check(words, {}, where, "definitions")
    fitted = FittedLaw(
        "", where, law, parameters, np.empty((0, len(parameters))), np.empty(0), {}, conventions,
        {"N": f"{conventions['params']} parameters", "C": conventions["flops"]} | words, level,
    )  # fmt: skip
    if "for_predictions" not in document:
        lacks = ("holds no bootstrap resamples and no ranges of its runs, as an earlier version "
                 f"wrote it: no intervals, and extrapolation is not told; {AGAIN}")  # fmt: skip
        return replace(fitted, lacks=(lacks,))
    block = document["for_predictions"]
    _check(block, {"format": int}, where, "for_predictions")
    version = block["format"]
    if version > FORMAT:
        raise ScalingError(f"{where}: was written by a newer version (format {version}; this one "
                           f"reads up to {FORMAT}); update mmfree_jax, or {AGAIN}")  # fmt: skip
    _check(block, {
        "family": str, "on_bound": bool, "cost": dict.fromkeys(asdict(SIX), _NUMBER),
        "resamples": dict.fromkeys(law.parameters, str), "log_residuals": str, "ranges": {},
    }, where)  # fmt: skip
    columns = [_column(block["resamples"][p], f"resamples.{p}", where) for p in law.parameters]
    _hold(len({len(c) for c in columns}) == 1, "its resamples differ in length by parameter", where)
    ranges = {}
    for key, ends in block["ranges"].items():
        _check(ends, [_NUMBER], where, f"ranges.{key}")
        _hold(len(ends) == 2 and 0 < ends[0] <= ends[1] < np.inf,
              f"ranges.{key} is {str(ends)[:100]}, no range", where)  # fmt: skip
        ranges[key] = (ends[0], ends[1])
    bare = "was fitted without a bootstrap: no intervals; fit with --bootstrap 1000 or more"
    return replace(
        fitted, family=block["family"], on_bound=block["on_bound"], ranges=ranges,
        cost=TrainingCost(**{f.name: block["cost"][f.name] for f in fields(TrainingCost)}),
        resamples=np.array(columns).T,
        log_residuals=_column(block["log_residuals"], "log_residuals", where),
        lacks=() if len(columns[0]) else (bare,),
    )  # fmt: skip


def _check(value: Any, wanted: Any, where: str, name: str = "it") -> None:
    found = fault(value, wanted, name)
    _hold(found is None, str(found), where)


def _hold(right: bool | np.bool, wrong: str, where: str) -> None:
    if not right:
        raise ScalingError(f"{where}: is no whole fit: {wrong}; {AGAIN}")


def _column(text: str, name: str, where: str) -> np.ndarray:
    try:
        return np.array([float(word) for word in text.split()])
    except ValueError as error:
        raise ScalingError(f"{where}: is no whole fit: {name}: {error}; {AGAIN}") from None
