"""Which approximations the fixed-point model makes; each can be switched by itself."""

import dataclasses
import re
from dataclasses import dataclass

from mmfree_jax.errors import ConfigError
from mmfree_jax.experiments.accelerator import fixed


@dataclass(frozen=True)
class Numerics:
    """The switches. The defaults are those published for Loihi 2 (arXiv 2503.18002)."""

    activation_bits: int = 16
    """Of what the ternary products read and give, and of gated products: 16 or 8. The residual
    stream and the recurrent state always have 16, gates 15."""
    weight_bits: int = 8
    """Of the norms' learned scales, in units of a power of two: 8 or 16."""
    eps: float | None = 1e-3
    """Of every RMSNorm; None: the model's own."""
    fused_norm: bool = True
    """One RMSNorm in place of a block's norm and the BitLinear's behind it; the head keeps two."""
    sigmoid_entries: int = fixed.SIGMOID_ENTRIES
    """Of the sigmoid's table over [0, 8): a power of two from 8 to 64; 0: exact."""
    newton_steps: int = fixed.NEWTON_STEPS
    """Of the inverse square root behind its table of 24; -1: exact."""

    @property
    def is_integer(self) -> bool:
        """Whether the hardware can compute it: no step is exact real arithmetic."""
        return self.sigmoid_entries > 0 and self.newton_steps >= 0


# Fixed point throughout, everything else as in the trained model: what the switches add to.
PRECISE = Numerics(weight_bits=16, eps=None, fused_norm=False, sigmoid_entries=0, newton_steps=-1)

_WAY_OUT = (
    "give fixed:w8a16 or fixed:w8a8 (w16: finer norm scales), then any of eps=model|NUMBER, "
    "norms=fused|double, sigmoid=exact|8|16|32|64, rsqrt=exact|NEWTON_STEPS, separated by commas"
)


def parse_numerics(text: str) -> Numerics:
    """Reads for example "fixed:w8a16" or "fixed:w8a8,sigmoid=exact,eps=1e-4".

    Raises:
      ConfigError: it is malformed; the message shows what can be given.
    """
    kind, _, rest = text.partition(":")
    first, *switches = rest.split(",")
    match = re.fullmatch(r"w(8|16)a(8|16)", first)
    if kind != "fixed" or match is None:
        raise ConfigError(f"--numerics is {text!r}: {_WAY_OUT}")
    changes: dict[str, object] = {
        "weight_bits": int(match[1]),
        "activation_bits": int(match[2]),
    }
    for switch in switches:
        name, _, value = switch.partition("=")
        try:
            changes |= _switch(name, value)
        except ValueError as e:
            raise ConfigError(f"--numerics has {switch!r}: {_WAY_OUT}") from e
    return Numerics(**changes)  # type: ignore[arg-type]


def _switch(name: str, value: str) -> dict[str, object]:
    if name == "eps":
        eps = None if value == "model" else float(value)
        if eps is not None and not 0 < eps <= 1:
            raise ValueError(value)
        return {"eps": eps}
    if name == "norms" and value in ("fused", "double"):
        return {"fused_norm": value == "fused"}
    if name == "sigmoid" and value in ("exact", "8", "16", "32", "64"):
        return {"sigmoid_entries": 0 if value == "exact" else int(value)}
    if name == "rsqrt":
        steps = -1 if value == "exact" else int(value)
        if value != "exact" and not 0 <= steps <= 5:
            raise ValueError(value)
        return {"newton_steps": steps}
    raise ValueError(name)


def format_numerics(numerics: Numerics) -> str:
    """The text that `parse_numerics` reads."""
    n = numerics
    parts = [f"fixed:w{n.weight_bits}a{n.activation_bits}"]
    for field in dataclasses.fields(n)[2:]:
        value = getattr(n, field.name)
        if value == field.default:
            continue
        if field.name == "eps":
            parts.append(f"eps={'model' if value is None else f'{value:g}'}")
        elif field.name == "fused_norm":
            parts.append("norms=double")
        elif field.name == "sigmoid_entries":
            parts.append(f"sigmoid={value or 'exact'}")
        else:
            parts.append(f"rsqrt={'exact' if value < 0 else value}")
    return ",".join(parts)


def ladder(numerics: Numerics) -> list[tuple[str, Numerics]]:
    """The steps from fixed point alone to `numerics`: each alone, then all together."""
    base = dataclasses.replace(PRECISE, activation_bits=16)
    rows = [("fixed point, 16-bit activations", base)]
    names = {
        "activation_bits": f"{numerics.activation_bits}-bit activations",
        "weight_bits": f"{numerics.weight_bits}-bit norm scales",
        "eps": f"norm epsilon {numerics.eps}",
        "fused_norm": "one norm for two",
        "sigmoid_entries": f"sigmoid by {numerics.sigmoid_entries} entries",
        "newton_steps": f"inverse root by table and {numerics.newton_steps} Newton steps",
    }
    for field, name in names.items():
        value = getattr(numerics, field)
        if value != getattr(base, field):
            rows.append((f"+ {name}", dataclasses.replace(base, **{field: value})))
    if len(rows) > 2:
        rows.append(("all together", numerics))
    return rows
