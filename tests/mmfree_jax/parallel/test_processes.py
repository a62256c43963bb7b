"""How processes find each other, and how the watchdog judges, without any processes."""

import time

import jax
import pytest

from mmfree_jax.errors import ConfigError
from mmfree_jax.parallel import processes
from mmfree_jax.parallel.process_options import ProcessOptions, find_processes
from mmfree_jax.parallel.watchdog import Watchdog

SLURM = {"SLURM_STEP_NODELIST": "n[0-1]", "SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "16"}
EXPLICIT = {"JAX_COORDINATOR_ADDRESS": "h:1", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "2"}


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({"JAX_PLATFORMS": "cpu"}, None),
        (SLURM, {}),
        (SLURM | {"SLURM_STEP_NUM_TASKS": "1"}, None),
        # Inside an allocation, but not started by srun.
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "16", "JAX_PLATFORMS": "cpu"}, None),
        ({"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "1"}, {}),
        ({"TPU_WORKER_HOSTNAMES": "a,b", "TPU_WORKER_ID": "1"}, {}),
        ({"MEGASCALE_NUM_SLICES": "2"}, {}),
        (
            EXPLICIT,
            {
                "coordinator_address": "h:1",
                "num_processes": 4,
                "process_id": 2,
                "cluster_detection_method": "deactivate",
            },
        ),
        (EXPLICIT | {"JAX_NUM_PROCESSES": "1"}, None),
        # A launcher inside another one's allocation knows better.
        (
            SLURM | EXPLICIT,
            {
                "coordinator_address": "h:1",
                "num_processes": 4,
                "process_id": 2,
                "cluster_detection_method": "deactivate",
            },
        ),
    ],
)
def test_processes_are_found_in_the_environment(environ, expected):
    assert find_processes(ProcessOptions(), environ) == expected


def test_flags_come_before_the_environment():
    found = find_processes(ProcessOptions(coordinator="x:9", index=1), EXPLICIT)
    assert found is not None
    assert (found["coordinator_address"], found["process_id"]) == ("x:9", 1)
    assert find_processes(ProcessOptions(coordinator="x:9"), SLURM) == {
        "coordinator_address": "x:9"
    }


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ProcessOptions(coordinator="host"), "set --processes.coordinator HOST:PORT"),
        (
            lambda: ProcessOptions(count=2, index=2),
            r"processes\.index is 2: set --processes.index 0 to 1",
        ),
        (lambda: ProcessOptions(count=0), r"processes\.count is 0"),
        (lambda: ProcessOptions(hang_seconds=0), "hang_seconds is 0"),
        (
            lambda: find_processes(ProcessOptions(count=2), {"JAX_PLATFORMS": "cpu"}),
            r"--processes\.coordinator and --processes\.index missing",
        ),
        (
            lambda: find_processes(ProcessOptions(), EXPLICIT | {"JAX_PROCESS_ID": "two"}),
            r"\$JAX_PROCESS_ID is 'two'",
        ),
    ],
)
def test_refusals(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


class _Pod:
    """Watchdogs that share a clock and a dict in place of the coordinator."""

    def __init__(self, count, **options):
        self.now, self.notes = 0.0, {}
        self.options = ProcessOptions(beat_seconds=1, **options)
        self.dogs = [
            Watchdog(i, count, self, self.options, clock=lambda: self.now) for i in range(count)
        ]

    def put(self, name, text):
        self.notes[name] = text

    def get(self, name):
        return self.notes.get(name)

    def pass_time(self, seconds, *, alive, moving=()):
        """Every second the `alive` look, once the `moving` have got on; returns the verdicts."""
        for _ in range(seconds):
            self.now += 1
            for i in moving:
                self.dogs[i].beat(f"step {int(self.now)}")
            verdicts = {i: self.dogs[i].look() for i in alive}
            if any(verdicts.values()):
                return verdicts
        return {}


def test_our_limits_come_before_those_of_jax(monkeypatch):
    given = {}
    monkeypatch.setattr(jax.distributed, "initialize", lambda **kwargs: given.update(kwargs))
    options = ProcessOptions("n1:8476", 2, 1, join_seconds=200, silent_seconds=500)
    processes.join(options, {})
    assert given["initialization_timeout"] > 200
    assert given["heartbeat_timeout_seconds"] > 500


def test_a_pod_at_work_is_left_alone():
    pod = _Pod(3, silent_seconds=5, hang_seconds=8)
    assert pod.pass_time(100, alive=(0, 1, 2), moving=(0, 1, 2)) == {}


def test_a_silent_process_is_named_to_all():
    pod = _Pod(3, silent_seconds=5, hang_seconds=100)
    pod.pass_time(3, alive=(0, 1, 2), moving=(0, 1, 2))
    verdicts = pod.pass_time(10, alive=(0, 1), moving=())
    assert pod.now == 9, "last heard of at 4, when process 0 read what it left at 3"
    assert verdicts[0].startswith("process 2 (pid ")
    assert "is gone or stopped: no sign of life for 5 s, last after step 3" in verdicts[0]
    assert verdicts[1] == verdicts[0], "the others take process 0's word"


def test_a_silent_coordinator_is_noticed_by_the_others():
    pod = _Pod(3, silent_seconds=5, hang_seconds=100)
    pod.pass_time(3, alive=(0, 1, 2), moving=(0, 1, 2))
    verdicts = pod.pass_time(10, alive=(1, 2))
    assert "process 0 (pid " in verdicts[1]
    assert "process 0 (pid " in verdicts[2]


def test_who_hangs_is_named_although_it_shows_life():
    pod = _Pod(3, silent_seconds=5, hang_seconds=8)
    pod.pass_time(3, alive=(0, 1, 2), moving=(0, 1, 2))
    pod.pass_time(1, alive=(0, 1, 2), moving=(0, 2))  # 1 does not get to step 4
    verdicts = pod.pass_time(20, alive=(0, 1, 2))
    assert verdicts[0].startswith("process 1 (pid ")
    assert (
        "did not arrive: no further than step 3 for 8 s, while others wait at step 4"
        in (verdicts[0])
    )
    assert verdicts[2] == verdicts[0]


def test_a_coordinator_that_is_gone_explains_a_collective_that_failed(monkeypatch):
    pod = _Pod(2, silent_seconds=5, hang_seconds=8)
    pod.pass_time(3, alive=(0, 1), moving=(0, 1))

    def unavailable(name):
        raise jax.errors.JaxRuntimeError("UNAVAILABLE: failed to connect to all addresses")

    monkeypatch.setattr(pod, "get", unavailable)
    assert pod.dogs[1].explain() == (
        "process 0, the coordinator, is gone: it does not answer (this one is after step 3); "
        "run the command again: it resumes"
    )


def test_the_coordinator_names_who_is_gone_without_its_notes(monkeypatch):
    """JAX's service may notice the loss first, and then answers nobody."""
    pod = _Pod(2, silent_seconds=60, hang_seconds=80)
    pod.pass_time(3, alive=(0, 1), moving=(0, 1))

    def unavailable(*_):
        raise jax.errors.JaxRuntimeError("UNAVAILABLE: the task is in an error state")

    def wait(seconds):
        pod.now += seconds

    monkeypatch.setattr(pod, "get", unavailable)
    monkeypatch.setattr(pod, "put", unavailable)
    monkeypatch.setattr(time, "sleep", wait)
    verdict = pod.dogs[0].explain()
    assert verdict.startswith("process 1 (pid ")
    assert "is gone or stopped: no sign of life for 3 s, last after step 2" in verdict


def test_when_all_hang_nobody_is_blamed():
    pod = _Pod(2, silent_seconds=5, hang_seconds=8)
    pod.pass_time(3, alive=(0, 1), moving=(0, 1))
    verdicts = pod.pass_time(20, alive=(0, 1))
    assert "no process has got on for 8 s; all are after step 3" in verdicts[0]


def test_the_coordinator_itself_hanging_is_named():
    pod = _Pod(2, silent_seconds=5, hang_seconds=8)
    pod.pass_time(3, alive=(0, 1), moving=(0, 1))
    pod.pass_time(1, alive=(0, 1), moving=(1,))
    verdicts = pod.pass_time(20, alive=(0, 1))
    assert "process 0 (pid " in verdicts[0]
    assert "did not arrive: no further than step 3" in verdicts[0]
