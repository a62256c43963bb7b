"""`mmfree pack`: a trained model as packed trits, for decoding."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from mmfree_jax.cli.parse import parse
from mmfree_jax.errors import ConfigError
from mmfree_jax.places import PlaceOrUrl
from mmfree_jax.progress import show_progress
from mmfree_jax.ranges import AboveZero, Count, CountOrZero, Step


@dataclass(frozen=True)
class PackConfig:
    """Pack a trained model's ternary weights at 2 or 1.6 bits each."""

    model: PlaceOrUrl
    """Folder of the model, or its URL: a training run or a Hugging Face model."""
    out: PlaceOrUrl
    """Folder to make, or its URL."""
    bits: Literal["2", "1.6"] = "2"
    """Bits a weight: 2 is what the kernels read; 1.6 is a fifth smaller on disk and is
    converted when loaded."""
    embedding: Literal["float32", "bfloat16", "int8"] | None = None
    """Dtype of the stored embedding, int8 with one scale a row; None: the smallest that keeps
    the model's greedy text, bfloat16 where its residual stream is, else float32."""
    max_file_mb: AboveZero | None = None
    """Largest file (MB, of 10^6 bytes): where all does not fit into one, the tensors are spread
    over several in the folder, as few as do. None: one file."""
    step: Step | None = None
    """Checkpoint of a training run to pack: its step, or best; None: the newest."""
    agreement_prompts: CountOrZero = 8
    """Prompts behind which the packed model's greedy text is compared with the trained one's; the
    result is printed and kept in the file. 0: none, and never more than one parameter in memory."""
    agreement_tokens: Count = 64
    """Tokens compared behind each prompt."""
    agreement_data: PlaceOrUrl | None = None
    """Prepared data set, or its URL, whose held-out documents begin the prompts; None: the model
    samples them."""


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
    if config.agreement_data is not None and not config.agreement_prompts:
        raise ConfigError("--agreement-data is set, but --agreement-prompts is 0: leave one out")
    with show_progress("packing") as display:
        from mmfree_jax.infer.agreement import PROMPT_TOKENS, held_out_documents, measure_agreement
        from mmfree_jax.saved.open_model import SavedModel, open_model
        from mmfree_jax.saved.pack import pack as make_packed
        from mmfree_jax.saved.packed import StreamAgreement

        saved = open_model(config.model, step=config.step)
        documents = None
        if config.agreement_data is not None:
            documents = held_out_documents(
                config.agreement_data,
                count=config.agreement_prompts,
                length=PROMPT_TOKENS,
                flag="--agreement-prompts",
            ).tolist()

        def measure(packed: SavedModel) -> StreamAgreement:
            display.stage("comparing greedy text")
            return measure_agreement(
                saved,
                packed,
                prompts=config.agreement_prompts,
                new_tokens=config.agreement_tokens,
                documents=documents,
            )

        report = make_packed(
            saved,
            config.out,
            bits=config.bits,
            embedding=config.embedding,
            max_bytes=None if config.max_file_mb is None else int(1e6 * config.max_file_mb),
            measure=measure if config.agreement_prompts else None,
        )
    print(
        f"{report.file}: {report.num_bytes / 2**20:.1f} MiB, {report.weights:,} ternary weights "
        f"at {config.bits} bits; embedding in {report.embedding}, relative error "
        f"{report.embedding_error:.2e}"
    )
    if report.agreement is not None:
        print(report.agreement)
    return 0
