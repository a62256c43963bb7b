"""Runs cases, each in a fresh copy of the workplace, and says what is wrong with how they ended."""

import json
import os
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path

import quick_compilation

from fuzz.case import Case, Outcome, faults
from fuzz.workplace import add_special

ROOT = Path(__file__).resolve().parents[3]
SECONDS = 60.0
"""How long a command may take; the longest takes ten where nothing else runs."""
START_SECONDS = 120.0
"""How long JAX may take to start on a machine that is busy."""
# A command with an interpreter of its own, in 8 GiB of address space.
_LIMITED = """\
import resource, runpy
resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))
runpy.run_module("mmfree_jax", run_name="__main__", alter_sys=True)
"""


class Trials:
    """Runs cases in copies of one workplace; a context, which ends the interpreter it started.

    Args:
      pristine: the workplace; it is copied and never changed.
      scratch: a folder of its own.
    """

    def __init__(self, pristine: Path, scratch: Path) -> None:
        self._pristine, self._scratch = pristine, scratch
        self._worker: subprocess.Popen[str] | None = None
        self._state: dict[str, tuple[int, int, int]] = {}
        self._environment = _environment()
        self.folder = scratch / "work"
        scratch.mkdir(parents=True, exist_ok=True)

    def __enter__(self) -> "Trials":
        return self

    def __exit__(self, *_: object) -> None:
        self._end_worker()

    def run(self, case: Case) -> tuple[Outcome, list[str]]:
        """Runs a case; how it ended, and what is wrong with that."""
        self._refresh()
        case.prepare(self.folder)
        before = _snapshot(self.folder)
        run = self._run_alone if case.own_process else self._run_in_worker
        outcome = run(list(case.argv))
        now = _snapshot(self.folder)
        after = {path: now[path] == before.get(path) for path in now}
        found = faults(case, outcome, set(before), after)
        if not found and (own := case.judge(outcome, self.folder)):
            found = [own]
        return outcome, found

    def keep(self, case: Case, to: Path) -> None:
        """Makes the files of a case again, in a folder that stays."""
        self._refresh()
        case.prepare(self.folder)
        shutil.rmtree(to, ignore_errors=True)
        self.folder.rename(to)

    def _refresh(self) -> None:
        if self._state and _snapshot(self.folder) == self._state:
            return
        shutil.rmtree(self.folder, ignore_errors=True)
        shutil.copytree(self._pristine, self.folder, symlinks=True)
        add_special(self.folder)
        self._state = _snapshot(self.folder)

    def _outputs(self) -> tuple[Path, Path]:
        return self._scratch / "out.txt", self._scratch / "err.txt"

    def _run_in_worker(self, argv: list[str]) -> Outcome:
        out, err = self._outputs()
        worker = self._start_worker()
        assert worker.stdin is not None
        assert worker.stdout is not None
        request = {"argv": argv, "folder": str(self.folder), "out": str(out), "err": str(err)}
        start = time.monotonic()
        worker.stdin.write(json.dumps(request) + "\n")
        worker.stdin.flush()
        code: int | None = None
        if select.select([worker.stdout], [], [], _patience())[0]:
            answer = worker.stdout.readline()
            code = json.loads(answer)["code"] if answer else worker.wait()
        seconds = time.monotonic() - start
        if code is None or worker.poll() is not None:
            self._end_worker()
        return Outcome(code, _read(out), _read(err), seconds)

    def _start_worker(self) -> "subprocess.Popen[str]":
        if self._worker is None:
            self._worker = subprocess.Popen(
                [sys.executable, "-m", "fuzz.worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                env=self._environment,
                cwd=self._scratch,
            )
            self._await_start(self._worker)
        return self._worker

    def _await_start(self, worker: "subprocess.Popen[str]") -> None:
        """Sends a command that does nothing, so that the first one's time is its own."""
        out, err = self._outputs()
        request = {"argv": ["--version"], "folder": "/", "out": str(out), "err": str(err)}
        assert worker.stdin is not None
        assert worker.stdout is not None
        worker.stdin.write(json.dumps(request) + "\n")
        worker.stdin.flush()
        ready = select.select([worker.stdout], [], [], START_SECONDS)[0]
        if not ready or not worker.stdout.readline():
            raise RuntimeError(f"the interpreter for the commands did not start: see {err}")

    def _end_worker(self) -> None:
        if self._worker is not None:
            self._worker.kill()
            self._worker.wait()
            self._worker = None

    def _run_alone(self, argv: list[str]) -> Outcome:
        out, err = self._outputs()
        start = time.monotonic()
        code: int | None
        with open(out, "wb") as stdout, open(err, "wb") as stderr:
            process = subprocess.Popen(
                [sys.executable, "-c", _LIMITED, *argv],
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=stderr,
                cwd=self.folder,
                env=self._environment,
            )
            try:
                code = process.wait(_patience())
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                code = None
        return Outcome(code, _read(out), _read(err), time.monotonic() - start)


def _patience() -> float:
    """Seconds to wait for a command: longer where others keep the cores busy."""
    return SECONDS * max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))


def _environment() -> dict[str, str]:
    """No network, one device, quick compilation, and the checkout's packages."""
    paths = [str(ROOT / "tests" / "support"), str(ROOT), os.environ.get("PYTHONPATH", "")]
    nowhere = dict.fromkeys(("http_proxy", "https_proxy"), "http://127.0.0.1:9")
    return os.environ | nowhere | {
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": quick_compilation.FLAGS,
        "HF_HUB_OFFLINE": "1",
        "WANDB_MODE": "offline",
        "MMFREE_DEBUG": "0",
    }  # fmt: skip


def _read(path: Path) -> str:
    return path.read_bytes().decode(errors="backslashreplace") if path.exists() else ""


def _snapshot(folder: Path) -> dict[str, tuple[int, int, int]]:
    """Kind, size and time of change of every file, by its path in the folder."""
    found = {}
    for where, _, files in os.walk(folder):
        for name in files:
            path = os.path.join(where, name)
            status = os.lstat(path)
            found[os.path.relpath(path, folder)] = (
                status.st_mode,
                status.st_size,
                status.st_mtime_ns,
            )
    return found
