"""Checkpoints: asynchronous, whole or absent, checked when read.

A checkpoint is the folder `checkpoints/<step>/`: the state's arrays as Orbax writes them
(`state/`), and the manifest (`manifest.py`), which holds everything else and is written last.
Orbax alone detects neither a flipped bit in the array data nor every truncation; the manifest's
digests do.

With several processes, all of them call `save` and `restore`; process 0 writes the manifest
and deletes old checkpoints.
"""

import contextlib
import dataclasses
import errno
import functools
import os
import shutil
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax

from mmfree_jax.errors import CheckpointError, MMFreeError, StorageError
from mmfree_jax.files import disk_errors
from mmfree_jax.parallel import processes
from mmfree_jax.saved.array_files import quieten, read_arrays, start_writing
from mmfree_jax.saved.checkpoint_files import (
    Place,
    complete,
    digests,
    is_complete,
    remove,
    remove_unfinished,
    set_aside,
    steps_set_aside,
)
from mmfree_jax.saved.manifest import (
    DamagedCheckpointError,
    LeafType,
    Manifest,
    checkpoint_steps,
    leaf_types,
    manifest_text,
    newest_first,
    read_manifest,
    verify,
)
from mmfree_jax.saved.shares import Snapshots
from mmfree_jax.storage import Url, delete_below


@dataclasses.dataclass(frozen=True)
class Restored:
    """A checkpoint that was read: the state on its devices, and the manifest beside it."""

    state: Any
    manifest: Manifest

    @property
    def step(self) -> int:
        """That it was made after."""
        return self.manifest.step


_ITS_CONFIG = "the config it was saved with (--config RUN/config.yaml)"


def _check_leaves(folder: Place, saved: dict[str, LeafType], abstract_state: Any) -> None:
    wanted = leaf_types(abstract_state)
    for name, (shape, dtype) in wanted.items():
        if name not in saved:
            raise CheckpointError(
                f"checkpoint {folder} has no {name}: it is of another model or optimizer; "
                f"use {_ITS_CONFIG}, or another --run-dir"
            )
        if saved[name] != (shape, dtype):
            raise CheckpointError(
                f"checkpoint {folder}: {name} is {saved[name][1]}{list(saved[name][0])}, but the "
                f"config needs {dtype}{list(shape)}; use {_ITS_CONFIG}, or "
                "another --run-dir"
            )
    for name in saved:
        if name not in wanted:
            raise CheckpointError(
                f"checkpoint {folder} holds {name}, which the config does not have; "
                f"use {_ITS_CONFIG}, or another --run-dir"
            )


def restore(folder: Place, abstract_state: Any, *, check_files: bool = True) -> Restored:
    """Reads the checkpoint in `folder` onto the shardings of `abstract_state`.

    Args:
      folder: `checkpoints/<step>`.
      abstract_state: pytree of `jax.ShapeDtypeStruct` with shardings; any mesh will do.
      check_files: verify every file's checksum first.

    Raises:
      CheckpointError: the checkpoint is damaged, or a leaf has another shape or dtype.
    """
    manifest = verify(folder) if check_files else read_manifest(folder)
    _check_leaves(folder, manifest.leaves, abstract_state)
    return Restored(read_arrays(folder, abstract_state), manifest)


def restore_newest(folder: Place, abstract_state: Any) -> Restored | None:
    """Reads the newest checkpoint under `folder` that is whole; None if there is none at all.

    A damaged one is passed over with a warning that names it, and set aside as
    `<step>.damaged` so that the step can be saved again. With several processes, process 0
    alone reads every file to check it and decides; the others read their part of the same.

    Raises:
      CheckpointError: a checkpoint is whole but of other shapes, or all are damaged.
    """
    step = processes.first(lambda: find_newest(folder))
    if step is None:
        return None
    return processes.together(
        lambda: restore(folder / str(step), abstract_state, check_files=False)
    )


def find_newest(
    folder: Place,
    *,
    keep_damaged: bool = False,
    check: Callable[[Any], object] = verify,
) -> int | None:
    """The step of the newest checkpoint that is whole; None if there is none at all.

    Args:
      folder: of the checkpoints.
      keep_damaged: leave damaged ones as they are, which are passed over with a warning.
      check: raises `DamagedCheckpointError` for the folder of one that is damaged.

    Raises:
      CheckpointError: all are damaged.
    """
    steps = newest_first(folder)
    for step in steps:
        path = folder / str(step)
        try:
            check(path)
        except DamagedCheckpointError as e:
            if not keep_damaged:
                set_aside(path)
            warnings.warn(f"{e}; falling back to the checkpoint before", stacklevel=2)
            continue
        return step
    # An earlier start may have found it, and no start may then begin anew over its records.
    if damaged := steps or steps_set_aside(folder)[::-1]:
        raise CheckpointError(
            f"every checkpoint in {folder} is damaged ({', '.join(map(str, damaged))}): "
            "give another --run-dir"
        )
    return None


def steps_to_delete(
    steps: list[int], keep_last: int, keep_every: int | None, keep_steps: Sequence[int] = ()
) -> list[int]:
    """Which of the complete checkpoints `steps` (sorted) the retention rules let go."""
    kept = {*steps[-keep_last:], *keep_steps}
    if keep_every:
        kept |= {s for s in steps if s % keep_every == 0}
    return [s for s in steps if s not in kept]


class Checkpointer:
    """Writes the checkpoints of one run in the background and keeps their number down.

    Not thread-safe. At most one save runs at a time; `save` waits for the one before.
    A failed save is reported by the next call of `save` or `wait`; it leaves the
    checkpoints before it as they were.
    """

    def __init__(
        self,
        folder: Place,
        *,
        keep_last: int = 2,
        keep_every: int | None = None,
        keep_steps: Sequence[int] = (),
        keep_among: Callable[[list[int]], Sequence[int]] = lambda steps: (),
        clock: Callable[[], float] = time.time,
        check_ours: Callable[[], None] = lambda: None,
    ) -> None:
        self.folder: Place = folder.absolute() if isinstance(folder, Path) else folder
        self._check_ours = check_ours
        self._keep_last, self._keep_every, self._keep_steps = keep_last, keep_every, keep_steps
        self._keep_among = keep_among
        self._clock = clock
        self._thread: threading.Thread | None = None
        self._saving: int | None = None
        self._failure: tuple[int, BaseException] | None = None
        self._is_writer = jax.process_index() == 0
        self._snapshots = Snapshots()
        quieten()
        if isinstance(self.folder, Path):
            with disk_errors(self.folder, "make room there, or give another --run-dir"):
                self.folder.mkdir(parents=True, exist_ok=True)
        if self._is_writer:
            remove_unfinished(self.folder)

    @property
    def steps(self) -> list[int]:
        """Steps of the complete checkpoints and of the one that is being written, sorted."""
        under_way = set() if self._saving is None else {self._saving}
        return sorted({*checkpoint_steps(self.folder), *under_way})

    @property
    def newest(self) -> int | None:
        """Step of the newest complete checkpoint."""
        steps = checkpoint_steps(self.folder)
        return steps[-1] if steps else None

    def save(self, step: int, state: Any, metadata: dict[str, Any]) -> None:
        """Copies `state` on its devices, or else to the host, then writes it in the background.

        Args:
          step: the checkpoint's name. One that exists already is left as it is.
          state: pytree of jax.Arrays; may be donated as soon as this returns.
          metadata: plain values that go into the manifest; at least "config" and "data".
        """
        self.wait()
        path = self.folder / str(step)
        if is_complete(path):
            return
        if self._is_writer and isinstance(path, Url):  # what is left of one that was set aside
            delete_below(path)
        text = functools.partial(
            manifest_text, step, metadata, self._clock(), leaves=leaf_types(state)
        )
        try:
            copy = self._snapshots.take(state)
            ours = copy is not None
            response = start_writing(path, copy if ours else state, is_ours=ours)
        except Exception as e:
            self._failure = (step, e)
            self._discard(path)
            self._raise_failure()
            return
        self._saving = step
        self._thread = threading.Thread(
            target=self._finish,
            args=(step, path, response, text),
            name=f"checkpoint-{step}",
            daemon=True,
        )
        self._thread.start()

    def _finish(self, step: int, path: Place, response: Any, text: Callable[..., str]) -> None:
        try:
            response.result()
            if self._is_writer:
                found = digests(path)
                self._check_ours()
                complete(path, text(files=found))
                self._delete_old()
        except BaseException as e:
            self._failure = (step, e)
            self._discard(path)

    def _discard(self, path: Place) -> None:
        """Frees the space of a save that failed; in a bucket as far as that can be reached."""
        if not self._is_writer:
            return
        if isinstance(path, Url):
            with contextlib.suppress(MMFreeError):
                self._check_ours()
                if not is_complete(path):
                    delete_below(path)
            return
        if is_complete(path):
            return
        for _ in range(20):
            leftovers = [
                leftover
                for leftover in path.parent.glob(f"{path.name}*")
                if leftover.name == path.name or "tmp" in leftover.name
            ]
            if not leftovers:
                return
            for leftover in leftovers:
                shutil.rmtree(leftover, ignore_errors=True)
            time.sleep(0.05)  # other arrays' writes may still be making the folder anew

    def _delete_old(self) -> None:
        steps = checkpoint_steps(self.folder)
        keep_steps = (*self._keep_steps, *self._keep_among(steps))
        kept = (self._keep_last, self._keep_every, keep_steps)
        for step in steps_to_delete(steps, *kept):
            remove(self.folder / str(step))

    @property
    def is_saving(self) -> bool:
        """Whether a save is still being written."""
        return self._thread is not None and self._thread.is_alive()

    @property
    def has_failed(self) -> bool:
        """Whether a save has failed that no call has reported yet."""
        return self._failure is not None

    def wait(self) -> None:
        """Waits for the save under way.

        Raises:
          CheckpointError: it failed; names the step, the reason and the last good checkpoint.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = self._saving = None
        self._raise_failure()

    def prune(self) -> None:
        """Waits as `wait` does, then lets go of what need not be kept any more."""
        self.wait()
        if self._is_writer:
            self._delete_old()

    def abandon(self) -> None:
        """Leaves the save under way to itself: it waits for a process that is gone."""
        self._thread = self._failure = None

    def _raise_failure(self) -> None:
        if self._failure is None:
            return
        (step, error), self._failure = self._failure, None
        reason = " ".join(str(error).split()) or type(error).__name__
        full = os.strerror(errno.ENOSPC)
        reason = full if full in reason else reason[:300]
        try:
            newest = self.newest
        except StorageError:
            kept = "the checkpoints before are as they were"
        else:
            kept = f"the last good checkpoint is step {newest}" if newest else "none is saved"
        where, way_out = str(self.folder), "see that the bucket can be written to"
        if isinstance(self.folder, Path):
            where += f" ({shutil.disk_usage(self.folder).free / 2**30:.2f} GiB free)"
            way_out = "free some space"
        raise CheckpointError(
            f"checkpoint of step {step} could not be saved in {where}: {reason}; {kept}; "
            f"{way_out} and run the command again"
        ) from error
