"""What records look like in TensorBoard (W&B: test_wandb.py), and what a full disk does."""

import resource
import struct

import pytest
from run_records import EVAL, TRAIN
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.record_writer import masked_crc32c

from mmfree_jax.errors import OutputError
from mmfree_jax.train.sinks import TensorBoard

SAMPLE = {"kind": "sample", "step": 20, "prompt": "we", "text": "we\nhold [bold]"}


def _events(path):
    """Every event of a file, whose checksums must hold to its last byte."""
    data, found = path.read_bytes(), []
    while data:
        (size,), (header,) = struct.unpack("<Q", data[:8]), struct.unpack("<I", data[8:12])
        body, (checksum,) = data[12 : 12 + size], struct.unpack("<I", data[12 + size : 16 + size])
        assert (header, checksum) == (masked_crc32c(data[:8]), masked_crc32c(body))
        found.append(Event.FromString(body))
        data = data[16 + size :]
    return found


def test_tensorboard_events(tmp_path):
    sink = TensorBoard(tmp_path, restored_step=0)
    for record in (TRAIN, EVAL, SAMPLE):
        sink.write(record)
    sink.close()
    (file,) = tmp_path.iterdir()
    first, *events = _events(file)
    assert first.file_version == "brain.Event:2"
    values = {value.tag: value for event in events for value in event.summary.value}
    assert {event.step for event in events} == {20}
    assert values["train/loss"].simple_value == 2.5
    assert values["eval/bits_per_byte"].simple_value == pytest.approx(1.1)
    assert values["sample/text_summary"].tensor.string_val == [b"we\nhold [bold]"]


def test_what_a_restart_makes_again_is_purged(tmp_path):
    for restored_step in (0, 0, 7):  # a start, one over it without a checkpoint, and a resumed one
        TensorBoard(tmp_path, restored_step).close()
    found = [_events(file)[1:] for file in sorted(tmp_path.iterdir())]
    assert [[event.step for event in events] for events in found] == [[], [1], [8]]
    assert found[2][0].session_log.status == SessionLog.START


def test_a_full_disk_ends_the_events_and_not_the_run(tmp_path, capsys):
    """tensorboardX's own writer waits for ever once its thread has met a full disk."""
    sink, before = TensorBoard(tmp_path, 0), resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (500, before[1]))
        for _ in range(20):
            sink.write(TRAIN)
        sink.close()
        resource.setrlimit(resource.RLIMIT_FSIZE, (10, before[1]))
        with pytest.raises(OutputError, match=r"cannot be written \(File too large\)"):
            TensorBoard(tmp_path / "another", 0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    (file,) = tmp_path.glob("events*")
    assert len(_events(file)) > 5
    (line,) = capsys.readouterr().err.splitlines()
    assert line == (
        f"warning: nothing more is logged to TensorBoard ({file} cannot be written: File too large)"
    )
