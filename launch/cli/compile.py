"""`mmfree compile`."""

import dataclasses
import json
from collections.abc import Sequence
from typing import Annotated

import tyro

from mmfree_jax.cli.parse import parse
from mmfree_jax.cli.train import base_config, with_vocabulary
from mmfree_jax.config import MeshConfig, TrainConfig
from mmfree_jax.errors import ConfigError
from mmfree_jax.files import check_file, write_text
from mmfree_jax.launch.ahead.compile import compile_step, describe
from mmfree_jax.launch.ahead.step_cost import fits, rank_meshes, why_not
from mmfree_jax.launch.ahead.topology import Topology, missing_compiler, parse_topology, prepare
from mmfree_jax.launch.xla_flags import with_overlap
from mmfree_jax.parallel.sharding import mesh_shape
from mmfree_jax.places import PlaceOrUrl
from mmfree_jax.progress import show_progress
from mmfree_jax.ranges import CountOrZero, PositiveShare

_DESCRIPTION = """Compile the training step for devices that are not here, and say what it costs.

Topologies: v5e-256, v6e-64, v5p-128 (TPU slices), 2xv5e-256 (two of them), h100x8, h200x8,
a100x8, h100x8x16 (16 hosts of 8), cpu:8 (simulated). Needs the devices' compiler: libtpu, or
JAX's CUDA plugin; without it CPU devices stand in and the report says so. It takes half a
minute for GPUs and minutes for TPUs."""


@dataclasses.dataclass(frozen=True)
class _Arguments:
    topology: str
    """The devices: see above."""
    preset: str | None
    """Named size to start from; `mmfree train --help` lists them."""
    config: PlaceOrUrl | None
    """YAML file over it, or its URL."""
    run: Annotated[TrainConfig, tyro.conf.arg(name="")]
    suggest: CountOrZero = 0
    """Rank all meshes on paper and compile this many of the best, instead of --mesh."""
    peak_share: PositiveShare = 0.4
    """Share of the data sheet's rate that the matrix products are taken to reach."""
    out: PlaceOrUrl | None = None
    """File that receives the reports as JSON."""


def compile_ahead(argv: Sequence[str]) -> int:
    """Compile for TPUs or GPUs that are not here: memory, collectives, step time, best mesh."""
    arguments = parse(
        _Arguments,
        argv,
        prog="mmfree compile",
        description=_DESCRIPTION,
        default=_Arguments("h100x8", None, None, base_config(argv)),
    )
    topology, config = parse_topology(arguments.topology), with_vocabulary(argv, arguments.run)
    if arguments.out is not None:
        check_file(arguments.out, r'\[\s*\{\s*"topology"')
    simulated = prepare(topology)
    if topology.platform == "gpu" and not simulated:
        _set_overlap()
    if simulated:
        print(f"for exact memory install the compiler for it: {missing_compiler(topology)}")
    if arguments.suggest:
        meshes = _suggest(config, arguments, topology)
    else:
        mesh_shape(config.mesh, topology.count)
        meshes = [config.mesh]
    reports = []
    for mesh in meshes:
        chosen = dataclasses.replace(config, mesh=mesh)
        with show_progress(f"compiling for {arguments.topology}"):
            report = compile_step(
                chosen, topology, simulated=simulated, peak_share=arguments.peak_share
            )
        print(describe(report), flush=True)
        reports.append(report)
    if arguments.out is not None:
        write_text(arguments.out, json.dumps(reports, indent=1) + "\n")
    if arguments.suggest:
        best = min(
            (r for r in reports if r["memory_gib"]["fits"] is not False),
            key=lambda r: (r["times_s"] or {"exposed": 0})["exposed"],
            default=None,
        )
        if best is None:
            raise ConfigError(
                "none of these meshes fits: set a smaller --batch-size or a larger --grad-accum"
            )
        flags = " ".join(f"--mesh.{name} {size}" for name, size in best["mesh"].items())
        print(f"suggested: {flags}")
    elif reports[0]["memory_gib"]["fits"] is False:
        raise ConfigError(
            "the step does not fit: set a smaller --batch-size or a larger --grad-accum, or let "
            "--suggest 3 look for another mesh"
        )
    return 0


def _suggest(config: TrainConfig, arguments: _Arguments, topology: Topology) -> list[MeshConfig]:
    ranked = rank_meshes(config, topology, arguments.peak_share)
    print(f"{len(ranked)} meshes divide; on paper (data x fsdp x sequence x tensor):")
    for mesh, gib, times in ranked[:8]:
        room = {True: "", False: ", does not fit", None: ""}[fits(gib, topology)]
        seconds = "" if times is None else f", {times.hidden:.3f} to {times.exposed:.3f} s a step"
        print(
            f"  {mesh.data} x {mesh.fsdp} x {mesh.sequence} x {mesh.tensor}: "
            f"{gib:.1f} GiB{room}{seconds}"
        )
    return [mesh for mesh, _, _ in ranked[: arguments.suggest] if why_not(config, mesh) is None]


def _set_overlap() -> None:
    """The switches that a run on several GPUs is meant to use."""
    import os

    os.environ.update(with_overlap(os.environ))
