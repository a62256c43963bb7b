"""What may come of a process that is gone, and is worth looking who it is for."""

import jax
import pytest

from mmfree_jax.errors import CheckpointError, StorageError
from mmfree_jax.train.training import may_be_a_loss


def _failed(cause: Exception) -> CheckpointError:
    error = CheckpointError(f"checkpoint of step 4 could not be saved in runs/a: {cause}")
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ValueError("Gloo all-reduce failed: Connection closed by peer"), True),
        (_failed(jax.errors.JaxRuntimeError("DEADLINE_EXCEEDED: barrier")), True),
        (_failed(RuntimeError("barrier of save 4 failed: task 1 is gone")), True),
        (_failed(ValueError("RESOURCE: write failed: No space left on device")), False),
        (_failed(PermissionError(13, "Permission denied")), False),
        (_failed(StorageError("gs://bucket/run cannot be written")), False),
    ],
)
def test_only_what_others_may_have_caused(error, expected):
    assert may_be_a_loss(error) is expected
