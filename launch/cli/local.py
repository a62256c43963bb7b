"""`mmfree launch local`."""

from collections.abc import Sequence
from typing import Annotated

import tyro

from mmfree_jax.cli.parse import parse
from mmfree_jax.errors import ConfigError
from mmfree_jax.launch.local import Plan, Processes, mmfree_command, run
from mmfree_jax.ranges import AboveZero, Count, Port


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
    ) -> Plan:
        """Start N processes of `mmfree COMMAND` on this machine: -n 2 -- train --preset tiny ...

        Each line of output stands behind the number of its process. SIGINT and SIGTERM go to
        all, also where this command is killed. If a process dies the others are ended; the exit
        code is the first failure's.

        Args:
          n: number of processes.
          devices_per_process: GPUs of each, or simulated CPU devices; default: all GPUs shared
            out evenly, or one CPU device each.
          port: port of the coordinator; default: a free one.
          grace_seconds: how long the others may stay after one has died.
        """
        if not command:
            raise ConfigError("no command to start: give it after --, as in -- train --help")
        return Plan(mmfree_command(command), n, devices_per_process, port, grace_seconds)

    return run(parse(plan, own, prog="mmfree launch local"))
