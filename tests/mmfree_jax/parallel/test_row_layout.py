"""A step's rows on fewer devices than they were meant for: the same sums, and which layout."""

import numpy as np
import pytest

from mmfree_jax.data.pipeline import make_eval_batches, make_train_iterator
from mmfree_jax.errors import ConfigError
from mmfree_jax.parallel.process_options import ProcessOptions, planned_processes
from mmfree_jax.parallel.row_layout import RowLayout, row_layout


@pytest.mark.parametrize(
    ("rows", "micro", "planned", "devices", "expected"),
    [
        (12, 1, 4, 4, RowLayout(12, 1)),
        (12, 1, 4, 3, RowLayout(12, 2)),  # 2 micro-batches of 6, two rows a device, not four
        (8, 1, 4, 3, RowLayout(9, 3)),  # one row of padding, not four as in 2 micro-batches
        (8, 1, 4, 2, RowLayout(8, 2)),
        (8, 1, 4, 1, RowLayout(8, 4)),
        (32, 1, 4, 3, RowLayout(36, 2)),
        (4, 1, 4, 3, RowLayout(6, 2)),
        (48, 2, 8, 6, RowLayout(48, 4)),
        (48, 2, 8, 7, RowLayout(56, 4)),
    ],
)
def test_no_device_gets_more_rows_at_once(rows, micro, planned, devices, expected):
    found = row_layout(rows, micro, planned, devices)
    assert found == expected
    assert found.rows // found.micro_batches // devices <= rows // micro // planned
    assert found.rows % (found.micro_batches * devices) == 0


def test_as_many_devices_as_planned_change_nothing():
    assert row_layout(12, 2, 4, 4) == row_layout(12, 2, 4, 6) == RowLayout(12, 2)


def test_rows_of_padding_follow_the_same_rows(small_run):
    data = small_run.data
    whole = make_train_iterator(data, batch_size=8, start_row=16)
    padded = make_train_iterator(data, batch_size=8, padded=12, rows=(6, 7, 8, 9), start_row=16)
    for _ in range(2):
        expected, found = next(whole), next(padded)
        for name, fill in (("tokens", 0), ("targets", -1), ("segment_ids", 0)):
            np.testing.assert_array_equal(found[name][:2], expected[name][6:])
            np.testing.assert_array_equal(found[name][2:], np.full((2, data.seq_len), fill))
    with pytest.raises(ConfigError, match="name some of 0 to 11"):
        make_train_iterator(data, batch_size=8, padded=12, rows=(12,))


def test_held_out_rows_are_the_same_for_any_batch_size(small_run):
    def predicted(batch_size, **limit):
        batches = make_eval_batches(small_run.data, batch_size=batch_size, **limit)
        return np.concatenate([b["targets"][b["segment_ids"].any(axis=1)] for b in batches])

    expected = predicted(8, num_batches=2)
    assert len(expected) == 16
    np.testing.assert_array_equal(predicted(9, num_rows=16), expected)
    np.testing.assert_array_equal(predicted(3, num_rows=16), expected)


def test_the_number_that_was_planned():
    name = "MMFREE_PLANNED_PROCESSES"
    assert planned_processes(ProcessOptions(), {}) is None
    assert planned_processes(ProcessOptions(), {name: "4"}) == 4
    assert planned_processes(ProcessOptions(planned=3), {name: "4"}) == 3
    with pytest.raises(ConfigError, match=r"\$MMFREE_PLANNED_PROCESSES is 'x': set a number"):
        planned_processes(ProcessOptions(), {name: "x"})
