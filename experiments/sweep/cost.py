"""What a sweep will cost: FLOPs exactly, time by a stated rule.

Rates of tokens come, for each family and size, from the first of these that there is:
1. finished runs in the table, on the same device (their median);
2. the device's data sheet x the utilisation that the config states, in proportion to the width
   below 1024 (narrow models are bound by the traffic of activations, not by products);
3. on a device without a data sheet (a CPU), a rate of matrix products measured here x that
   utilisation, at every width.
"""

import dataclasses
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from mmfree_jax.experiments.sweep.config import SweepConfig
from mmfree_jax.experiments.sweep.errors import SweepError
from mmfree_jax.experiments.sweep.plan import parameters
from mmfree_jax.experiments.sweep.planned_run import PlannedRun
from mmfree_jax.experiments.sweep.process import child_environment
from mmfree_jax.experiments.sweep.table import Row, own_tokens
from mmfree_jax.train.flops import find_device

_REFERENCE_WIDTH = 1024
_PROBE_SIZE = 1024


@dataclass(frozen=True)
class DeviceRate:
    """How fast a device multiplies matrices."""

    kind: str
    """JAX's name of the device."""
    count: int
    flops: float
    """Operations a second, of one device."""
    is_measured: bool
    """Measured here, rather than taken from the data sheet."""


def device_from_name(name: str) -> DeviceRate:
    """The device of that name, for planning elsewhere.

    Raises:
      SweepError: no data sheet is known.
    """
    sheet = find_device(name)
    if sheet is None:
        raise SweepError(f"device {name!r} has no known peak rate: leave --device out, on the "
                         "machine that will run the sweep")  # fmt: skip
    return DeviceRate(sheet.name, 1, sheet.bf16_flops, False)


def probe_device(timeout: float = 120.0) -> DeviceRate:
    """Asks JAX for its devices, in a process of its own.

    Raises:
      SweepError: JAX does not start.
    """
    try:
        result = subprocess.run(
            [sys.executable, "-m", "mmfree_jax.experiments.sweep.cost"],
            capture_output=True, text=True, timeout=timeout, check=False,
            env=child_environment() | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"},
        )  # fmt: skip
    except subprocess.TimeoutExpired as e:
        raise SweepError(f"device: JAX did not start within {timeout:.0f} s; see --device") from e
    if result.returncode:
        last = (result.stderr.strip().splitlines() or ["no message"])[-1]
        raise SweepError(f"device: JAX does not start here ({last}); see --device")
    return DeviceRate(**json.loads(result.stdout.splitlines()[-1]))


def _measure() -> dict:
    """In the probe's process: the device, and its matrix products where no sheet tells."""
    import jax
    import jax.numpy as jnp

    device = jax.devices()[0]
    sheet = find_device(device.device_kind)
    rate = 0.0 if sheet is None else sheet.bf16_flops
    if sheet is None:
        product = jax.jit(lambda a: a @ a)
        a = jnp.ones((_PROBE_SIZE, _PROBE_SIZE), jnp.float32)
        product(a).block_until_ready()
        times = []
        for _ in range(10):
            begin = time.perf_counter()
            product(a).block_until_ready()
            times.append(time.perf_counter() - begin)
        rate = 2 * _PROBE_SIZE**3 / statistics.median(times)
    return {"kind": device.device_kind, "count": len(jax.devices()), "flops": rate,
            "is_measured": sheet is None}  # fmt: skip


@dataclass(frozen=True)
class Estimate:
    """Cost of a list of runs."""

    runs: int
    flops: float
    seconds: float
    """On the devices of one host, `parallel` small runs at a time."""
    basis: str
    """How the time was arrived at, in a sentence."""


def estimate(
    sweep: SweepConfig, runs: Sequence[PlannedRun], rows: Iterable[Row], device: DeviceRate,
    parallel: int = 1, gpus: int = 0,
) -> Estimate:  # fmt: skip
    """FLOPs and time of `runs`: of a branch those of its decay, as its trunk is a run too.

    Runs that share a device share its rate: packing is taken to hide only what each run
    spends outside training (start, compilation), which is where small runs lose most. Over
    several GPUs, each with runs of its own, the sum is spread evenly, but is no shorter than
    the longest run.

    Args:
      sweep: the config.
      runs: those to price.
      rows: finished runs, whose rates count first.
      device: which runs will have, and how many of it.
      parallel: small runs at a time on a device.
      gpus: devices to spread runs over, one a run; 0: each run has all there are.
    """
    if gpus:
        device = dataclasses.replace(device, count=1)
    same = [r for r in rows if r["device"] == device.kind]
    measured = _measured(same)
    overheads = [float(r["wall_s"]) - own_tokens(r) / float(r["tokens_per_s"])
                 for r in same if r["wall_s"] and _positive(r["tokens_per_s"])]  # fmt: skip
    overhead = statistics.median(overheads) if overheads else sweep.overhead_seconds
    seconds, longest, from_rows = 0.0, 0.0, 0
    for run in runs:
        sharing = share(sweep, run, parallel)
        rate = measured.get((run.family, run.size, sharing))
        if rate is None:
            training = _seconds_by_rate(sweep, run, device)
        else:  # what one run gets while `sharing` of them share the device
            training = run.tokens * run.own_share / (rate * sharing)
            from_rows += 1
        seconds += training + max(0.0, overhead) / sharing
        longest = max(longest, training * sharing + max(0.0, overhead))
    seconds = max(seconds / max(1, gpus), longest)
    if device.is_measured:
        source = "a matrix product measured here"
        used = f"{sweep.utilisation:.0%} utilisation"
    else:
        source = "its data sheet"
        used = f"{sweep.utilisation:.0%} utilisation at width {_REFERENCE_WIDTH}, less below it"
    basis = f"{device.count} x {device.kind}: {source}, {device.flops / 1e12:.3g} TFLOP/s, x {used}"
    if from_rows:
        basis = (
            f"{from_rows} of {len(runs)} runs at the rates of finished runs of their family and "
            f"size on {device.kind}" + ("" if from_rows == len(runs) else f"; the others: {basis}")
        )
    where = "median of finished runs" if overheads else "stated"
    basis += f"; {overhead:.0f} s a run to start, compile and evaluate ({where})"
    if gpus:
        basis += f"; spread over {gpus} GPUs, one a run"
    if parallel > 1:
        basis += f"; runs of up to {sweep.pack_below:.3g} parameters {parallel} at a time"
    return Estimate(len(runs), sum(r.own_flops for r in runs), seconds, basis)


def share(sweep: SweepConfig, run: PlannedRun, parallel: int) -> int:
    """How many runs a device is shared by while this one is on it."""
    return parallel if parameters(run.config, "non-embedding") <= sweep.pack_below else 1


def relative_seconds(run: PlannedRun) -> float:
    """What a run takes, in units that are the same for all: longer where the model is narrow."""
    return run.own_flops / min(1.0, run.config.model.hidden_size / _REFERENCE_WIDTH)


def _seconds_by_rate(sweep: SweepConfig, run: PlannedRun, device: DeviceRate) -> float:
    """Training time by the utilisation that the config states."""
    work = run.own_flops if device.is_measured else relative_seconds(run)
    return work / (device.flops * device.count * sweep.utilisation)


def _positive(text: str) -> bool:
    return bool(text) and float(text) > 0


def _measured(rows: Iterable[Row]) -> Mapping[tuple[str, str, int], float]:
    """Median tokens a second of finished runs, by family, size and runs that shared a device."""
    found: dict[tuple[str, str, int], list[float]] = {}
    for row in rows:
        if _positive(row["tokens_per_s"]):
            key = (row["family"], row["size"], int(row["parallel"]))
            found.setdefault(key, []).append(float(row["tokens_per_s"]))
    return {key: statistics.median(rates) for key, rates in found.items()}


if __name__ == "__main__":
    print(json.dumps(_measure()))
