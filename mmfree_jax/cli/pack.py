"""`mmfree pack`: a trained model as packed trits, for decoding."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from mmfree_jax.cli.parse import parse
from mmfree_jax.places import Place
from mmfree_jax.progress import show_progress
from mmfree_jax.ranges import CountOrZero


@dataclass(frozen=True)
class PackConfig:
    """Pack a trained model's ternary weights at 2 or 1.6 bits each."""

    model: Place
    """Folder of the model: a training run or a Hugging Face model."""
    out: Place
    """Folder to make."""
    bits: Literal["2", "1.6"] = "2"
    """Bits a weight: 2 is what the kernels read; 1.6 is a fifth smaller on disk and is
    converted when loaded."""
    embedding: Literal["float32", "bfloat16", "int8"] | None = None
    """Dtype of the stored embedding, int8 with one scale a row; None: the smallest that keeps
    the model's greedy text, bfloat16 where its residual stream is, else float32."""
    step: CountOrZero | None = None
    """Checkpoint of a training run to pack (step); None: the newest."""


def pack(argv: Sequence[str]) -> int:
    """Pack a trained model's ternary weights at 2 or 1.6 bits each.

    Args:
      argv: the arguments behind `mmfree pack`.

    Returns:
      The exit code.

    Raises:
      MMFreeError: bad input; the command line prints it and exits with 2.
    """
    config = parse(PackConfig, argv, prog="mmfree pack")
    with show_progress("packing"):
        from mmfree_jax.saved.open_model import open_model
        from mmfree_jax.saved.pack import pack as make_packed

        report = make_packed(
            open_model(config.model, step=config.step),
            config.out,
            bits=config.bits,
            embedding=config.embedding,
        )
    print(
        f"{report.file}: {report.num_bytes / 2**20:.1f} MiB, {report.weights:,} ternary weights "
        f"at {config.bits} bits; embedding in {report.embedding}, relative error "
        f"{report.embedding_error:.2e}"
    )
    return 0
