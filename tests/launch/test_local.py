"""The local launcher on small programs: output, exit codes, signals, environments."""

import io
import os
import select
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from mmfree_jax.errors import ConfigError
from mmfree_jax.launch.local import Plan, environment, run

CPU = {"JAX_PLATFORMS": "cpu", "PATH": "/usr/bin:/bin"}


def _run(program, count, meddle=None, **options):
    out = io.StringIO()
    plan = Plan((sys.executable, "-c", program), count, **options)
    code = run(plan, environ=CPU, out=out, on_start=meddle)
    return code, out.getvalue()


def test_output_stands_behind_its_process_and_success_is_zero():
    code, text = _run("import os; print('I am', os.environ['JAX_PROCESS_ID'], 'of', "
                      "os.environ['JAX_NUM_PROCESSES'])", 3)  # fmt: skip
    assert code == 0
    assert sorted(text.splitlines()) == [f"[{i}] I am {i} of 3" for i in range(3)]


def test_the_first_failure_is_named_and_its_code_returned():
    program = "import os, sys, time\nif os.environ['JAX_PROCESS_ID'] == '1': sys.exit(7)\n"
    code, text = _run(program + "time.sleep(600)", 3, grace_seconds=0.1)
    assert code == 7
    assert "[launch] process 1 (pid " in text
    assert ") ended with 7; 2 more to end within 0 s" in text
    assert "[launch] killing process 0, 2, still there" in text


def test_a_killed_process_is_named_with_its_signal():
    code, text = _run(
        "import time; time.sleep(600)",
        2,
        meddle=lambda processes: processes[0].send_signal(signal.SIGSEGV),
        grace_seconds=0.1,
    )
    assert code == 128 + signal.SIGSEGV
    assert "was killed by SIGSEGV; 1 more to end" in text


# Says in a FIFO that it is ready, that it was told to stop, and by closing it that it has ended
# with what it has started itself. It waits for its signals: a handler would miss one that comes
# just before a sleep begins.
_CHILD = """
import os, signal, sys, time
out = os.open(sys.argv[1], os.O_WRONLY)
if os.fork() == 0:
    time.sleep(600)
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM, signal.SIGINT])
os.write(out, b"ready\\n")
number = signal.sigwait([signal.SIGINT] if "deaf" in sys.argv else [signal.SIGTERM, signal.SIGINT])
os.write(out, b"told\\n")
os._exit(128 + number)
"""
_LAUNCHER = """
import os, sys
from mmfree_jax.launch.local import Plan, run
os._exit(run(Plan((sys.executable, "-c", *sys.argv[2:]), 2, stop_seconds=float(sys.argv[1]))))
"""


def _read(said, until=None):
    """What the children say, to their end, or until they have said so much."""
    text = ""
    while text != until:
        assert select.select([said], [], [], 60)[0], f"still there, after {text!r}"
        if not (piece := os.read(said, 100).decode()):
            break
        text += piece
    return text


@pytest.fixture
def launched(tmp_path):
    """launched(stop_seconds, *arguments): a launcher with two ready children, and their FIFO."""
    processes, fifo = [], tmp_path / "fifo"
    os.mkfifo(fifo)

    def start(stop_seconds, *arguments):
        command = [sys.executable, "-c", _LAUNCHER, str(stop_seconds), _CHILD, str(fifo)]
        processes.append(
            subprocess.Popen([*command, *arguments], stdout=subprocess.PIPE, text=True,
                             env={**CPU, "PYTHONPATH": ":".join(sys.path)})
        )  # fmt: skip
        said = os.open(fifo, os.O_RDONLY)
        assert _read(said, until="ready\n" * 2) == "ready\n" * 2
        return processes[0], said

    yield start
    processes[0].kill()
    processes[0].wait()


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP", "SIGKILL", "SIGQUIT"])
def test_whatever_ends_the_launcher_tells_all_processes_to_stop(launched, name):
    launcher, said = launched(60)
    launcher.send_signal(signal.Signals[name])
    assert _read(said) == "told\n" * 2  # to its end: nothing of them is left
    code = {"SIGTERM": 143, "SIGINT": 130, "SIGHUP": 143, "SIGKILL": -9, "SIGQUIT": -3}[name]
    assert launcher.wait(timeout=60) == code


@pytest.mark.parametrize("name", ["SIGTERM", "SIGKILL"])
def test_those_that_do_not_stop_are_killed(launched, name):
    launcher, said = launched(0.2, "deaf")
    launcher.send_signal(signal.Signals[name])
    assert _read(said) == ""
    assert launcher.wait(timeout=60) == {"SIGTERM": 137, "SIGKILL": -9}[name]


def test_a_stopped_process_ends_with_a_launcher_that_is_killed(launched):
    launcher, said = launched(60)
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children")
    if not children.exists():
        pytest.skip("this system does not list a process's children")
    for child in children.read_text().split()[1:]:  # the first is the guard
        os.kill(int(child), signal.SIGSTOP)
    launcher.kill()
    launcher.wait()
    assert _read(said) == "told\n" * 2


def test_a_hangup_is_ignored_under_nohup(launched):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # inherited
    try:
        launcher, said = launched(60)
    finally:
        signal.signal(signal.SIGHUP, before)
    launcher.send_signal(signal.SIGHUP)
    launcher.send_signal(signal.SIGINT)
    assert launcher.wait(timeout=60) == 130
    assert _read(said) == "told\n" * 2


def test_a_reader_that_leaves_ends_nothing(launched):
    launcher, said = launched(60)
    launcher.stdout.close()
    launcher.send_signal(signal.SIGTERM)  # what it says of it is read by nobody
    assert _read(said) == "told\n" * 2
    assert launcher.wait(timeout=60) == 143


def test_a_flood_of_output_does_not_hold_up_the_end_of_the_others():
    program = "import os\nwhile os.environ['JAX_PROCESS_ID'] == '0': print('x' * 50)\nos._exit(7)"
    code, text = _run(program, 2, grace_seconds=0.2)
    assert code == 7
    assert "[launch] killing process 0, still there" in text


def test_nothing_is_left_behind():
    seen = []

    def kill_both(processes):
        seen.extend(processes)
        for process in processes:
            process.kill()

    _run("import time; time.sleep(600)", 2, meddle=kill_both, grace_seconds=60)
    assert all(process.returncode is not None for process in seen)
    assert len(seen) == 2


def test_gpus_are_shared_out():
    gpus = {"CUDA_VISIBLE_DEVICES": "4,5,6,7"}
    plan = Plan(("x",), 2)
    assert environment(plan, 1, 1234, gpus)["CUDA_VISIBLE_DEVICES"] == "6,7"
    one_each = Plan(("x",), 2, devices_per_process=1)
    assert environment(one_each, 1, 1234, gpus)["CUDA_VISIBLE_DEVICES"] == "5"
    with pytest.raises(ConfigError, match="more than the 4 here"):
        environment(Plan(("x",), 5), 0, 1234, gpus)


@pytest.mark.parametrize("hidden", ["", "-1", "NoDevFiles", "-1,0"])
def test_hidden_gpus_are_not_shared_out(hidden):
    env = environment(Plan(("x",), 2), 1, 1234, {"CUDA_VISIBLE_DEVICES": hidden})
    assert env["XLA_FLAGS"] == "--xla_force_host_platform_device_count=1"
    assert env["CUDA_VISIBLE_DEVICES"] == hidden


def test_simulated_devices_replace_the_flag_and_keep_the_others():
    env = CPU | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8 --xla_other=1"}
    flags = environment(Plan(("x",), 2, devices_per_process=4), 0, 1, env)["XLA_FLAGS"]
    assert flags == "--xla_other=1 --xla_force_host_platform_device_count=4"
    assert environment(Plan(("x",), 2), 1, 77, CPU)["JAX_COORDINATOR_ADDRESS"] == "127.0.0.1:77"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"count": 0}, "count is 0"),
        ({"devices_per_process": 0}, "devices_per_process is 0"),
        ({"command": ()}, "after --"),
    ],
)
def test_refusals(changes, message):
    with pytest.raises(ConfigError, match=message):
        Plan(**{"command": ("x",), "count": 2} | changes)
