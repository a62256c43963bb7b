"""Energy of a program on a GPU: by NVML's counter, else by the power that nvidia-smi samples.

Imports nothing of this project, so that a peer's interpreter reads the same meter.
"""

import contextlib
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from typing import Any

_SAMPLE_MS = 100


def measure_energy(
    call: Callable[[], object], *, seconds: float, tokens: int, device: int
) -> dict[str, Any]:
    """Calls a program for at least `seconds` and reads the energy of the whole board meanwhile.

    Args:
      call: runs the program and waits for it.
      seconds: shortest time over which it is read.
      tokens: of one call.
      device: number of the GPU as NVML counts.

    Returns:
      {"energy": {"mj_per_token", "watts", "seconds", "tokens", "counter"}}, or {"energy": the
      reason for which there is none}.
    """
    reasons = []
    for meter in (_by_counter, _by_samples):
        try:
            joules, spent, calls, name = meter(call, seconds, device)
        except Exception as e:  # no driver, no counter, no package, no program
            reasons.append(f"{type(e).__name__}: {e}")
            continue
        return {
            "energy": {
                "mj_per_token": round(1e3 * joules / (calls * tokens), 3),
                "watts": round(joules / spent, 1),
                "seconds": round(spent, 1),
                "tokens": calls * tokens,
                "counter": name,
            }
        }
    return {"energy": "not measured: " + "; ".join(reasons)}


def _repeat(call: Callable[[], object], seconds: float) -> tuple[float, int]:
    """Seconds spent, and calls."""
    calls, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        call()
        calls += 1
    return time.perf_counter() - start, calls


def _by_counter(
    call: Callable[[], object], seconds: float, device: int
) -> tuple[float, float, int, str]:
    import pynvml  # pyright: ignore[reportMissingImports]

    pynvml.nvmlInit()
    handle = pynvml.nvmlDeviceGetHandleByIndex(device)
    before = pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    spent, calls = _repeat(call, seconds)
    joules = 1e-3 * (pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) - before)
    return joules, spent, calls, "nvmlDeviceGetTotalEnergyConsumption"


def _by_samples(
    call: Callable[[], object], seconds: float, device: int
) -> tuple[float, float, int, str]:
    """The mean of what nvidia-smi samples, times the time."""
    command = ["nvidia-smi", f"--id={device}", "--query-gpu=power.draw",
               "--format=csv,noheader,nounits", f"--loop-ms={_SAMPLE_MS}"]  # fmt: skip
    with tempfile.TemporaryFile("w+") as samples:
        sampler = subprocess.Popen(command, stdout=samples, stderr=subprocess.STDOUT)
        try:
            spent, calls = _repeat(call, seconds)
        finally:
            sampler.kill()
            sampler.wait()
        samples.seek(0)
        lines = samples.read().splitlines()
    watts = []
    for line in lines:
        with contextlib.suppress(ValueError):
            watts.append(float(line))
    if not watts:
        raise RuntimeError(f"nvidia-smi: {lines[-1].strip() if lines else 'no sample'}")
    return statistics.mean(watts) * spent, spent, calls, "nvidia-smi power.draw"
