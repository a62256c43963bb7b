"""A state's arrays as files, by Orbax: how they are cut, written and read."""

import contextlib
import functools
import inspect
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

# Orbax has no public name for what its public option `serialization_status_callback` takes.
from orbax.checkpoint._src.serialization.types import (
    DefaultSerializationStatusCallback,
    TransferPriority,
)

from mmfree_jax.errors import CheckpointError
from mmfree_jax.saved.checkpoint_files import Place
from mmfree_jax.saved.shares import gather, local_bytes, share_shardings

_CHUNK_BYTES = 32 * 2**20
_FILE_BYTES = 256 * 2**20
"""Many files rather than one, so that several threads write, digest and read them."""
_PART_BYTES = 2**16
"""Of what several devices hold alike each writes a part, if parts have so many bytes: under a
profiler, to cut all was two fifths of the start of a small model's save on eight devices."""
_IN_FLIGHT_BYTES = 2 * 2**30
"""On the way from the devices to files at once. Their host memory is pinned, which is slow to
get (2 GB/s) and comes from a pool that XLA limits to 64 GiB."""
_PINNED_BYTES = 16 * 2**30
_ON_PURPOSE = "No prioritized params found for saving"


class _Later(DefaultSerializationStatusCallback):
    """Lets arrays leave the devices after the call that saves them."""

    def key_priority(self, _: Any) -> TransferPriority:
        """For every array."""
        return TransferPriority.ASYNCHRONOUS_DEPRIORITIZED


def quieten() -> None:
    """Drops what Orbax and TensorStore log of failures that they raise too, and of our choices."""
    logging.getLogger("absl").addFilter(_is_news)
    _say_nothing_of_closed_loops()


def _is_news(record: logging.LogRecord) -> bool:
    """False for tracebacks of failures which `response.result()` raises too."""
    if "orbax" not in record.pathname:
        return True
    return record.exc_info is None and not str(record.msg).startswith(_ON_PURPOSE)


@functools.cache
def _say_nothing_of_closed_loops() -> None:
    """Drops the tracebacks of reads and writes that end after Orbax gave up on another one.

    TensorStore's threads then find the event loop closed, which Python tells as what cannot be
    raised anywhere, a traceback each; asyncio logs those that were never waited for.
    """
    say = sys.unraisablehook

    def hook(unraisable: "sys.UnraisableHookArgs") -> None:
        closed = str(unraisable.exc_value) == "Event loop is closed"
        if not closed and not inspect.iscoroutine(unraisable.object):
            say(unraisable)

    sys.unraisablehook = hook
    logging.getLogger("asyncio").addFilter(lambda record: record.exc_info is None)


@contextlib.contextmanager
def orbax_errors(folder: Place) -> Iterator[None]:
    """Turns what Orbax raises while reading into a CheckpointError of one line."""
    _say_nothing_of_closed_loops()
    try:
        yield
    except Exception as e:  # many kinds, none documented
        reason = " ".join(str(e).split())[:200]
        raise CheckpointError(f"checkpoint {folder} cannot be read: {reason}") from e


def _name(folder: Place) -> str:
    """What Orbax calls a folder."""
    if isinstance(folder, Path):
        return str(folder.absolute())
    from mmfree_jax.saved import orbax_urls  # which changes Orbax

    orbax_urls.prepare(folder)
    return str(folder)


def start_writing(folder: Place, state: Any, *, is_ours: bool) -> ocp.AsyncResponse[None]:
    """Starts to write `state/` of a checkpoint's folder; all processes call it.

    Args:
      folder: that is made.
      state: pytree of jax.Arrays.
      is_ours: nobody else donates or changes the arrays, so that they may leave the devices
        after this returns; else they have left when it does.
    """
    name = _name(folder)
    context = ocp.Context()
    saving = context.array.saving
    # Compressing took five times as long as writing, for a twelfth of the bytes.
    saving.use_compression = False
    saving.storage_options.chunk_byte_size = _CHUNK_BYTES
    saving.ocdbt_target_data_file_size = _FILE_BYTES
    saving.min_slice_bytes_for_replica_parallel = _PART_BYTES
    if is_ours:
        context.memory.transfer_concurrent_bytes = _IN_FLIGHT_BYTES
        context.memory.serialization_status_callback = _Later()
    elif sum(local_bytes(state).values()) > _PINNED_BYTES:
        saving.enable_pinned_host_transfer = False
    with context:
        return ocp.save_checkpointables_async(name, {"state": state})


def read_arrays(folder: Place, abstract_state: Any, *, partial: bool = False) -> Any:
    """Reads `state/` of a checkpoint's folder; all processes call it.

    What several devices hold alike comes from the host once and from device to device then.

    Args:
      folder: of the checkpoint.
      abstract_state: pytree of `jax.ShapeDtypeStruct` with shardings, of any mesh.
      partial: the checkpoint may hold more.

    Raises:
      CheckpointError: Orbax cannot read it.
    """
    name = _name(folder)
    context = ocp.Context()
    context.pytree.loading.partial_load = partial
    wanted = jax.tree.map(lambda x: x.sharding, abstract_state)
    shares = share_shardings(abstract_state) if _is_apart(abstract_state) else wanted
    asked = jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        abstract_state,
        shares,
    )
    with orbax_errors(folder), context:
        loaded = ocp.load_checkpointables(name, {"state": asked})["state"]
    return gather(loaded, wanted)


def _is_apart(tree: Any) -> bool:
    """Whether the devices' memory is not the host's, where a second copy costs as much."""
    return any(d.platform != "cpu" for x in jax.tree.leaves(tree) for d in x.sharding.device_set)
