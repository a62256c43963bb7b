"""One law for several families that have some of its parameters in common.

The parameters of the joint law are the shared ones, then each family's own. Where the shared
ones are fixed the families have nothing to do with one another, so that everything here is
each family's own model under a linear map of the joint coordinates.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from mmfree_jax.experiments.scaling.errors import ScalingError
from mmfree_jax.experiments.scaling.laws import Law
from mmfree_jax.experiments.scaling.models import FAMILY, Evaluation, Inputs, Model


@dataclass(frozen=True)
class Sharing:
    """Which parameters of a law several families have in common.

    Attributes:
        law: the law of each family.
        families: their names.
        shared: names of the common parameters, in the law's order.
    """

    law: Law
    families: tuple[str, ...]
    shared: tuple[str, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """All parameters: shared ones by their name, a family's own as `A (family)`."""
        own = [f"{p} ({f})" for f in self.families for p in self.law.parameters
               if p not in self.shared]  # fmt: skip
        return (*self.shared, *own)

    def positions(self, family: int) -> np.ndarray:
        """Where the law's parameters [P] of one family stand among all."""
        own = [p for p in self.law.parameters if p not in self.shared]
        first = len(self.shared) + family * len(own)
        return np.array([
            self.shared.index(p) if p in self.shared else first + own.index(p)
            for p in self.law.parameters
        ])  # fmt: skip


def share(law: Law, families: Sequence[str], shared: Sequence[str]) -> Sharing:
    """Check what is to be shared.

    Raises:
        ScalingError: fewer than two families, or a name that is no parameter of the law.
    """
    if len(families) < 2:
        found = f"one family ({families[0]!r})" if families else "no family"
        raise ScalingError(f"joint: the runs hold {found}; give runs of two or more, told apart by "
                           "a family column (--columns.family) or by file")  # fmt: skip
    for name in shared:
        if name not in law.parameters:
            raise ScalingError(f"share: {name!r} is no parameter of {law.name}; choose from "
                               f"{', '.join(law.parameters)}")  # fmt: skip
    if not shared:
        raise ScalingError(f"share: names no parameter; choose from {', '.join(law.parameters)}")
    return Sharing(law, tuple(families), tuple(p for p in law.parameters if p in shared))


def rows_of(x: Inputs, family: int) -> Inputs:
    """One family's inputs of its own law."""
    here = x[FAMILY] == family
    return {name: column[here] for name, column in x.items() if name != FAMILY}


@dataclass(frozen=True)
class Projection:
    """Joint coordinates z [Q] to one family's coordinates [P]: `matrix @ z + offset`."""

    matrix: np.ndarray
    offset: np.ndarray

    def __call__(self, coordinates: np.ndarray) -> np.ndarray:
        """Joint coordinates [..., Q] -> the family's [..., P]."""
        return coordinates @ self.matrix.T + self.offset


@dataclass(frozen=True)
class JointModel:
    """The joint law bound to runs: `whole`, and each family's model, way to it and rows."""

    whole: Model
    models: tuple[Model, ...]
    projections: tuple[Projection, ...]
    rows: tuple[slice, ...]


def bind(sharing: Sharing, x: Inputs) -> JointModel:
    """Bind a joint law to runs; rows stand in order of family.

    The joint coordinates are the families' own standardised ones, of shared parameters their
    mean over families.
    """
    count, size = len(sharing.families), len(sharing.names)
    models = [sharing.law.build(rows_of(x, k)) for k in range(count)]
    to_standard, shift = np.zeros((size, size)), np.zeros(size)
    common = len(sharing.shared)
    for k, model in enumerate(models):
        at = sharing.positions(k)
        inverse = np.linalg.inv(model.matrix)
        weight = np.where(at < common, 1 / count, 1.0)
        to_standard[np.ix_(at, at)] += weight[:, None] * inverse
        shift[at] -= weight * (inverse @ model.offset)
    matrix = np.linalg.inv(to_standard)
    offset = -matrix @ shift
    projections = []
    for k, model in enumerate(models):
        at = sharing.positions(k)
        inverse = np.linalg.inv(model.matrix)
        projections.append(Projection(inverse @ matrix[at], inverse @ (offset[at] - model.offset)))
    ends = np.cumsum([0, *(int((x[FAMILY] == k).sum()) for k in range(count))])
    rows = [slice(int(a), int(b)) for a, b in pairwise(ends)]
    positive, terms = np.zeros(size, bool), set()
    for k, model in enumerate(models):
        at = sharing.positions(k)
        positive[at] = model.positive
        terms |= {int(at[j]) for j in model.terms}

    def evaluate(z: np.ndarray) -> Evaluation:
        parts = [m.evaluate(p(z)) for m, p in zip(models, projections, strict=True)]
        gradient = np.concatenate(
            [p.matrix.T @ e.gradient for e, p in zip(parts, projections, strict=True)], axis=2
        )

        def hessian(outer: np.ndarray, inner: np.ndarray) -> np.ndarray:
            return sum(
                (p.matrix.T @ e.hessian(outer[:, s], inner[:, s]) @ p.matrix
                 for e, p, s in zip(parts, projections, rows, strict=True)),
                start=np.zeros((len(z), size, size)),
            )  # fmt: skip

        return Evaluation(np.concatenate([e.value for e in parts], axis=1), gradient, hessian)

    whole = Model(models[0].space, evaluate, matrix, offset, tuple(positive), tuple(sorted(terms)))
    return JointModel(whole, tuple(models), tuple(projections), tuple(rows))


def joint_law(sharing: Sharing) -> Law:
    """The families' laws as one, for the search: its inputs have `FAMILY` besides.

    Its starts are those of the law, the same for every family (their mean where a start of
    the law depends on the runs and a parameter is shared).
    """
    law = sharing.law

    def loss(p: np.ndarray, x: Inputs) -> np.ndarray:
        p = np.asarray(p)
        out = np.empty((*p.shape[:-1], len(x[FAMILY])))
        for k in range(len(sharing.families)):
            out[..., x[FAMILY] == k] = law.loss(p[..., sharing.positions(k)], rows_of(x, k))
        return out

    def starts(whole: Model, x: Inputs, log_loss: np.ndarray) -> np.ndarray:
        models = bind(sharing, x).models
        natural = [
            m.to_natural(law.starts(m, rows_of(x, k), log_loss[x[FAMILY] == k]))
            for k, m in enumerate(models)
        ]
        return whole.from_natural(mixed(sharing, natural))

    return Law(
        law.name, law.formula, sharing.names, (*law.inputs, FAMILY),
        law.floor if law.floor in sharing.shared else None, (), loss,
        lambda x: bind(sharing, x).whole, starts,
    )  # fmt: skip


def mixed(sharing: Sharing, natural: Sequence[np.ndarray], lead: int | None = None) -> np.ndarray:
    """Joint natural coordinates [G, Q] from each family's [G, P].

    Shared ones are those of the family `lead`, or the mean over families.
    """
    out = np.zeros((len(natural[0]), len(sharing.names)))
    common = len(sharing.shared)
    for k, rows in enumerate(natural):
        at = sharing.positions(k)
        own = at >= common
        out[:, at[own]] = rows[:, own]
        weight = 1 / len(natural) if lead is None else float(k == lead)
        out[:, at[~own]] += weight * rows[:, ~own]
    return out
