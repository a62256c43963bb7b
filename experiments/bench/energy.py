"""Energy of a program on a GPU: by NVML's counter, else by the power that nvidia-smi samples.

Imports nothing of this project, so that a peer's interpreter reads the same meter.
"""

import contextlib
import os
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
      device: number of the GPU as the program counts, of those in CUDA_VISIBLE_DEVICES.

    Returns:
      {"energy": {"mj_per_token", "watts", "seconds", "tokens", "counter"}}, or {"energy": the
      reason for which there is none}.
    """
    reasons = []
    for meter in (_by_counter, _by_samples):
        try:
            joules, spent, calls, name = meter(call, seconds, board_of(device))
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


def board_of(device: int) -> str:
    """What NVML and nvidia-smi call a GPU of this program: its number on the machine, or its UUID.

    Where numbers are CUDA's own, boards of one kind are taken to be in the order of their slots.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").strip()
    return visible.split(",")[device].strip() if visible else str(device)


def _repeat(call: Callable[[], object], seconds: float) -> tuple[float, int]:
    """Seconds spent, and calls."""
    calls, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        call()
        calls += 1
    return time.perf_counter() - start, calls


def _by_counter(
    call: Callable[[], object], seconds: float, board: str
) -> tuple[float, float, int, str]:
    import pynvml  # pyright: ignore[reportMissingImports]

    pynvml.nvmlInit()
    if board.isdigit():
        handle = pynvml.nvmlDeviceGetHandleByIndex(int(board))
    else:
        handle = pynvml.nvmlDeviceGetHandleByUUID(board)
    before = pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    spent, calls = _repeat(call, seconds)
    joules = 1e-3 * (pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) - before)
    return joules, spent, calls, "nvmlDeviceGetTotalEnergyConsumption"


def _by_samples(
    call: Callable[[], object], seconds: float, board: str
) -> tuple[float, float, int, str]:
    """The mean of what nvidia-smi samples, times the time."""
    command = ["nvidia-smi", f"--id={board}", "--query-gpu=power.draw",
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
