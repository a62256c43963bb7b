"""Compiles a training step for devices that are not here, and reports what it found."""

import dataclasses
import time
from typing import Any

from mmfree_jax.config import TrainConfig, tokens_per_step
from mmfree_jax.launch.ahead.hlo import moved_within, parse_collectives, share_alongside
from mmfree_jax.launch.ahead.step_cost import estimate_times, fits
from mmfree_jax.launch.ahead.topology import Topology, as_if_on, make_devices

Report = dict[str, Any]


def compile_step(
    config: TrainConfig, topology: Topology, *, simulated: bool, peak_share: float
) -> Report:
    """Compiles the step of `config` ahead of time. `topology.prepare` comes first.

    Args:
      config: of the run; nothing of its data is read.
      topology: the devices.
      simulated: as `prepare` said.
      peak_share: of the data sheet's rate of products that computation is taken to reach.

    Returns:
      Plain values: devices, mesh, memory of each device (GiB), collectives by kind, bytes that a
      device sends in a step by each network, times.

    Raises:
      ConfigError: batch or model do not divide over the mesh.
    """
    import jax
    import jax.numpy as jnp

    from mmfree_jax.model.kernel_choice import check_kernels
    from mmfree_jax.parallel.sharding import check_divisible, make_mesh
    from mmfree_jax.train.optimizer import make_optimizer
    from mmfree_jax.train.schedule import schedule_values
    from mmfree_jax.train.step import jit_train_step, state_shapes

    devices = make_devices(topology, simulated)
    optimizer = make_optimizer(config.optimizer, config.model)
    shapes = state_shapes(config, optimizer)
    tokens = jax.ShapeDtypeStruct((config.batch_size, config.data.seq_len), jnp.int32)
    batch = dict.fromkeys(("tokens", "targets", "segment_ids"), tokens)
    schedule = schedule_values(config.optimizer, config.steps)
    with as_if_on(devices):
        mesh = make_mesh(config.mesh, devices)
        check_divisible(config, mesh)
        check_kernels(config.model, devices[0].platform)
        step = jit_train_step(config, optimizer, mesh)
        begin = time.perf_counter()
        with jax.set_mesh(mesh):
            compiled = step.lower(shapes, batch, schedule).compile()
    seconds = time.perf_counter() - begin
    text = compiled.as_text()
    place_of = {id(device): i // topology.each for i, device in enumerate(devices)}
    collectives = parse_collectives(text, [place_of[id(d)] for d in mesh.devices.flat])
    memory = compiled.memory_analysis()
    state = memory.argument_size_in_bytes / 2**30
    scratch = memory.temp_size_in_bytes / 2**30
    new = (memory.output_size_in_bytes - memory.alias_size_in_bytes) / 2**30
    total = state + scratch + max(0.0, new)
    by_kind: dict[str, dict[str, float]] = {}
    for c in collectives:
        row = by_kind.setdefault(c.kind, {"times": 0, "near_bytes": 0.0, "far_bytes": 0.0})
        row["times"] += c.times
        row["near_bytes"] += c.near
        row["far_bytes"] += c.far
    times = estimate_times(config, topology, collectives, peak_share)
    device = topology.device
    return {
        "topology": topology.text,
        "devices": topology.count,
        "chip": device.name if device else "cpu",
        "simulated": simulated,
        "jax": jax.__version__,
        "mesh": dict(mesh.shape),
        "batch_size": config.batch_size,
        "grad_accum": config.grad_accum,
        "seq_len": config.data.seq_len,
        "remat": config.model.remat,
        "compile_s": seconds,
        "memory_gib": {
            "state_and_batch": state,
            "scratch": scratch,
            "total": total,
            "device": device.memory_gib if device else None,
            "fits": None if simulated else fits(total, topology),
        },
        "collectives": by_kind,
        "networks": [
            {"name": topology.near_network, "bytes": sum(c.near for c in collectives)},
            {"name": topology.far_network, "bytes": sum(c.far for c in collectives)},
        ],
        "share_alongside": share_alongside(text),
        "moved_within_bytes": moved_within(text),
        "times_s": None
        if times is None
        else dataclasses.asdict(times) | {"hidden": times.hidden, "exposed": times.exposed},
        "tokens_per_s_a_device": None
        if times is None
        else {
            "hidden": tokens_per_step(config) / times.hidden / topology.count,
            "exposed": tokens_per_step(config) / times.exposed / topology.count,
        },
        "peak_share": peak_share,
    }


def describe(report: Report) -> str:
    """The report as a few lines for people."""
    mesh = " x ".join(f"{name} {size}" for name, size in report["mesh"].items() if size > 1)
    memory = report["memory_gib"]
    lines = [
        f"{report['devices']} x {report['chip']} ({report['topology']}), mesh {mesh or 'of one'}, "
        f"{report['batch_size']} rows of {report['seq_len']} tokens, remat {report['remat']}; "
        f"compiled in {report['compile_s']:.0f} s"
    ]
    if report["simulated"]:
        lines.append(
            "  simulated on CPU devices, since the compiler for it is not installed: collectives "
            "stand for the real ones, scratch memory does not"
        )
    room = "" if memory["device"] is None else f" of {memory['device']:.0f}"
    verdict = {True: ": fits", False: ": does NOT fit", None: ""}[memory["fits"]]
    lines.append(
        f"  memory a device: {memory['total']:.1f}{room} GiB{verdict} "
        f"(state and batch {memory['state_and_batch']:.1f}, scratch {memory['scratch']:.1f})"
    )
    near, far = report["networks"]
    for kind, row in sorted(report["collectives"].items()):
        beyond = f", {row['far_bytes'] / 1e9:.3f} GB by {far['name']}" if row["far_bytes"] else ""
        lines.append(
            f"  {kind:<19}{row['times']:>6.0f} a step, a device sends "
            f"{row['near_bytes'] / 1e9:.3f} GB by {near['name']}{beyond}"
        )
    if far["bytes"]:
        lines.append(
            f"  in all a device sends {near['bytes'] / 1e9:.3f} GB by {near['name']} and "
            f"{far['bytes'] / 1e9:.3f} GB by {far['name']}"
        )
    if report["share_alongside"] is not None and not report["simulated"]:
        lines.append(
            f"  {report['share_alongside']:.0%} of the bytes travel while other work is scheduled"
        )
    if not report["simulated"]:
        lines.append(
            f"  kernels that only copy, transpose, cut or join read and write "
            f"{report['moved_within_bytes'] / 1e9:.3f} GB"
        )
    times, rates = report["times_s"], report["tokens_per_s_a_device"]
    if times is not None:
        lines.append(
            f"  step: products {1e3 * times['compute']:.0f} ms at {report['peak_share']:.0%} of "
            f"the peak, exchange {1e3 * times['near']:.0f} ms near and "
            f"{1e3 * times['far']:.0f} ms far: {1e3 * times['hidden']:.0f} ms if it all hides, "
            f"{1e3 * times['exposed']:.0f} if none does, "
            f"{rates['exposed']:,.0f} to {rates['hidden']:,.0f} tokens/s a device"
        )
    return "\n".join(lines)
