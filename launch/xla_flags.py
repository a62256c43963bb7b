"""XLA's switches for several GPUs: the one place they are chosen and explained.

export XLA_FLAGS="$(python -m mmfree_jax.launch.xla_flags)"
"""

import os
from collections.abc import Mapping

# On top of XLA's defaults, which schedule for latency already:
#  - pipelined_*: a collective of the layer loop starts in one turn and is waited for in the
#    next, so that the last one of a layer too has work to hide behind. The gradients'
#    all-reduce (data), and the weights' all-gather and gradients' reduce-scatter (fsdp).
#  - combine thresholds: a layer's few matrices travel together, in messages large enough for
#    the links' full rate, while a layer's still leave before the next one's are ready. With
#    1 MiB, so that no matrix is copied into a common buffer and out of it, a step of 1.3B took
#    as long (247.6 ms with 4 GPUs, 247.0 so) and 1.0 GiB more (results/h100/exchange.json);
#    in bfloat16 on 2 GPUs 226.1 ms, with 32 MiB 224.1, 225.0 so (results/h200/exchange.json).
#    Reduce-scatters up to about a layer's: where layers are unrolled, 128 MiB joins those of
#    several layers, and their gradients' products wait, with all that they read, for the last:
#    1.3B with fsdp 2 then takes 19.1 GiB instead of 15.0 (compiled ahead of time, not timed).
OVERLAP = (
    "--xla_gpu_enable_latency_hiding_scheduler=true",
    "--xla_gpu_enable_pipelined_all_reduce=true",
    "--xla_gpu_enable_pipelined_all_gather=true",
    "--xla_gpu_enable_pipelined_reduce_scatter=true",
    "--xla_gpu_all_reduce_combine_threshold_bytes=134217728",
    "--xla_gpu_all_gather_combine_threshold_bytes=134217728",
    "--xla_gpu_reduce_scatter_combine_threshold_bytes=16777216",
)


def with_overlap(environ: Mapping[str, str]) -> dict[str, str]:
    """`environ` with the switches above in $XLA_FLAGS, behind which the user's own still win."""
    flags = environ.get("XLA_FLAGS", "").split()
    given = {flag.partition("=")[0] for flag in flags}
    added = [flag for flag in OVERLAP if flag.partition("=")[0] not in given]
    return dict(environ) | {"XLA_FLAGS": " ".join([*added, *flags])}


if __name__ == "__main__":
    print(with_overlap(os.environ)["XLA_FLAGS"])
