"""`mmfree launch local`."""

import math
import os
import sys
from collections.abc import Sequence
from typing import Annotated

import tyro

from mmfree_jax.cli.parse import parse
from mmfree_jax.cli.train import resolve_config
from mmfree_jax.errors import ConfigError
from mmfree_jax.launch.elastic import Elastic, run_elastic
from mmfree_jax.launch.local import Plan, Processes, devices_each, mmfree_command, run
from mmfree_jax.ranges import AboveZero, Count, CountOrZero, Port


def local(argv: Sequence[str]) -> int:
    """Start several processes of a command on this machine, as one run."""
    argv = list(argv)
    own, command = argv, []
    if "--" in argv:
        at = argv.index("--")
        own, command = argv[:at], argv[at + 1 :]

    def plan(
        n: Annotated[Processes, tyro.conf.arg(aliases=["-n"])],
        devices_per_process: Count | None = None,
        port: Port | None = None,
        grace_seconds: AboveZero = 15.0,
        elastic: bool = False,
        min_processes: Count = Elastic.min_processes,
        restore_after: AboveZero | None = None,
        max_restarts: CountOrZero = Elastic.max_restarts,
    ) -> tuple[Plan, Elastic | None]:
        """Start N processes of `mmfree COMMAND` on this machine: -n 2 -- train --preset tiny ...

        Each line of output stands behind the number of its process. SIGINT and SIGTERM go to
        all, also where this command is killed. If a process dies the others are ended; the exit
        code is the first failure's. With --elastic a run goes on without processes that are lost,
        with the same rows in each step, and on all of them once SIGUSR2 or --restore-after says
        that they are back.

        Args:
          n: number of processes.
          devices_per_process: GPUs of each, or simulated CPU devices; default: all GPUs shared
            out evenly, or one CPU device each.
          port: port of the coordinator; default: a free one.
          grace_seconds: how long the others may stay after one has died.
          elastic: start again on the processes that are left when one is lost.
          min_processes: elastic: with fewer, end.
          restore_after: elastic: seconds after which a lost one is taken to be back.
          max_restarts: elastic: restarts after losses, in all.
        """
        if not command:
            raise ConfigError("no command to start: give it after --, as in -- train --help")
        found = Plan(mmfree_command(command), n, devices_per_process, port, grace_seconds)
        if not elastic:
            return found, None
        each = devices_each(found, os.environ)
        return found, Elastic(min_processes, _multiple(command, each), restore_after, max_restarts)

    found, elastic = parse(plan, own, prog="mmfree launch local")
    if elastic is None:
        return run(found)
    return run_elastic(found, elastic, environ=os.environ, out=sys.stdout)


def _multiple(command: Sequence[str], devices_each: int) -> int:
    """What the number of processes must be a multiple of for the mesh of a run.

    Raises:
      ConfigError: the command is no run, or a malformed one.
    """
    if command[0] != "train":
        raise ConfigError(f"--elastic is for runs: give -- train ..., not {command[0]!r}")
    mesh = resolve_config(command[1:]).mesh
    inner = mesh.fsdp * mesh.sequence * mesh.tensor
    return inner // math.gcd(inner, devices_each)
