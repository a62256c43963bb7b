"""`mmfree export`: models for other runtimes, and how far they are from the original."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mmfree_jax.cli.parse import parse
from mmfree_jax.errors import ConfigError
from mmfree_jax.fetched import local_copy
from mmfree_jax.installed import import_optional, install_command
from mmfree_jax.places import PlaceOrUrl
from mmfree_jax.progress import show_progress
from mmfree_jax.ranges import Count, CountOrZero, Step, TwoOrMore


@dataclass(frozen=True)
class OnnxConfig:
    """Write a model as a folder that onnxruntime runs without JAX."""

    model: PlaceOrUrl
    """Folder of the model, or its URL: a training run, a packed model or a Hugging Face model."""
    out: PlaceOrUrl
    """Folder to make, or its URL."""
    grade: Literal["exact", "fast"] = "exact"
    """exact: the integers of the training path, one scale a token; fast: the runtime quantises
    activations by blocks, which is quicker but not what the model was trained with."""
    embedding: Literal["float32", "bfloat16", "int8"] | None = None
    """Dtype of the stored embedding; None: int8 in the fast grade, in the exact one what the
    model itself reads."""
    web: bool = True
    """Also write the web page, web/; needs a tokenizer that the page can read."""
    step: Step | None = None
    """Checkpoint of a training run: its step, or best; None: the newest."""
    overwrite: bool = False
    """Replace an earlier export of this command; nothing else is replaced."""


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
    import_optional("onnx", "mmfree export onnx", install_command("edge"))
    from mmfree_jax.export import onnx_export
    from mmfree_jax.outputs import check_target
    from mmfree_jax.saved.open_model import open_model

    check_target(
        config.out,
        command=onnx_export.COMMAND,
        sources=[config.model],
        overwrite=config.overwrite,
    )
    with show_progress("exporting"):
        report = onnx_export.export_onnx(
            open_model(config.model, step=config.step),
            config.out,
            grade=config.grade,
            embedding=config.embedding,
            web=config.web,
            overwrite=config.overwrite,
        )
    example = f"; try: python {report.folder}/chat.py" if isinstance(report.folder, Path) else ""
    print(
        f"{report.folder}: {report.num_bytes / 2**20:.1f} MiB, grade {config.grade}, embedding in "
        f"{report.embedding}{example}"
    )
    return 0


def export_stablehlo(
    model: PlaceOrUrl,
    out: PlaceOrUrl,
    step: Step | None = None,
    chunk: Count = 64,
    overwrite: bool = False,
) -> int:
    """Write a model's programs as StableHLO for CPU, CUDA and TPU, beside its packed weights.

    Args:
      model: Training run, packed model (2 bits) or Hugging Face folder, or its URL.
      out: Folder to make, or its URL.
      step: Checkpoint of a training run: its step, or best; None: the newest.
      chunk: Tokens of a prompt that one call reads.
      overwrite: Replace an earlier export of this command; nothing else is replaced.
    """
    with show_progress("exporting"):
        from mmfree_jax.export import stablehlo

        report = stablehlo.export_stablehlo(model, out, step=step, chunk=chunk, overwrite=overwrite)
    platforms = ", ".join(stablehlo.PLATFORMS)
    print(f"{report.folder}: {report.num_bytes / 2**20:.1f} MiB, for {platforms}")
    return 0


def compare(
    model: PlaceOrUrl,
    export: PlaceOrUrl,
    data: PlaceOrUrl,
    windows: Count = 16,
    length: TwoOrMore = 128,
    continuations: CountOrZero = 0,
    new_tokens: Count = 200,
    threads: CountOrZero = 0,
) -> int:
    """Compare an ONNX export with its model, on held-out text.

    Args:
      model: The model that was exported, or its URL.
      export: Folder of the export, or its URL.
      data: Prepared data set (`mmfree data prepare`), or its URL; its held-out documents are read.
      windows: Stretches of text, spread over the held-out part; each starts afresh.
      length: Of a stretch (tokens).
      continuations: Also continue the first 12 tokens of so many stretches greedily, and compare
        with `mmfree generate --temperature 0`.
      new_tokens: Of a continuation (tokens).
      threads: Of onnxruntime; 0: one a core.
    """
    import numpy as np

    from mmfree_jax.data.dataset import HELDOUT, open_dataset
    from mmfree_jax.export import agreement, onnx_session
    from mmfree_jax.saved.pretrained import load_model

    held_out = open_dataset(data, HELDOUT)
    if not 2 <= length <= held_out.num_tokens or windows < 1 or continuations < 0 or new_tokens < 1:
        raise ConfigError(
            f"--windows is {windows}, --length {length}, --continuations {continuations} and "
            f"--new-tokens {new_tokens}, of {held_out.num_tokens} held-out tokens: set a length "
            "from 2 to these, and the others at least 1"
        )

    def stretches(count: int, size: int) -> np.ndarray:
        starts = np.linspace(0, held_out.num_tokens - size, count).astype(int)
        return np.stack([held_out.tokens(int(start), int(start) + size) for start in starts])

    exported = onnx_session.load(local_copy(export, "export"), threads=threads)
    own = load_model(model)
    with show_progress("comparing"):
        agreed = agreement.compare(*own, exported, stretches(windows, length))
    print(f"{export}: {agreed}")
    if continuations:
        prompts = stretches(continuations, min(12, length)).tolist()
        with show_progress("comparing continuations"):
            counts = agreement.same_continuations(*own, exported, prompts, new_tokens=new_tokens)
        left = [count for count in counts if count < new_tokens]
        others = f"; the others leave it after a median of {np.median(left):.0f}" if left else ""
        print(
            f"{export}: {continuations - len(left)} of {continuations} greedy continuations of "
            f"{new_tokens} tokens are the model's{others}"
        )
    return 0
