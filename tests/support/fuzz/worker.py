"""Runs commands one after another in this interpreter: a line of JSON in, a line out.

Started by `trial.py`. What a command writes goes to files, by descriptor, so that what libraries in
C++ write is caught too.
"""

import json
import os
import resource
import signal
import sys
from pathlib import Path

MEMORY = 3 << 30
"""Bytes of address space that a command may take beyond what JAX has when it starts."""


def limit_memory() -> None:
    """Makes what takes absurd amounts of memory fail, not swap."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))


def _run(argv: list[str], folder: str, out: str, err: str) -> int:
    from mmfree_jax.cli.main import main

    saved = [os.dup(1), os.dup(2)]
    environment = dict(os.environ)
    for descriptor, path in ((1, out), (2, err)):
        to = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(to, descriptor)
        os.close(to)
    os.chdir(folder)
    try:
        return main(argv)
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        for descriptor, copy in zip((1, 2), saved, strict=True):
            os.dup2(copy, descriptor)
            os.close(copy)
        os.environ.clear()
        os.environ.update(environment)
        os.chdir("/")


def serve() -> None:
    """Runs what comes on standard input until it ends."""
    requests, answers = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    handlers = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    import jax

    jax.devices()
    limit_memory()
    for line in requests:
        request = json.loads(line)
        code = _run(request["argv"], request["folder"], request["out"], request["err"])
        for number, handler in handlers.items():
            signal.signal(number, handler)
        answers.write(json.dumps({"code": code}) + "\n")
        answers.flush()


if __name__ == "__main__":
    serve()
