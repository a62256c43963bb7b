"""Leases: what keeps a second job away from what lies in a bucket."""

import json

import pytest
from bucket_servers import Bucket
from faulty_proxy import Fault

from mmfree_jax.errors import ConfigError, StorageError
from mmfree_jax.leases import InUseElsewhereError, LeaseLostError, read_lease, take_lease
from mmfree_jax.storage import delete, list_names, parse_url, read_bytes


class Clock:
    """Time that passes when somebody waits; `meanwhile` happens at each wait."""

    def __init__(self, meanwhile=lambda: None) -> None:
        self.now, self.meanwhile = 1000.0, meanwhile

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.meanwhile()


def _take(bucket: Bucket, owner: str, clock: Clock):
    url = parse_url(bucket.url) / "run" / ".lease.json"
    return take_lease(url, "run_dir x", owner, clock=clock, sleep=clock.sleep)


def test_the_first_has_it_and_what_it_writes_says_so(bucket: Bucket):
    held = _take(bucket, "process 1 on a", clock := Clock())
    values = json.loads(read_bytes(parse_url(bucket.url) / "run" / ".lease.json"))
    assert (values["owner"], values["seconds"], values["beat"]) == ("process 1 on a", 60.0, 0)
    assert clock.now == 1000.0
    held.check()


def test_while_the_holder_writes_the_next_is_refused(bucket: Bucket):
    first = _take(bucket, "process 1 on a", Clock())
    waits = Clock(first.beat)
    with pytest.raises(
        InUseElsewhereError, match=r"^run_dir x is in use by another job \(process 1"
    ):
        _take(bucket, "process 2 on b", waits)
    assert waits.now == 1007.5  # an eighth of 60 s: the first look after a new version
    first.check()


def test_a_silent_holders_lease_runs_out_by_the_watchers_clock(bucket: Bucket):
    first = _take(bucket, "process 1 on a", early := Clock())
    waits = Clock()
    second = _take(bucket, "process 2 on b", waits)
    assert waits.now == 1060.0
    early.now += 31
    with pytest.raises(LeaseLostError, match="run_dir x was taken over by another job"):
        first.check()
    with pytest.raises(LeaseLostError):
        first.beat()
    second.check()


def test_of_two_that_see_it_run_out_one_gets_it(bucket: Bucket):
    _take(bucket, "process 1 on a", Clock())
    taken = []

    def at_the_end() -> None:
        if waits.now == 1060.0:  # just before this one writes, the other does
            taken.append(_take(bucket, "process 3 on c", Clock()))

    waits = Clock(at_the_end)
    with pytest.raises(InUseElsewhereError, match="process 3 on c"):
        _take(bucket, "process 2 on b", waits)
    taken[0].check()


def test_a_released_lease_is_free_at_once(bucket: Bucket):
    first = _take(bucket, "process 1 on a", Clock())
    first.start()
    first.release()
    second = _take(bucket, "process 2 on b", clock := Clock())
    assert clock.now == 1000.0
    second.check()


def test_a_holder_that_cannot_write_must_not_go_on(bucket: Bucket, monkeypatch):
    held = _take(bucket, "process 1 on a", clock := Clock())
    clock.now += 29
    bucket.proxy.add(Fault(status=403))
    held.check()  # not long ago enough to ask
    clock.now += 2
    with pytest.raises(StorageError, match="cannot be written: permission denied"):
        held.check()
    bucket.proxy.clear()
    held.check()
    delete(parse_url(bucket.url) / "run" / ".lease.json")
    clock.now += 31
    with pytest.raises(LeaseLostError):
        held.check()
    assert list_names(parse_url(bucket.url)) == []


def test_how_long_a_lease_counts_is_a_number_of_seconds(monkeypatch, bucket: Bucket):
    monkeypatch.setenv("MMFREE_LEASE_SECONDS", "soon")
    with pytest.raises(ConfigError, match="MMFREE_LEASE_SECONDS is 'soon': set a number"):
        _take(bucket, "process 1 on a", Clock())


@pytest.mark.parametrize(
    ("data", "owner", "seconds"),
    [
        (b'{"owner": "process 1 on a", "seconds": 12.5, "beat": 3}', "process 1 on a", 12.5),
        (b'{"owner": "", "seconds": 12.5}', "", 12.5),
        (b'{"owner": "process 1 on a", "seconds": -1}', "unknown", 60.0),
        (b'{"owner": "process 1 on a", "seconds": NaN}', "unknown", 60.0),
        (b'{"seconds": 12.5}', "unknown", 60.0),
        (b"[]", "unknown", 60.0),
        (b'{"owner": "proc', "unknown", 60.0),
        (b"\xff", "unknown", 60.0),
    ],
)
def test_what_is_no_lease_is_held_by_somebody_unknown(data, owner, seconds):
    assert read_lease(data) == (owner, seconds)
