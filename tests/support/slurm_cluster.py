"""A SLURM cluster of one node on this machine, with daemons, folders, ports and GPUs of its own."""

import contextlib
import os
import pwd
import shutil
import signal
import socket
import stat
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

GPUS = 4  # device nodes that stand for them, and read as /dev/null does
_FAILED = ("FAILED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")
_PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "sinfo", "scancel")

# A requeued job waits for cred_expire and a second more; 5 is the least that SLURM takes.
_CONFIG = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmdPort={node_port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/builtin
SchedulerParameters=batch_sched_delay=0,sched_interval=1
SlurmdParameters=config_overrides
GresTypes=gpu
ReturnToService=2
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
KillWait=20
NodeName={host} NodeAddr=127.0.0.1 CPUs=64 Gres=gpu:{gpus} State=UNKNOWN
PartitionName=test Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


class UnavailableError(Exception):
    """Why there is no cluster here."""


class Cluster:
    """The commands of a cluster that runs."""

    def __init__(self, environ: dict[str, str]) -> None:
        self.environ = environ

    def submit(self, script: Path, *options: str, **more: str) -> str:
        """Submits a script from its folder, with `more` in its environment; the job's number."""
        words = "sbatch", "--parsable", *options, script.name
        done = self.command(*words, cwd=script.parent, **more)
        return done.strip()

    def command(self, *words: str, cwd: Path | None = None, **more: str) -> str:
        """What a command prints, with `more` in its environment."""
        env = self.environ | more
        return subprocess.check_output(words, cwd=cwd, env=env, text=True, timeout=60)

    def job(self, number: str) -> dict[str, str]:
        """The fields of `scontrol show job`, of one task where it is an array."""
        shown = self.command("scontrol", "--oneliner", "show", "job", number)
        return dict(word.partition("=")[::2] for word in shown.split() if "=" in word)

    def wait(self, number: str, condition: Callable[[dict[str, str]], bool]) -> dict[str, str]:
        """Polls a job until the condition holds of its fields."""
        deadline = time.monotonic() + 120
        while not condition(job := self.job(number)):
            log = Path(job.get("StdOut", "/dev/null"))
            said = log.read_text(errors="replace")[-5000:] if log.exists() else ""
            assert time.monotonic() < deadline, f"{job}\n{said}"
            assert job["JobState"] not in _FAILED, f"{job}\n{said}"
            time.sleep(0.1)
        return job

    def ended(self, number: str) -> dict[str, str]:
        """Waits until a job has ended for good."""
        return self.wait(
            number, lambda job: job["JobState"] in ("COMPLETED", "CANCELLED", *_FAILED)
        )


@contextlib.contextmanager
def cluster(folder: Path) -> Iterator[Cluster]:
    """Starts the daemons in `folder` (a short path) and ends them, with all jobs.

    Raises:
      UnavailableError: they are not installed, or do not start here; says why.
    """
    environ = dict(os.environ)
    environ["PATH"] += ":/usr/sbin:/sbin"
    for program in _PROGRAMS:
        if shutil.which(program, path=environ["PATH"]) is None:
            raise UnavailableError(f"{program} is not installed: apt-get install slurm-wlm munge")
    try:
        for i in range(GPUS):
            os.mknod(folder / f"gpu{i}", 0o666 | stat.S_IFCHR, os.makedev(1, 3))
    except OSError as e:
        raise UnavailableError(f"device nodes cannot be made here: {e}") from e
    environ["SLURM_CONF"] = str(folder / "slurm.conf")
    _write_files(folder)
    daemons = {
        "munged": ["--foreground", "--force", f"--key-file={folder}/munge.key",
                   f"--socket={folder}/munge.socket", f"--pid-file={folder}/munged.pid",
                   f"--seed-file={folder}/munge.seed", f"--log-file={folder}/munged.log"],
        "slurmctld": ["-D", "-c"],
        "slurmd": ["-D"],
    }  # fmt: skip
    running = Cluster(environ)
    with contextlib.ExitStack() as stack:
        for name, options in daemons.items():
            log = stack.enter_context(open(folder / f"{name}.out", "wb"))
            process = subprocess.Popen(
                [name, *options], env=environ, stdout=log, stderr=log, start_new_session=True
            )
            stack.callback(_end, process)
            if name == "munged":
                _until((folder / "munge.socket").exists, process, folder)
        _until(lambda: _is_idle(running), process, folder)
        stack.callback(_cancel_all, running)
        yield running


def _user() -> str:
    return pwd.getpwuid(os.getuid()).pw_name


def _write_files(folder: Path) -> None:
    for name in ("state", "spool"):
        (folder / name).mkdir()
    key = folder / "munge.key"
    key.touch(mode=0o600)
    key.write_bytes(os.urandom(1024))
    host = socket.gethostname().partition(".")[0]
    (folder / "gres.conf").write_text(f"Name=gpu File={folder}/gpu[0-{GPUS - 1}]\n")
    with socket.socket() as a, socket.socket() as b:
        a.bind(("127.0.0.1", 0))
        b.bind(("127.0.0.1", 0))
        ports = a.getsockname()[1], b.getsockname()[1]
    (folder / "slurm.conf").write_text(
        _CONFIG.format(
            folder=folder, host=host, controller_port=ports[0], node_port=ports[1], gpus=GPUS,
            user=_user(),
        )
    )  # fmt: skip


def _is_idle(running: Cluster) -> bool:
    try:
        return running.command("sinfo", "--noheader", "--format=%T").strip() == "idle"
    except subprocess.SubprocessError:
        return False


def _until(condition: Callable[[], bool], process: subprocess.Popen[bytes], folder: Path) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        if process.poll() is not None or time.monotonic() > deadline:
            said = [p.read_text(errors="replace")[-500:] for p in sorted(folder.glob("*.out"))]
            raise UnavailableError(f"the daemons do not start here: {' | '.join(said)}")
        time.sleep(0.1)


def _cancel_all(running: Cluster) -> None:
    user = f"--user={_user()}"
    running.command("scancel", "--quiet", user, "--full", "--signal=KILL")
    running.command("scancel", "--quiet", user)
    deadline = time.monotonic() + 30
    while not _is_idle(running) and time.monotonic() < deadline:
        time.sleep(0.1)


def _end(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(timeout=20)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
