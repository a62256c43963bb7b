"""`mmfree launch render`."""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro

from mmfree_jax.cli.parse import parse
from mmfree_jax.cli.train import last_value, resolve_config
from mmfree_jax.config_io import from_dict, read_yaml
from mmfree_jax.errors import ConfigError
from mmfree_jax.experiments.cli.sweep import planned_sweep
from mmfree_jax.files import check_file, write_text
from mmfree_jax.launch.jobs.slurm_array import SlurmArray, render_array
from mmfree_jax.launch.render import PLATFORMS, check_run_dir, render
from mmfree_jax.places import PlaceOrUrl, check_local
from mmfree_jax.storage import is_url


def render_job(argv: Sequence[str]) -> int:
    """Write a job file for SLURM, a TPU pod, GKE or SkyPilot: launch render slurm ... -- ARGUMENTS.

    They are those of mmfree train; `sweep run` and its arguments make a SLURM job array.
    """
    argv, train = list(argv), []
    if "--" in argv:
        at = argv.index("--")
        argv, train = argv[:at], argv[at + 1 :]
    platform = argv[0] if argv else ""
    if platform in ("-h", "--help"):
        print(f"usage: mmfree launch render {{{','.join(PLATFORMS)}}} [OPTIONS] -- TRAIN ARGUMENTS")
        print("mmfree launch render slurm --help lists the values of SLURM, and so on.")
        return 0
    if platform not in PLATFORMS:
        raise ConfigError(f"platform is {platform!r}: choose {', '.join(PLATFORMS)}")
    is_sweep = train[:2] == ["sweep", "run"]
    if is_sweep and platform != "slurm":
        raise ConfigError(f"platform is {platform!r}: a sweep is rendered for slurm alone")
    kind = SlurmArray if is_sweep else PLATFORMS[platform]
    path = last_value(argv, "--values")
    if path is not None:
        check_local(path, "--values")
    given = kind() if path is None else from_dict(kind, read_yaml(path) or {})
    arguments: Any = parse(
        _arguments(kind),
        argv[1:],
        prog=f"mmfree launch render {platform}",
        description=(
            f"{kind.__doc__}\n\nValues come from --values, a YAML file, and over it from the "
            "flags. The arguments of mmfree train follow behind --, or for a job array `sweep run` "
            "and its arguments. The file is checked, and written to --out or printed."
        ),
        default=_arguments(kind)(None, None, given),
    )
    # Refused after an hour in the queue would be a bad joke.
    if is_sweep:
        text = render_array(arguments.job, train, planned_sweep(train[2:]))
    else:
        config = resolve_config(train)
        text = render(arguments.job, train)
        check_run_dir(arguments.job, config.run_dir)
    if arguments.out is None:
        sys.stdout.write(text)
        return 0
    rendered = r"(#!/bin/bash\n)?# Rendered by `mmfree launch render "
    check_file(arguments.out, rendered, sources=[path] if path else [])
    write_text(arguments.out, text)
    if platform not in ("gke", "sky") and not is_url(arguments.out):
        Path(arguments.out).chmod(0o755)
    print(f"wrote {arguments.out}")
    return 0


def _arguments(kind: type) -> type:
    """The command's arguments: where from, where to, and the platform's values."""
    return dataclasses.make_dataclass(
        "Arguments",
        [
            ("values", Path | None),
            ("out", PlaceOrUrl | None),
            ("job", Annotated[kind, tyro.conf.arg(name="")]),
        ],
    )
