"""`mmfree export onnx` and `mmfree export stablehlo`: models for other runtimes."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from mmfree_jax.cli.parse import parse


@dataclass(frozen=True)
class OnnxConfig:
    """Write a model as a folder that onnxruntime runs without JAX."""

    model: str
    """Folder of the model: a training run, a packed model or a Hugging Face model."""
    out: str
    """Folder to make."""
    grade: Literal["exact", "fast"] = "exact"
    """exact: the integers of the training path, one scale a token; fast: the runtime quantises
    activations by blocks, which is quicker but not what the model was trained with."""
    embedding: Literal["float32", "bfloat16", "int8"] | None = None
    """Dtype of the stored embedding; None: int8 in the fast grade, in the exact one what the
    model itself reads."""
    step: int | None = None
    """Checkpoint of a training run (step); None: the newest."""
    overwrite: bool = False
    """Replace the folder if it exists."""


def export_onnx(argv: Sequence[str]) -> int:
    """Write a model as a folder that onnxruntime runs without JAX.

    Args:
      argv: the arguments behind `mmfree export onnx`.

    Returns:
      The exit code.

    Raises:
      MMFreeError: bad input; the command line prints it and exits with 2.
    """
    config = parse(OnnxConfig, argv, prog="mmfree export onnx")
    _require_onnx()
    from mmfree_jax.export import onnx_export
    from mmfree_jax.export.source import open_source

    report = onnx_export.export_onnx(
        open_source(config.model, step=config.step),
        config.out,
        grade=config.grade,
        embedding=config.embedding,
        overwrite=config.overwrite,
    )
    print(
        f"{report.folder}: {report.num_bytes / 2**20:.1f} MiB, grade {config.grade}, embedding in "
        f"{report.embedding}; try: python {report.folder}/chat.py"
    )
    return 0


def _require_onnx() -> None:
    import importlib.util

    from mmfree_jax.errors import ConfigError

    if importlib.util.find_spec("onnx") is None:
        raise ConfigError("onnx is not installed: run pip install 'mmfree-jax[edge]'")
