"""Other numerics than the trained ones, which packages declare as entry points.

An entry point of the group `mmfree.numerics` has the name in front of the colon in a text such as
"fixed:w8a16", and is a function from the text to a `Variants`. A text that it cannot read is a
ConfigError.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from rich.table import Table

from mmfree_jax.errors import ConfigError
from mmfree_jax.evaluate.forward import Forward
from mmfree_jax.installed import entry_points, load
from mmfree_jax.model import LanguageModel

GROUP = "mmfree.numerics"


@dataclass(frozen=True)
class Variant:
    """One way to compute a model: a name, the numerics as text, and what scoring needs."""

    name: str
    numerics: str
    forward: Forward
    params: Any


class Variants(Protocol):
    """Ways to compute a model, the float one first and all switches together last."""

    def __call__(self, model: LanguageModel, params: Any, *, steps: bool) -> Iterator[Variant]:
        """With `steps`, also each switch of the numerics by itself."""
        ...


def parse_numerics(text: str) -> Variants:
    """The variants that a text such as "fixed:w8a16" stands for.

    Raises:
      ConfigError: no package knows the text.
    """
    known = entry_points(GROUP)
    kind = text.partition(":")[0]
    if kind not in known:
        raise ConfigError(
            f"--numerics is {text!r}: set float, or a text such as fixed:w8a16 (docs/hardware.md; "
            f"installed: {', '.join(known) or 'none'})"
        )
    return load(known[kind])(text)


def cost_table(rows: Sequence[tuple[Variant, float]]) -> Table:
    """Loss of each variant, and its distance from the float model's and from the second one's."""
    table = Table(title="held-out loss by numerics", title_justify="left")
    table.add_column("numerics")
    for name in ("nats/token", "against float", "of this step"):
        table.add_column(name, justify="right")
    base = rows[0][1]
    for k, (variant, loss) in enumerate(rows):
        step = loss - rows[1][1] if variant.name.startswith("+") else None
        table.add_row(
            f"{variant.name} ({variant.numerics})",
            f"{loss:.4f}",
            "" if k == 0 else f"{loss - base:+.4f}",
            "" if step is None else f"{step:+.4f}",
        )
    return table
