"""Where the time of a profiler trace went: by kernel, and how much of the exchange was hidden."""

import collections
import itertools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax

from mmfree_jax.files import open_atomically

# Kernels that move data between devices: NCCL's (GPU), XLA's own names (TPU).
_EXCHANGE = re.compile(
    r"nccl|all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute", re.IGNORECASE
)


class Kernel(NamedTuple):
    """One run of a kernel.

    Attributes:
      device: the profiler's name of it.
      stream: of the device; kernels of several streams run at the same time.
      name: with numbers left out, so that the kernels of all layers share it.
      start_ns: on the trace's clock.
      end_ns: likewise.
    """

    device: str
    stream: str
    name: str
    start_ns: float
    end_ns: float

    @property
    def exchanges(self) -> bool:
        """Whether it moves data between devices."""
        return bool(_EXCHANGE.search(self.name))


class KernelTime(NamedTuple):
    """Time of the kernels of one name."""

    name: str
    calls: int
    milliseconds: float


class Exchange(NamedTuple):
    """Time that one device spent in collectives.

    Attributes:
      total_ms: with any collective running.
      hidden_ms: of it, with another kernel running beside.
    """

    total_ms: float
    hidden_ms: float


def read_kernels(trace_dir: Path) -> list[Kernel]:
    """Every kernel in the newest trace of a folder.

    Args:
      trace_dir: folder given to `jax.profiler.start_trace`.

    Raises:
      FileNotFoundError: it holds no trace.
    """
    files = sorted(Path(trace_dir).rglob("*.xplane.pb"))
    if not files:
        raise FileNotFoundError(f"{trace_dir} holds no *.xplane.pb")
    found = []
    for plane in jax.profiler.ProfileData.from_file(str(files[-1])).planes:
        if not plane.name.startswith("/device:"):
            continue
        for line in plane.lines:
            # GPU: one line a stream. TPU: the line of XLA operations; others repeat it.
            if not (line.name.startswith("Stream") or line.name == "XLA Ops"):
                continue
            for event in line.events:
                name = re.sub(r"[._]\d+", "", event.name)
                end = event.start_ns + event.duration_ns
                found.append(Kernel(plane.name, line.name, name, event.start_ns, end))
    return found


def kernel_times(kernels: Sequence[Kernel]) -> list[KernelTime]:
    """Time by kernel over all devices, longest first."""
    calls: collections.Counter[str] = collections.Counter()
    nanoseconds: collections.defaultdict[str, float] = collections.defaultdict(float)
    for kernel in kernels:
        calls[kernel.name] += 1
        nanoseconds[kernel.name] += kernel.end_ns - kernel.start_ns
    longest = sorted(nanoseconds.items(), key=lambda item: -item[1])
    return [KernelTime(name, calls[name], ns / 1e6) for name, ns in longest]


def exchange(kernels: Sequence[Kernel]) -> Exchange:
    """The collectives of the first device, and how much of them ran beside other kernels."""
    first = min((k.device for k in kernels), default="")
    own = [k for k in kernels if k.device == first]
    moving = _union([(k.start_ns, k.end_ns) for k in own if k.exchanges])
    working = _union([(k.start_ns, k.end_ns) for k in own if not k.exchanges])
    total = sum(end - start for start, end in moving)
    hidden = sum(
        max(0.0, min(end, other_end) - max(start, other_start))
        for (start, end), (other_start, other_end) in itertools.product(moving, working)
        if start < other_end and other_start < end
    )
    return Exchange(total / 1e6, hidden / 1e6)


def _union(spans: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Spans that overlap or touch as one, in order."""
    merged: list[tuple[float, float]] = []
    for start, end in sorted(spans):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged


def plot_timeline(kernels: Sequence[Kernel], path: Path, *, title: str) -> None:
    """The first device's streams over time, collectives in a colour of their own."""
    from matplotlib.figure import Figure

    first = min((k.device for k in kernels), default="")
    own = [k for k in kernels if k.device == first]
    begin = min((k.start_ns for k in own), default=0.0)
    rows = {
        "products and kernels": ([k for k in own if not k.exchanges], "tab:blue"),
        "collectives": ([k for k in own if k.exchanges], "tab:orange"),
    }
    figure = Figure(figsize=(9, 1.8), layout="tight")
    axis = figure.subplots()
    for number, (members, colour) in enumerate(rows.values()):
        spans = _union([(k.start_ns, k.end_ns) for k in members])
        bars = [((start - begin) / 1e6, (end - start) / 1e6) for start, end in spans]
        axis.broken_barh(bars, (number - 0.4, 0.8), color=colour)
    axis.set_yticks(range(len(rows)), list(rows))
    axis.set(xlabel="ms", title=title, ylim=(len(rows) - 0.5, -0.5))
    with open_atomically(path) as file:
        figure.savefig(file, dpi=150)
