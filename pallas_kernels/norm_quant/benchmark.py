"""Times the double RMSNorm and quantisation, forward and backward.

python -m mmfree_jax.pallas_kernels.norm_quant.benchmark
"""

import functools
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from ..timing import bandwidth, median_ms, row_of
from . import api

# (K, consumers, form): what stands before i f g, before gate-up, before o, before down.
MODEL_SHAPES = (
    (1024, 3, "outer"),
    (1024, 1, "outer"),
    (1024, 1, "times_silu"),
    (2816, 1, "gated"),
    (2048, 3, "outer"),
    (2048, 1, "outer"),
    (2048, 1, "times_silu"),
    (5632, 1, "gated"),
    (2560, 3, "outer"),
    (2560, 1, "outer"),
    (2560, 1, "times_silu"),
    (6912, 1, "gated"),
)
COPIES = 6  # Input sets a call rotates through, so that none waits in the cache.


def variants(
    names: Iterable[str] | None = None,
) -> dict[str, tuple[Callable, Callable]]:
    """name -> (forward, backward); by default XLA and the kernels of this backend."""
    kernel = {"gpu": ("pallas_gpu",), "tpu": ("pallas_tpu",)}
    names = names or ("xla", *kernel.get(jax.default_backend(), ()))

    def pair(name: str) -> tuple[Callable, Callable]:
        def forward(
            x: jax.Array,
            weights: tuple[jax.Array | None, ...],
            outer: jax.Array | None,
            **options: Any,
        ) -> tuple[Any, ...]:
            results = api.norm_quant(x, weights, outer, eps=1e-6, implementation=name, **options)
            return results[1:]  # Without x, which a program would copy.

        return forward, functools.partial(api.norm_backward, eps=1e-6, implementation=name)

    return {name: pair(name) for name in names}


def device_ms(program: Callable, sets: Sequence[tuple], *, calls: int = 5) -> tuple[float, Any]:
    """Milliseconds a set of the device's own time, from the profiler, and the first result.

    The host takes as long to launch these kernels and make their many results as the device
    takes to run them.
    """
    sets = list(sets)
    for _ in range(2):
        first = jax.block_until_ready(program(sets))[0]
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(calls):
                jax.block_until_ready(program(sets))
        (trace,) = Path(folder).rglob("*.xplane.pb")
        nanoseconds = sum(
            event.duration_ns
            for plane in jax.profiler.ProfileData.from_file(str(trace)).planes
            if plane.name.startswith("/device:")
            for line in plane.lines
            if line.name.startswith("Stream") or line.name == "XLA Ops"
            for event in line.events
        )
    if not nanoseconds:
        raise RuntimeError("the profiler saw no kernel on a device: run this on a GPU or TPU")
    return 1e-6 * nanoseconds / (calls * len(sets)), first


def benchmark(
    m: int = 16384,
    shapes: Iterable[tuple[int, int, str]] = MODEL_SHAPES,
    functions: dict[str, tuple[Callable, Callable]] | None = None,
    copies: int = COPIES,
    dtype: jax.typing.DTypeLike = jnp.bfloat16,
) -> Iterable[dict]:
    """One row for each shape, direction and variant: ms, GB/s of the fewest bytes, errors."""
    for k, count, form in shapes:
        keys = jax.random.split(jax.random.key(0), copies)
        read = m * k * (1 if form == "outer" else 2)
        options = {"gated": True} if form == "gated" else {}
        if form == "times_silu":
            options = {"times_silu": jax.random.normal(jax.random.key(1), (m, k), dtype)}
        weights = tuple(jnp.linspace(0.5, 1.5, k) + 0.1 * j for j in range(count))
        outer_weight = None if form == "gated" else jnp.linspace(1.5, 0.5, k)
        size = jnp.dtype(dtype).itemsize
        forward_sets = [
            (
                jax.random.normal(key, (m, 2 * k if form == "gated" else k), dtype),
                weights,
                outer_weight,
            )
            for key in keys
        ]
        reference_forward, reference_backward = (
            functools.partial(f, **options) for f in variants(("xla",))["xla"]
        )
        expected = jax.jit(reference_forward)(*forward_sets[0])
        gradients = tuple(jax.random.normal(key, (m, k), dtype) for key in keys[:count])
        scales = (jnp.full((1, 1), 0.02),) * count
        backward_sets = [
            (x, weights, outer_weight, expected[2], gradients, scales) for x, _, _ in forward_sets
        ]
        expected_backward = jax.jit(reference_backward)(*backward_sets[0])
        for name, (forward, backward) in (functions or variants()).items():
            for direction, function, sets, reference, bytes_ in (
                ("forward", forward, forward_sets, expected, read * size + m * k * count),
                (
                    "backward",
                    backward,
                    backward_sets,
                    expected_backward,
                    size * (2 * read + 2 * m * k * count),
                ),
            ):
                row = {
                    "op": f"norm_quant {direction}",
                    "m": m, "k": k, "consumers": count, "form": form, "variant": name,
                }  # fmt: skip
                # A CPU has no profile of its own, and no launches to hide.
                timer = median_ms if jax.default_backend() == "cpu" else device_ms
                call = functools.partial(function, **options)
                yield row_of(row, bandwidth, call, sets, reference, 1e-6 * bytes_, timer)


if __name__ == "__main__":
    for row in benchmark():
        print(row, flush=True)
