"""`mmfree predict`."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from mmfree_jax.cli.parse import parse
from mmfree_jax.experiments.cli.options import check_output
from mmfree_jax.experiments.scaling.errors import ScalingError
from mmfree_jax.places import PlaceOrUrl
from mmfree_jax.ranges import AboveZero, InnerShare, Range, Seed

if TYPE_CHECKING:
    from mmfree_jax.experiments.scaling.fitted_law import FittedLaw

Amount = Annotated[float, Range(1)]

_DESCRIPTION = """Predicts from fits: the loss at a size and tokens, or the best size, tokens and
loss at a compute, with the interval of the mean and of one new run. With --equal-to, what every
other family needs to reach that family's loss there."""


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Options of `mmfree predict`."""

    fits: Annotated[tuple[PlaceOrUrl, ...], tyro.conf.Positional]
    """What mmfree fit wrote, alone or with --joint: files, or folders with a fit.json."""
    params: Amount | None = None
    """Size N (a raw count, counted as the fit counts it)."""
    tokens: Amount | None = None
    """Training tokens D (a raw count)."""
    flops: Amount | None = None
    """Compute C in place of --params and --tokens (FLOPs)."""
    bits: AboveZero | None = None
    """Bits a weight, for the law precision."""
    unique_tokens: Amount | None = None
    """Tokens of the corpus that are read at all, for the law repeated (a raw count)."""
    equal_to: str = ""
    """Family whose loss the others are to reach."""
    level: InnerShare | None = None
    """Level of all intervals (a fraction); by default that of the first fit."""
    seed: Seed = 0
    """Of the new runs, and of the order of refits of separate fits."""
    out: PlaceOrUrl | None = None
    """JSON result (a .json file)."""


def predict(argv: Sequence[str]) -> int:
    """Predict loss and compute-optimal sizes from fits, and compare families."""
    a = parse(Arguments, argv, prog="mmfree predict", description=_DESCRIPTION)

    from mmfree_jax.experiments.scaling.fitted_law import read_fits
    from mmfree_jax.experiments.scaling.output_files import write_json
    from mmfree_jax.experiments.scaling.predict import Place, equal_loss
    from mmfree_jax.experiments.scaling.predict import predict as predict_one
    from mmfree_jax.experiments.scaling.predict_report import predict_document, predict_text

    if a.out is not None:
        check_output(a.out, "predictions", sources=a.fits)
    if not a.fits:
        raise ScalingError("fits: give at least one file that mmfree fit wrote")
    place = Place(a.params, a.tokens, a.flops, a.bits, a.unique_tokens)
    fits = _named([f for path in a.fits for f in read_fits(path)])
    level = fits[0].level if a.level is None else a.level
    predictions = [predict_one(f, place, level=level, seed=a.seed) for f in fits]
    equivalents = []
    if a.equal_to:
        names = [f.family for f in fits]
        if a.equal_to not in names or len(names) < 2:
            raise ScalingError(f"equal-to: {a.equal_to!r} has to be one of several families; the "
                               f"fits hold {', '.join(map(repr, names))}")  # fmt: skip
        reference = fits[names.index(a.equal_to)]
        for f in fits:
            if f is not reference:
                equivalents += equal_loss(reference, f, place, level=level, seed=a.seed)
    said = (predictions, equivalents, a.equal_to or None, level)
    print(predict_text(*said))
    if a.out is not None:
        write_json(a.out, predict_document(*said))
        print(f"wrote {a.out}")
    return 0


def _named(fits: list["FittedLaw"]) -> list["FittedLaw"]:
    """Every law with a name of its own: its family, else its file's."""
    named = [f if f.family else replace(f, family=Path(f.source).stem) for f in fits]
    count = Counter(f.family for f in named)
    named = [f if count[f.family] == 1 else replace(f, family=f"{f.family} ({f.source})")
             for f in named]  # fmt: skip
    if len({f.family for f in named}) < len(named):
        raise ScalingError("fits: the same file is given twice; give each once")
    return named
