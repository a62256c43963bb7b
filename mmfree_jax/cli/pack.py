"""`mmfree pack`: a trained model as packed trits, for decoding."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from mmfree_jax.cli.parse import parse
from mmfree_jax.errors import ConfigError
from mmfree_jax.ranges import CountOrZero


@dataclass(frozen=True)
class PackConfig:
    """Pack a trained model's ternary weights at 2 or 1.6 bits each."""

    model: str
    """Folder of the model: a training run or a Hugging Face model."""
    out: str
    """Folder to make."""
    bits: Literal["2", "1.6"] = "2"
    """Bits a weight: 2 is what the kernels read; 1.6 is a fifth smaller on disk and is
    converted when loaded."""
    int8_embedding: bool = False
    """Store the embedding in int8 with one scale a row; the error is printed."""
    dense_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Dtype of the norms and the embedding; float32 keeps them exactly."""
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
    from mmfree_jax.saved import load
    from mmfree_jax.saved import packed as packing

    if packing.is_packed(config.model):
        raise ConfigError(
            f"--model is {config.model}, a packed model: ternarising is not idempotent; pack the "
            "trained model"
        )
    if load.is_run(config.model):
        model_config, leaves = load.run_leaves(config.model, step=config.step)
    elif config.step is not None:
        raise ConfigError(f"--step is {config.step}, but {config.model} is not a training run")
    else:
        model_config, leaves = load.folder_leaves(config.model)
    report = packing.pack(
        model_config,
        leaves,
        config.out,
        bits=config.bits,
        int8_embedding=config.int8_embedding,
        dense_dtype=config.dense_dtype,
        tokenizer=load.find_tokenizer(config.model),
    )
    print(
        f"{report.file}: {report.num_bytes / 2**20:.1f} MiB, {report.weights:,} ternary weights "
        f"at {config.bits} bits; relative error of the stored embedding "
        f"{report.embedding_error:.2e}"
    )
    return 0
