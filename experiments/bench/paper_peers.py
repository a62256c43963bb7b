"""Peers of the paper's tables: the authors' package and HF Llama, in an interpreter of theirs."""

import os
from dataclasses import dataclass
from pathlib import Path

from mmfree_jax.errors import ConfigError
from mmfree_jax.experiments.bench import paper_peer
from mmfree_jax.experiments.bench.edge_models import peer_dims
from mmfree_jax.experiments.bench.records import Row, measure_alone

PEERS = {
    "authors-fused": "the authors' package, fused",
    "authors-plain": "the authors' package, plain",
    "hf-llama": "HF Llama",
}
_PROBE_S = 120.0


@dataclass(frozen=True)
class Peers:
    """The peers that can be measured here.

    Attributes:
      python: their interpreter.
      checkout: of the authors' package; "": none.
      forms: of `PEERS`.
      reasons: a line for each peer that is left out.
    """

    python: str
    checkout: str
    forms: tuple[str, ...]
    reasons: tuple[str, ...]

    def measure(self, case: Row, timeout_s: float) -> Row:
        """The row of a case, in a process of its own."""
        dims = peer_dims(case["size"])
        dims |= {"layers": case.get("layers", dims["layers"])}
        dims |= {"vocab_size": case.get("vocab_size", dims["vocab_size"])}
        task = case | {"dims": dims, "checkout": self.checkout}
        row = measure_alone([self.python, "-I", paper_peer.__file__], task, timeout_s)
        # Where files lay is this machine's business.
        return {name: value for name, value in row.items() if name not in ("dims", "checkout")}


def check_checkout(checkout: str) -> None:
    """Refuses what is no checkout of the authors' package.

    Raises:
      ConfigError: it has no mmfreelm/__init__.py.
    """
    if checkout and not (Path(checkout) / "mmfreelm" / "__init__.py").is_file():
        raise ConfigError(
            f"--peer is {checkout!r}, which has no mmfreelm/__init__.py: give a checkout of the "
            "authors' package, or leave it out"
        )


def find(checkout: str, python: str) -> Peers:
    """Which peers an interpreter can run.

    Args:
      checkout: of the authors' package; "": none.
      python: the interpreter.
    """
    try:
        row = measure_alone(
            [python, "-I", paper_peer.__file__], {"work": "packages"}, _PROBE_S
        )  # a shell starts it: one that is not there is an exit code
    except OSError as e:
        row = {"failed": str(e)}
    lacks = f"{python}: {row['failed']}" if "failed" in row else ""
    if row.get("missing"):
        lacks = f"{python} has no {' and no '.join(row['missing'])}"
    forms: list[str] = []
    reasons: list[str] = []
    for name, labels in (("the authors' package", ["authors-fused", "authors-plain"]),
                         ("HF Llama", ["hf-llama"])):  # fmt: skip
        if "authors-fused" in labels and not checkout:
            reasons.append(f"{name} was not run: --peer names no checkout of it")
        elif lacks:
            reasons.append(f"{name} was not run: {lacks}; --peer-python names an interpreter")
        else:
            forms += labels
    return Peers(python, os.path.abspath(checkout) if checkout else "", tuple(forms), (*reasons,))
