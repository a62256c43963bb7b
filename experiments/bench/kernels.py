"""Times every op's implementations at real models' shapes, and keeps which one won where."""

import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from mmfree_jax.errors import ConfigError
from mmfree_jax.experiments.bench.roofline import Row, with_limits
from mmfree_jax.files import write_text
from mmfree_jax.installed import versions
from mmfree_jax.json_shape import fault
from mmfree_jax.model_config import ModelConfig
from mmfree_jax.pallas_kernels import dispatch as choices
from mmfree_jax.presets import preset
from mmfree_jax.text_files import read_json
from mmfree_jax.train.flops import find_device

OPS = ("recurrence", "norm_quant", "ternary_matmul", "bitlinear", "cross_entropy")


def measure(
    ops: Sequence[str], sizes: Sequence[str], *, tokens: int, seq_len: int, dtype: str = "bfloat16"
) -> Iterator[Row]:
    """One row for each op, shape, pass and implementation, as soon as it is there.

    Rows with "candidate" name an implementation that `mmfree_jax.pallas_kernels.dispatch` may
    choose, under their "key" and "dtype".

    Args:
      ops: of `OPS`.
      sizes: presets whose shapes are taken.
      tokens: in a batch.
      seq_len: of the recurrence's rows; once more in a single row of all tokens.
      dtype: of the float inputs; bitlinear and cross_entropy are timed in bfloat16 alone.

    Raises:
      ConfigError: an unknown op or preset, or tokens that are no multiple of seq_len.
    """
    unknown = sorted(set(ops) - set(OPS))
    if unknown:
        raise ConfigError(f"ops is {unknown[0]!r}: choose from {', '.join(OPS)}")
    if seq_len < 1 or tokens < 1 or tokens % seq_len:
        raise ConfigError(f"tokens is {tokens}: set --tokens to a multiple of seq_len ({seq_len})")
    batch = _Batch([preset(size).model for size in sizes], tokens, seq_len, dtype)
    device = find_device(jax.devices()[0].device_kind)
    for op in ops:
        for row in _MEASURES[op](batch):
            yield with_limits(row, device)


def read_choices(path: Path) -> dict[str, Any]:
    """The table of choices, by device.

    Raises:
      ConfigError: the file holds something else.
    """
    try:
        table: Any = read_json(path)
    except (OSError, ValueError):
        table = None
    if fault(table, {}) or any(fault(mine, {}) for mine in table.values()):
        raise ConfigError(f"choices is {path}, which is no table of choices: give another file")
    return table


def write_choices(rows: Sequence[Row], path: Path, *, command: str) -> None:
    """Puts the winners of this device into the table of choices; other entries stay."""
    table: dict[str, Any] = read_choices(path) if path.exists() else {}
    kind = jax.devices()[0].device_kind
    mine = table.setdefault(kind, {})
    mine |= {"command": command, "jax": jax.__version__}
    for op, dtypes in choices.choose(rows).items():
        for dtype, shapes in dtypes.items():
            mine.setdefault(op, {}).setdefault(dtype, {}).update(shapes)
    write_text(path, json.dumps(table, indent=1) + "\n")


def provenance() -> dict[str, Any]:
    """The device and the versions that a measurement belongs to."""
    return {"device": jax.devices()[0].device_kind, **versions("jax", "jaxlib", "flax")}


@dataclasses.dataclass(frozen=True)
class _Batch:
    """What the shapes follow from."""

    models: list[ModelConfig]
    tokens: int
    seq_len: int
    dtype: str


def _recurrence(batch: _Batch) -> Iterator[Row]:
    from mmfree_jax.pallas_kernels.recurrence.benchmark import benchmark

    shapes = [
        (rows, batch.tokens // rows, model.state_size)
        for model in batch.models
        for rows in (batch.tokens // batch.seq_len, 1)
    ]
    for row in benchmark(list(dict.fromkeys(shapes)), dtype=jnp.dtype(batch.dtype)):
        # The plain pass of XLA and the kernels alike; the fused ones come with it.
        yield {**row, "key": row["shape"], "dtype": batch.dtype, "candidate": True}


def _norm_quant(batch: _Batch) -> Iterator[Row]:
    from mmfree_jax.pallas_kernels.norm_quant.benchmark import benchmark

    shapes = [
        shape
        for model in batch.models
        for shape in (
            (model.hidden_size, 3, "outer"),
            (model.hidden_size, 1, "outer"),
            (model.state_size, 1, "times_silu"),
            (model.glu_size, 1, "gated"),
        )
    ]
    for row in benchmark(batch.tokens, shapes, dtype=jnp.dtype(batch.dtype)):
        yield {**row, "key": (row["k"],), "dtype": batch.dtype, "candidate": True}


def _ternary_matmul(batch: _Batch) -> Iterator[Row]:
    from mmfree_jax.pallas_kernels.ternary_matmul.api import available_implementations
    from mmfree_jax.pallas_kernels.ternary_matmul.benchmark import benchmark, variants

    shapes = [
        shape
        for model in batch.models
        for shape in (
            (model.hidden_size, model.hidden_size),
            (2 * model.glu_size, model.hidden_size),
            (model.hidden_size, model.glu_size),
            (model.vocab_size, model.hidden_size),
        )
    ]
    names = _worth_timing(available_implementations())
    for row in benchmark(batch.tokens, list(dict.fromkeys(shapes)), variants(names)):
        key = (row["m"], row["n"], row["k"])
        yield {**row, "key": key, "dtype": "int8", "candidate": row["variant"] in names}


def _bitlinear(batch: _Batch) -> Iterator[Row]:
    from mmfree_jax.pallas_kernels.bitlinear.benchmark import benchmark
    from mmfree_jax.pallas_kernels.ternary_matmul.api import available_implementations

    layers = [
        layer
        for model in batch.models
        for layer in (
            (model.hidden_size, (model.state_size,) * 3, True),
            (model.hidden_size, (2 * model.glu_size,), True),
            (model.glu_size, (model.hidden_size,), False),
        )
    ]
    names = _worth_timing(available_implementations())
    yield from benchmark(batch.tokens, layers, [name for name in names if name != "pallas_triton"])


def _worth_timing(implementations: Sequence[str]) -> list[str]:
    """Without the float products, which only a CPU could prefer and which tune for long."""
    if jax.default_backend() == "cpu":
        return list(implementations)
    return [name for name in implementations if name not in ("xla_bf16", "xla_f32")]


def _cross_entropy(batch: _Batch) -> Iterator[Row]:
    from mmfree_jax.pallas_kernels.cross_entropy.benchmark import benchmark, variants

    shapes = [(batch.tokens, model.vocab_size, model.hidden_size) for model in batch.models]
    yield from benchmark(list(dict.fromkeys(shapes)), variants((min(4096, batch.tokens),)))


_MEASURES = {
    "recurrence": _recurrence,
    "norm_quant": _norm_quant,
    "ternary_matmul": _ternary_matmul,
    "bitlinear": _bitlinear,
    "cross_entropy": _cross_entropy,
}
