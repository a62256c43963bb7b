"""What the paper prints of speed, memory and energy: arXiv 2406.02528, with its own settings.

Only what stands in its text and tables; curves that are drawn alone are left out.
"""

from dataclasses import dataclass
from typing import Literal

Part = Literal["training", "inference", "layer", "lengths"]

PARTS: dict[Part, str] = {
    "training": "Training: a step by batch, fused and plain",
    "inference": "Inference by size: one row of 2,048 tokens",
    "layer": "One layer: one row of 2,048 tokens",
    "lengths": "Throughput and energy by length, one row",
}


@dataclass(frozen=True)
class Published:
    """One case of the paper.

    Attributes:
      part: of `PARTS`.
      work: "train", "prefill" or "decode".
      size: as presets are called; "": the paper does not say.
      form: of `paper.FORMS`.
      at: rows of a training step, else tokens that are read, or behind which is generated.
      card: that it was measured on; "": the paper does not say.
      source: where it stands.
      seconds: of a step, or of the whole run.
      gb: memory.
      tokens_per_s: throughput.
      mj_per_token: energy.
    """

    part: Part
    work: str
    size: str
    form: str
    at: int
    card: str
    source: str
    seconds: float | None = None
    gb: float | None = None
    tokens_per_s: float | None = None
    mj_per_token: float | None = None


_TRAINING = "v7, text on fused BitLinear"
_INFERENCE = "v7, text on GPU inference"
_TABLES = "v7, tables 3 and 6"
_LENGTHS = (500, 1000, 4000, 8000, 16000)
# (work, form): tokens a second and millijoules a token at `_LENGTHS`, 370M on an H100.
_BY_LENGTH = {
    ("decode", "packed"): (
        (13.4, 13.3, 13.5, 13.2, 13.5),
        (10_100.0, 10_100.0, 10_000.0, 9_900.0, 9_800.0),
    ),
    ("decode", "transformer-bf16"): (
        (22.4, 22.9, 21.7, 21.3, 20.9),
        (5_500.0, 5_600.0, 6_200.0, 6_800.0, 8_200.0),
    ),
    ("prefill", "packed"): (
        (11_400.0, 13_100.0, 30_600.0, 51_600.0, 84_600.0),
        (6.1, 5.3, 2.5, 1.4, 0.9),
    ),
    ("prefill", "transformer-bf16"): (
        (21_600.0, 32_700.0, 44_300.0, 55_400.0, 60_500.0),
        (11.3, 7.3, 5.4, 4.3, 3.8),
    ),
}

PUBLISHED: tuple[Published, ...] = (
    Published("training", "train", "1.3B", "fused", 256, "A100 80GB", _TRAINING, 1.21, 32.0),
    Published("training", "train", "1.3B", "plain", 256, "A100 80GB", _TRAINING, 1.52, 82.0),
    Published("inference", "prefill", "13B", "packed", 2048, "", _INFERENCE, 0.69548, 4.19),
    Published(
        "inference", "prefill", "13B", "transformer-bf16", 2048, "", _INFERENCE, 3.1831, 48.5
    ),
    Published("layer", "prefill", "", "packed", 2048, "", _INFERENCE, 0.00379, 0.12),
    Published("layer", "prefill", "", "transformer-bf16", 2048, "", _INFERENCE, 0.01387, 0.21),
    *(
        Published(
            "lengths", work, "370M", form, length, "H100", _TABLES, tokens_per_s=rate,
            mj_per_token=energy,
        )
        for (work, form), columns in _BY_LENGTH.items()
        for length, rate, energy in zip(_LENGTHS, *columns, strict=True)
    ),
)  # fmt: skip

# What to know when the paper's values stand beside others, by part.
NOTES: dict[Part, str] = {
    "training": (
        'The paper gives one point, at a batch of 2^8 and "input size and sequence length 1024", '
        "batch and sequence flattened. 256 rows of 1,024 tokens in 1.21 s would be more products "
        "than an A100 does, so that its batch counts something else. Here a batch is rows."
    ),
    "inference": (
        "The paper gives memory and latency at batch 1 and 2,048 tokens, not how many of them were "
        "read and how many generated, nor the card: its latency stands beside reading."
    ),
    "layer": (
        "The paper does not say how wide the layer is. Here it has an embedding and a head of 256 "
        "tokens around it."
    ),
    "lengths": (
        "Here a length is what is read, or behind which 64 tokens are generated, for attention "
        "the dearest of that length. Energy is the whole board's."
    ),
}


def published(part: str, work: str, size: str, form: str, at: int) -> Published | None:
    """The paper's value of a case; None: it has none."""
    for value in PUBLISHED:
        if (value.part, value.work, value.size, value.form, value.at) == (
            part, work, size, form, at,
        ):  # fmt: skip
            return value
    return None
