"""One run as a process of its own: how it is started, and what its end means."""

import contextlib
import os
import platform
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import mmfree_jax
from mmfree_jax.children import Children
from mmfree_jax.compiled_programs import is_chosen
from mmfree_jax.files import disk_errors
from mmfree_jax.installed import own_version
from mmfree_jax.json_shape import fault
from mmfree_jax.signals import EXIT_CODES, STOPPING
from mmfree_jax.text_files import read_json

# Where mmfree_jax lies: the checkout, or site-packages.
_ROOT = Path(mmfree_jax.__file__).resolve().parents[1]
_MEMORY_SHARE = 0.9  # of a device, between the runs on it; the rest is the driver's

_HEADER = b"=== started "

End = Literal["complete", "stopped", "failed", "elsewhere"]


def trainer_command(config: Path) -> list[str]:
    """The ordinary trainer, on one config file."""
    return [sys.executable, "-m", "mmfree_jax", "train", "--config", str(config)]


def child_environment(
    cache: Path | None = None, *, parallel: int = 1, gpu: str | None = None
) -> dict[str, str]:
    """Environment of a child process: this one's, and

    * the packages that this process runs, on the module path;
    * `cache`, where compiled programs are kept for all runs, unless the user names a folder;
    * a `parallel`-th of the device's memory, where several runs share it;
    * `gpu`, the only GPU that it sees, where one is given.
    """
    env = dict(os.environ)
    paths = [str(_ROOT), *filter(None, env.get("PYTHONPATH", "").split(os.pathsep))]
    env["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(paths))
    if cache is not None and not is_chosen(env):
        env["JAX_COMPILATION_CACHE_DIR"] = str(cache.resolve())
    if parallel > 1:
        env["XLA_PYTHON_CLIENT_MEM_FRACTION"] = f"{_MEMORY_SHARE / parallel:.3f}"
    if gpu is not None:
        env["CUDA_VISIBLE_DEVICES"] = gpu
    return env


def start(
    children: Children, command: Sequence[str], log: Path, env: dict[str, str], lock: int
) -> subprocess.Popen:
    """Starts a run. It keeps the lock for as long as it lives: saving, after a sweep's death.

    Raises:
      OutputError: the log cannot be written.
    """
    with contextlib.ExitStack() as opened:
        with disk_errors(log):
            stream = opened.enter_context(open(log, "ab", buffering=0))
            began = datetime.now(UTC).isoformat(timespec="seconds")
            stream.write(_HEADER + began.encode() + b"\n")
        return children.start(
            command, stdout=stream, stderr=subprocess.STDOUT, env=env, pass_fds=(lock,)
        )


@dataclass(frozen=True)
class Outcome:
    """How a run's process ended."""

    end: End
    kind: str = ""
    """Of a failure: "diverged", "memory" or "error"."""
    reason: str = ""
    """In one line."""


def outcome(code: int, log: Path, summary: dict[str, Any] | None) -> Outcome:
    """What an exit code, the end of the log and summary.json say together."""
    if code == 0:
        if summary is None:
            return Outcome("failed", "error", "the trainer ended well but left no summary.json "
                           "that can be read")  # fmt: skip
        if summary.get("status") == "complete":
            return Outcome("complete")
        return Outcome("stopped", reason=f"stopped by {summary.get('stopped_by')}")
    if code in EXIT_CODES.values() or -code in STOPPING:
        return Outcome("stopped", reason="told to stop")
    if code < 0:
        name = signal.Signals(-code).name
        if -code == signal.SIGKILL:
            return Outcome("failed", "memory", "killed by SIGKILL: most often the host was out of "
                           "memory")  # fmt: skip
        return Outcome("failed", "error", f"crashed by {name}: {_last_line(log)}")
    reason = _last_line(log)
    if re.search(r"(is in use|was taken over) by another job", reason):
        return Outcome("elsewhere", reason=reason)
    if re.search(r"not finite", reason):
        return Outcome("failed", "diverged", reason)
    if re.search(r"device memory is too small|RESOURCE_EXHAUSTED|out of memory", reason, re.I):
        return Outcome("failed", "memory", reason)
    return Outcome("failed", "error", f"exit code {code}: {reason}")


def is_training(run_dir: Path, log: Path) -> bool:
    """Whether a run has recorded steps, or shown them, which in a bucket is seen first."""
    with contextlib.suppress(OSError):
        if b'"kind": "train"' in (run_dir / "metrics.jsonl").read_bytes():
            return True
    return re.search(r"^step +\d+/\d+  loss ", _last_start(log) or "", re.MULTILINE) is not None


def _last_start(log: Path) -> str | None:
    """What a run has printed since it was last started; None: there is no log."""
    try:
        return log.read_bytes().rpartition(_HEADER)[2].partition(b"\n")[2].decode(errors="replace")
    except OSError:
        return None


def _last_line(log: Path) -> str:
    """The error line of a log: the command line's own, else a Python error, else the last."""
    text = _last_start(log)
    if text is None:
        return "no log"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    for line in reversed(lines):
        if found := re.match(r"mmfree: (?:error: )?(.+)", line):
            return found[1]
    for line in reversed(lines):
        if re.match(r"[\w.]*(Error|Exception|Interrupt)\b", line):
            return line[:500]
    return lines[-1][:500] if lines else "the log is empty"


_NUMBER = (int, float)
_SUMMARY = {
    "status": str,
    "step": int,
    "tokens": int,
    "training_flops": _NUMBER,
    "parameters": {"total": int, "non_embedding": int, "ternary": int},
    "device": {"kind": str, "count": int},
    "versions": {},
}
_OF_A_RUN = {
    "origin": {"tokens": int},
    "data": {"fingerprints": [str]},
    **dict.fromkeys(
        ("eval_loss", "eval_bits_per_byte", "train_loss", "tokens_per_s", "mfu", "seconds"), _NUMBER
    ),
}
"""What a summary may lack, or have null."""


def read_summary(run_dir: Path) -> dict[str, Any] | None:
    """A run's summary.json; None where it is absent, unreadable or damaged."""
    try:
        value = read_json(run_dir / "summary.json")
    except (OSError, ValueError):
        return None
    given = {} if fault(value, {}) else {k: v for k, v in value.items() if v is not None}
    wanted = _SUMMARY | {name: kind for name, kind in _OF_A_RUN.items() if name in given}
    return None if fault(given, wanted) else value


def code_version() -> str:
    """The git commit of the packages that run, with "+" if files differ; else their version.

    `MMFREE_CODE_VERSION` takes its place: for images and archives without a repository.
    """
    if given := os.environ.get("MMFREE_CODE_VERSION"):
        return given

    def git(*args: str) -> str | None:
        try:
            result = subprocess.run(["git", "-C", str(_ROOT), *args], capture_output=True,
                                    text=True, timeout=20, check=False)  # fmt: skip
        except (OSError, subprocess.TimeoutExpired):
            return None
        return result.stdout.strip() if result.returncode == 0 else None

    top = git("rev-parse", "--show-toplevel")
    if top and Path(top).resolve() == _ROOT and (commit := git("rev-parse", "HEAD")):
        changed = git("status", "--porcelain", "--", "mmfree_jax", "pallas_kernels", "experiments")
        return commit[:12] + ("+" if changed else "")
    return own_version()


def host_name() -> str:
    """Name of this host."""
    return platform.node()
