"""Which ends the launcher starts again, and on how many places: small programs, no JAX."""

import io
import sys

import pytest

from mmfree_jax.errors import ConfigError
from mmfree_jax.launch.elastic import Elastic, run_elastic
from mmfree_jax.launch.local import Plan

CPU = {"JAX_PLATFORMS": "cpu", "PATH": "/usr/bin:/bin"}

# `end` says how each process of an attempt ends, by attempt and place. Those that stay wait to be
# told to stop, and leave as a run does that has saved.
_PROGRAM = """
import os, signal, sys
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
count, index = os.environ["JAX_NUM_PROCESSES"], int(os.environ["JAX_PROCESS_ID"])
planned = os.environ["MMFREE_PLANNED_PROCESSES"]
print("I am", index, "of", count, "planned", planned, flush=True)
os.makedirs(os.path.join(sys.argv[1], os.environ["JAX_COORDINATOR_ADDRESS"]), exist_ok=True)
ends = eval(sys.argv[2])[len(os.listdir(sys.argv[1])) - 1]  # every attempt meets elsewhere
end = ends[index] if isinstance(ends, list) else ends
if end == "waits":  # for the others to be back
    end = "stays" if count != planned else 0
if end == "stays":
    signal.sigwait([signal.SIGTERM])
    os._exit(143)
if end < 0:
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
    os.kill(os.getpid(), -end)
os._exit(end)
"""


def _run(tmp_path, count, ends, **options):
    """The exit code, and the launcher's lines; `ends` by attempt, for all or each process."""
    out = io.StringIO()
    command = (sys.executable, "-c", _PROGRAM, str(tmp_path), repr(ends))
    plan = Plan(command, count, grace_seconds=0.1, stop_seconds=60)
    elastic = Elastic(back_off=0.01, **options)
    code = run_elastic(plan, elastic, environ=CPU, out=out)
    return code, out.getvalue()


def _started(text):
    return [line.split()[2] for line in text.splitlines() if "[launch] started" in line]


def test_those_that_are_left_go_on_and_know_what_was_planned(tmp_path):
    code, text = _run(tmp_path, 4, [["stays", -9, "stays", "stays"], 0])
    assert code == 0
    assert _started(text) == ["4", "3"]
    assert "starting again on 3 of 4 places in 0.01 s (restart 1 of at most 20)" in text
    assert sum("of 3 planned 4" in line for line in text.splitlines()) == 3


@pytest.mark.parametrize("code", [2, 1, 130, 129])
def test_what_no_restart_can_mend_ends_at_once(tmp_path, code):
    assert _run(tmp_path, 2, [code])[0] == code


@pytest.mark.parametrize(
    ("ends", "left"),
    [
        ([-6, "stays"], "1"),  # crashed
        ([143, 143], "1"),  # somebody told one, and both have saved
        ([-15, "stays"], "1"),  # told before it could save
        ([75, 75], "2"),  # none is missing: a network that hung
        ([75, "stays"], "1"),  # the other stands still
    ],
)
def test_who_is_lost(tmp_path, ends, left):
    code, text = _run(tmp_path, 2, [ends, 0, 0])
    assert code == 0
    assert _started(text) == ["2", left]


def test_too_few_places_end_it(tmp_path):
    code, text = _run(tmp_path, 3, [[-9, "stays", "stays"], [-9, "stays"]], min_processes=2)
    assert code == 137
    assert _started(text) == ["3", "2"]
    assert "1 of 3 places are left, of which 1 make a mesh, fewer than --min-processes 2" in text


def test_a_mesh_that_needs_pairs_gets_pairs(tmp_path):
    code, text = _run(tmp_path, 4, [["stays", -9, "stays", "stays"], 0], multiple_of=2)
    assert (code, _started(text)) == (0, ["4", "2"])


def test_restarts_are_bounded_and_come_slower(tmp_path):
    code, text = _run(tmp_path, 2, [75] * 9, max_restarts=3)
    assert code == 75
    assert _started(text) == ["2"] * 4
    pauses = [
        line.split(" in ")[1].split(" s ")[0] for line in text.splitlines() if "again on" in line
    ]
    assert pauses == ["0.01", "0.02", "0.04"]
    assert "restarted 3 times, --max-restarts: not started again" in text


def test_places_that_are_back_are_used_again(tmp_path):
    ends = [[-9, "stays"], "waits", "waits"]
    code, text = _run(tmp_path, 2, ends, restore_after=0.05)
    assert code == 0
    assert _started(text) == ["2", "1", "2"]
    assert "1 lost places back: all to save and leave, and start again" in text


def test_more_are_needed_than_there_are(tmp_path):
    with pytest.raises(ConfigError, match="min_processes is 3: set --min-processes to 2"):
        _run(tmp_path, 2, [0], min_processes=3)
