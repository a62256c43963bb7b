"""The local launcher on small programs: output, exit codes, signals, environments."""

import io
import signal
import sys
import threading
import time

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


def test_signals_go_to_all_and_their_exit_code_comes_back():
    # In a process of its own, since signals are the main thread's.
    import subprocess

    child = (
        "import signal, sys, time\n"
        "def leave(n, _): print('got', n, flush=True); sys.exit(128 + n)\n"
        "signal.signal(signal.SIGTERM, leave); print('ready', flush=True); time.sleep(600)"
    )
    parent = (
        "import sys; from mmfree_jax.launch.local import Plan, run\n"
        f"sys.exit(run(Plan((sys.executable, '-c', {child!r}), 2)))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", parent], stdout=subprocess.PIPE, text=True,
        env={**CPU, "PYTHONPATH": ":".join(sys.path)},
    )  # fmt: skip
    lines = []
    for line in process.stdout:
        lines.append(line.strip())
        if lines.count("[0] ready") + lines.count("[1] ready") == 2:
            break
    process.send_signal(signal.SIGTERM)
    lines += process.communicate(timeout=60)[0].splitlines()
    assert process.returncode == 128 + signal.SIGTERM
    assert {"[0] got 15", "[1] got 15"} <= set(lines)


def test_nothing_is_left_behind():
    seen = []
    thread = threading.Timer(0.3, lambda: [p.kill() for p in seen])
    thread.start()
    _run("import time; time.sleep(600)", 2, meddle=seen.extend, grace_seconds=5)
    assert all(process.poll() is not None for process in seen)
    time.sleep(0)


def test_gpus_are_shared_out():
    gpus = {"CUDA_VISIBLE_DEVICES": "4,5,6,7"}
    plan = Plan(("x",), 2)
    assert environment(plan, 1, 1234, gpus)["CUDA_VISIBLE_DEVICES"] == "6,7"
    one_each = Plan(("x",), 2, devices_per_process=1)
    assert environment(one_each, 1, 1234, gpus)["CUDA_VISIBLE_DEVICES"] == "5"
    with pytest.raises(ConfigError, match="more than the 4 here"):
        environment(Plan(("x",), 5), 0, 1234, gpus)


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
