"""Named configurations: the paper's sizes, small ones, and a scaling ladder.

A preset is a model with a peak learning rate. It is no recipe: steps, batch and warm-up are the
defaults of `TrainConfig` (1,000 steps of 8 x 2048 tokens, no warm-up), which is 16M tokens at any
of the paper's sizes. The paper's own runs are experiments/configs/paper-*.yaml.

Parameters of a block, for either family (m is the GLU width):
  mixer 4 d^2 (i, f, g, o or q, k, v, o) + GLU 3 d m, and m = 256 ceil(int(8d/3) / 256).
The embedding and the head add 2 V d.
"""

import dataclasses

from mmfree_jax.config import DataConfig, OptimizerConfig, TrainConfig, replace_model
from mmfree_jax.errors import ConfigError
from mmfree_jax.model_config import DENSE, ModelConfig

# name: (layers, hidden size, peak learning rate MatMul-free, and Transformer++)
# The paper's rates are 4e-3, 2.5e-3, 1.5e-3 against 3e-4. Beyond 2.7B it gives none:
# we go on at its slope, rate ~ parameters^-0.5, rounded.
_PAPER = {
    "370M": (24, 1024, 4e-3, 3e-4),
    "1.3B": (24, 2048, 2.5e-3, 3e-4),
    "2.7B": (32, 2560, 1.5e-3, 3e-4),
    "7B": (32, 4096, 1e-3, 3e-4),
    "13B": (40, 5120, 7e-4, 3e-4),
}

# A ladder of non-embedding sizes for scaling studies. The rates are those of the study
# (docs/scaling-study.md): the best of five at 12M tokens in steps of 16,384 with a warm-up of 5%,
# at 41M and 61M by its power law through the smaller sizes. Longer runs may want smaller ones.
#   name     L   d    m     4 d^2 + 3 d m   non-embedding
#   rung-1M  4   128  512       262,144         1.0M
#   rung-3M  6   192  512       442,368         2.7M
#   rung-7M  8   256  768       851,968         6.8M
#   rung-18M 10  384  1024    1,769,472        17.7M
#   rung-41M 12  512  1536    3,407,872        40.9M
#   rung-61M 12  640  1792    5,079,040        60.9M
_LADDER = {
    "rung-1M": (4, 128, 1.6e-2, 4e-3),
    "rung-3M": (6, 192, 1.6e-2, 4e-3),
    "rung-7M": (8, 256, 4e-3, 2e-3),
    "rung-18M": (10, 384, 2e-3, 2e-3),
    "rung-41M": (12, 512, 1.33e-3, 1.46e-3),
    "rung-61M": (12, 640, 9.86e-4, 1.29e-3),
}

# For tests and laptops; the vocabulary of `tiny` holds the byte tokenizer's 258.
_SMALL = {
    "tiny": (2, 64, 1e-2, 3e-3),
    "small": (6, 256, 8e-3, 1e-3),
}

_TRANSFORMER_SUFFIX = "-transformer"
# A head of float weights and inputs behind ternary layers, as BitNet b1.58 has it (arXiv
# 2402.17764); the rate is the ternary head's, which nobody has tuned for it.
_FLOAT_HEAD_SUFFIX = "-float-head"


def _train_config(layers: int, width: int, rate: float, *, transformer: bool) -> TrainConfig:
    model = ModelConfig(hidden_size=width, num_layers=layers)
    optimizer = OptimizerConfig(learning_rate=rate, schedule="paper")
    if transformer:
        model = dataclasses.replace(
            model, mixer="attention", mixer_linear=DENSE, glu_linear=DENSE, head_linear=DENSE
        )
        optimizer = dataclasses.replace(optimizer, schedule="cosine", min_lr_ratio=0.1)
    return TrainConfig(model=model, optimizer=optimizer)


def _build() -> dict[str, TrainConfig]:
    presets = {}
    for name, (layers, width, rate, transformer_rate) in {**_SMALL, **_LADDER, **_PAPER}.items():
        for suffix, peak in (("", rate), (_TRANSFORMER_SUFFIX, transformer_rate)):
            config = _train_config(layers, width, peak, transformer=bool(suffix))
            if name in _SMALL:
                config = dataclasses.replace(
                    config,
                    data=DataConfig(seq_len=256),
                    model=dataclasses.replace(
                        config.model,
                        vocab_size=264 if name == "tiny" else 4096,
                        compute_dtype="float32",
                        residual_dtype="float32",
                        remat="none",
                    ),
                )
            presets[name + suffix] = config
    # At the sizes that one GPU trains, what saves time and still fits it: 8.7 and 23.2 GiB at
    # 8 x 2048 tokens; of the twins, which are to be hard to beat, the fastest within 40: 14.2 and
    # 38.7 (experiments/results/h100/steps.txt).
    unrolled = {
        "370M": "gated",
        "1.3B": "states",
        "370M-transformer": "dots",
        "1.3B-transformer": "projections",
    }
    for name, remat in unrolled.items():
        presets[name] = replace_model(presets[name], remat=remat, scan_layers=False)
    presets["370M"] = dataclasses.replace(presets["370M"], loss_chunk=4096)
    # Where products are most of a step: 7% and more faster, and its loss was within 0.005 nats of
    # bfloat16's (experiments/results/backward8). At 370M it gains nothing.
    for name in ("1.3B", "2.7B", "7B", "13B"):
        presets[name] = replace_model(presets[name], backward="int8_dx")
    float_heads = {
        name + _FLOAT_HEAD_SUFFIX: replace_model(config, head_linear=DENSE)
        for name, config in presets.items()
        if not name.endswith(_TRANSFORMER_SUFFIX)
    }
    return presets | float_heads


PRESETS: dict[str, TrainConfig] = _build()


def names_vocabulary(name: str) -> bool:
    """Whether a preset is of a certain vocabulary, as all are but the ladder's rungs."""
    for suffix in (_TRANSFORMER_SUFFIX, _FLOAT_HEAD_SUFFIX):
        name = name.removesuffix(suffix)
    return name not in _LADDER


def preset(name: str) -> TrainConfig:
    """The configuration called `name`, for example "370M" or "1.3B-transformer".

    Raises:
      ConfigError: there is no such preset; the message lists them.

    Example:
      >>> from mmfree_jax import preset
      >>> config = preset("370M").model
      >>> config.hidden_size, config.num_layers
      (1024, 24)
      >>> preset("370M-transformer").model.mixer
      'attention'
    """
    if name not in PRESETS:
        raise ConfigError(f"preset is {name!r}: choose one of {', '.join(PRESETS)}")
    return PRESETS[name]
