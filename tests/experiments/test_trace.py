"""What a profiler trace says: kernels by name, and collectives beside other work."""

import jax
import jax.numpy as jnp
import pytest

from mmfree_jax.experiments.bench.trace import (
    Kernel,
    exchange,
    kernel_times,
    plot_timeline,
    read_kernels,
)


def _kernel(name, start, end, *, device="/device:GPU:0", stream="Stream #1"):
    return Kernel(device, stream, name, 1e6 * start, 1e6 * end)


_STEP = [
    _kernel("gemm", 0, 4),
    _kernel("gemm", 6, 9),
    _kernel("norm", 9, 10),
    # Beside a product from 3 to 4, alone to 6, beside the next from 6 to 8.
    _kernel("ncclDevKernel_AllReduce", 3, 8, stream="Stream #2"),
    # Two at once count once.
    _kernel("ncclDevKernel_AllGather", 7, 8, stream="Stream #3"),
    _kernel("ncclDevKernel_AllReduce", 20, 21, stream="Stream #2"),
    _kernel("gemm", 20, 21, device="/device:GPU:1"),
]


def test_kernels_of_one_name_are_summed_longest_first():
    times = kernel_times(_STEP)
    assert [(t.name, t.calls, t.milliseconds) for t in times] == [
        ("gemm", 3, pytest.approx(8.0)),
        ("ncclDevKernel_AllReduce", 2, pytest.approx(6.0)),
        ("norm", 1, pytest.approx(1.0)),
        ("ncclDevKernel_AllGather", 1, pytest.approx(1.0)),
    ]


def test_the_exchange_is_that_of_the_first_device():
    moved = exchange(_STEP)
    assert moved.total_ms == pytest.approx(6.0)
    assert moved.hidden_ms == pytest.approx(3.0)
    assert exchange([]) == (0, 0)


def test_the_timeline_is_drawn(tmp_path):
    plot_timeline(_STEP, tmp_path / "timeline.png", title="a step")
    assert (tmp_path / "timeline.png").stat().st_size > 2_000


def test_a_real_trace_is_read_and_its_absence_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no \*\.xplane\.pb"):
        read_kernels(tmp_path)
    with jax.profiler.trace(str(tmp_path)):
        jax.block_until_ready(jnp.ones(8) + 1)
    # The CPU's trace has no line of device kernels.
    assert read_kernels(tmp_path) == []
