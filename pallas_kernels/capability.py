"""The compute capability of the first device, by which kernels are chosen."""

import jax


def compute_capability() -> float | None:
    """9.0 for a Hopper; 0 for a GPU that is not NVIDIA's; None for what says nothing of it."""
    text = getattr(jax.devices()[0], "compute_capability", None)  # "9.0"; "gfx942" with ROCm
    if text is None:
        return None
    return float(text) if text.replace(".", "").isdigit() else 0.0
