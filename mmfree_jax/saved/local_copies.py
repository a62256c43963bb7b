"""Copies of a run's state on each machine's own disk or memory, saved more often than checkpoints.

Every process writes what its devices hold, once, into `DIR/<run>/<attempt>-<process>/<step>`: a
tensor file with a checksum for each tensor, and the manifest, last. A step counts if the pieces
that all processes see together are the whole state; so where data parallelism keeps several copies
of it, a machine may be lost. On another mesh each process takes what it needs from the pieces that
it sees, and what some lack goes over the devices' network. Nothing here is Orbax's: its saves are
one act of all processes, in one order, and would meet those of the run directory.
"""

import dataclasses
import math
import secrets
import shutil
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from mmfree_jax.errors import MMFreeError
from mmfree_jax.files import write_text
from mmfree_jax.parallel import processes
from mmfree_jax.saved.checkpoint import Restored
from mmfree_jax.saved.goodput import goodput_from_json
from mmfree_jax.saved.manifest import (
    MANIFEST,
    Manifest,
    checkpoint_steps,
    leaf_types,
    manifest_text,
    read_manifest,
)
from mmfree_jax.saved.origin import FROM_NOTHING, origin_from_json
from mmfree_jax.saved.tensor_file import Reader, tensor_writer

PIECES = "pieces.safetensors"
_FORMAT = "mmfree-local-copy"
_VERSION = 1

Bounds = tuple[tuple[int, int], ...]
"""Where a piece lies in its array: first and last row but one, and so on, by axis."""


@dataclasses.dataclass(frozen=True)
class _Copy:
    """What all processes see of one save: for each array its pieces, and who sees them."""

    attempt: str
    step: int
    seen_by: Mapping[tuple[str, Bounds], list[int]]

    def is_whole(self, wanted: Mapping[str, tuple[tuple[int, ...], str]]) -> bool:
        """Whether the pieces make all arrays of these shapes."""
        covered = dict.fromkeys(wanted, 0)
        for name, bounds in self.seen_by:
            if name in covered:
                covered[name] += math.prod(stop - start for start, stop in bounds)
        return all(covered[name] == math.prod(shape) for name, (shape, _) in wanted.items())


class LocalCopies:
    """The copies of one run on this machine. All processes call `save` and `restore` alike."""

    def __init__(self, folder: Path, run_id: str) -> None:
        """Copies lie below `folder`; those of runs with another id are never looked at."""
        self._folder = folder.absolute() / run_id
        self._attempt: str = processes.first(lambda: secrets.token_hex(4))
        self._mine = self._folder / f"{self._attempt}-{jax.process_index()}"
        self._thread: threading.Thread | None = None

    def save(self, step: int, state: Any, metadata: dict[str, Any]) -> None:
        """Copies this process's part of `state` to the host, then writes it in the background.

        Copies before the newest that all processes have are removed first. A failure is one line
        on standard error: training needs no copy.

        Args:
          step: the copy's name.
          state: pytree of jax.Arrays; may be donated as soon as this returns.
          metadata: as `Checkpointer.save`.
        """
        self.wait()
        self._remove_old(min(processes.exchange(max(checkpoint_steps(self._mine), default=-1))))
        pieces = _local_pieces(state)
        text = manifest_text(step, metadata, time.time(), leaves=leaf_types(state), files={})
        self._thread = threading.Thread(
            target=self._write, args=(self._mine / str(step), pieces, text), daemon=True
        )
        self._thread.start()

    def _write(self, folder: Path, pieces: dict[tuple[str, Bounds], np.ndarray], text: str) -> None:
        try:
            tensors = {_tensor_name(*key): piece for key, piece in pieces.items()}
            layout = [(name, piece.shape, piece.dtype) for name, piece in tensors.items()]
            with tensor_writer(
                folder / PIECES, layout, file_format=_FORMAT, version=_VERSION
            ) as write:
                for name, piece in tensors.items():
                    write(name, piece)
            write_text(folder / MANIFEST, text)
        except Exception as e:
            shutil.rmtree(folder, ignore_errors=True)
            reason = " ".join(str(e).split())[:300]
            print(f"warning: no local copy of step {folder.name}: {reason}", file=sys.stderr)

    def _remove_old(self, common: int) -> None:
        """Removes what comes before the step that all processes have of this attempt."""
        if common < 0:
            return
        for folder in _folders(self._folder):
            attempt = folder.name.rpartition("-")[0]
            for path in _folders(folder):
                if attempt != self._attempt or int(path.name) < common:
                    _remove(path)

    def wait(self) -> None:
        """Waits for the copy under way."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def remove(self) -> None:
        """Removes all of the run's copies on this machine."""
        self.wait()
        shutil.rmtree(self._folder, ignore_errors=True)

    def restore(
        self, abstract_state: Any, *, newer_than: int
    ) -> tuple[Restored | None, tuple[str, ...]]:
        """The newest whole copy's state on the shardings of `abstract_state`, of any mesh.

        Args:
          abstract_state: pytree of `jax.ShapeDtypeStruct` with shardings.
          newer_than: only of a later step than this.

        Returns:
          The state, or None; and what there is to say of copies that were passed over.
        """
        wanted, notes = leaf_types(abstract_state), []
        for copy in self._copies():
            if copy.step <= newer_than:
                break
            if not copy.is_whole(wanted):
                notes.append(
                    f"warning: the local copies of step {copy.step} in {self._folder} are not "
                    "whole: parts of the state are on no machine of this run"
                )
                continue
            manifest = self._manifest(copy, wanted)
            pieces = self._read(copy, abstract_state)
            if not all(processes.exchange(manifest is not None and pieces is not None)):
                notes.append(
                    f"warning: a local copy of step {copy.step} in {self._folder} is damaged, or "
                    "of another model"
                )
                continue
            assert manifest is not None
            assert pieces is not None
            return Restored(_assemble(abstract_state, copy, pieces), manifest), tuple(notes)
        return None, tuple(notes)

    def drop_after(self, step: int) -> None:
        """Removes copies of later steps than the one that the run goes on from."""
        for folder in _folders(self._folder):
            for path in _folders(folder):
                if int(path.name) > step:
                    _remove(path)

    def _here(self, attempt: str, step: int) -> list[Path]:
        """The folders of a save that this process sees."""
        found = [f / str(step) for f in _folders(self._folder) if f.name.startswith(f"{attempt}-")]
        return [folder for folder in found if (folder / MANIFEST).is_file()]

    def _copies(self) -> list[_Copy]:
        """All saves that any process sees a part of, the newest first."""
        mine: list[tuple[str, int, list[str]]] = []
        for folder in _folders(self._folder):
            attempt = folder.name.rpartition("-")[0]
            for step in checkpoint_steps(folder):
                try:
                    names = list(_open(folder / str(step)).names())
                except MMFreeError:
                    continue
                mine.append((attempt, step, names))
        seen: dict[tuple[int, str], dict[tuple[str, Bounds], list[int]]] = {}
        for i, theirs in enumerate(processes.exchange(mine)):
            for attempt, step, names in theirs:
                parts = seen.setdefault((step, attempt), {})
                for name in names:
                    who = parts.setdefault(_key(name), [])
                    if i not in who:
                        who.append(i)
        return [_Copy(attempt, step, seen[step, attempt]) for step, attempt in sorted(seen)[::-1]]

    def _manifest(
        self, copy: _Copy, wanted: Mapping[str, tuple[tuple[int, ...], str]]
    ) -> Manifest | None:
        """The save's manifest, from whoever sees one; None: none is intact and of these arrays."""
        mine = None
        for folder in self._here(copy.attempt, copy.step):
            try:
                found = read_manifest(folder)
            except MMFreeError:
                continue
            if found.leaves == wanted:
                mine = {
                    "config": found.config,
                    "data": found.data,
                    "meter": found.meter,
                    "origin": None if found.origin.parent is None else found.origin.to_json(),
                    "goodput": found.goodput.to_json(),
                }
        values = next((one for one in processes.exchange(mine) if one is not None), None)
        if values is None:
            return None
        return Manifest(
            copy.step,
            values["config"],
            values["data"],
            dict(wanted),
            {},
            values["meter"],
            FROM_NOTHING if values["origin"] is None else origin_from_json(values["origin"]),
            goodput_from_json(values["goodput"]),
        )

    def _read(
        self, copy: _Copy, abstract_state: Any
    ) -> dict[tuple[str, Bounds], np.ndarray] | None:
        """The pieces that this process sees and needs, or owns; None: one is damaged."""
        pieces, needed = {}, _needed(abstract_state)
        me = jax.process_index()
        try:
            for folder in self._here(copy.attempt, copy.step):
                reader = _open(folder)
                for name in reader.names():
                    leaf, bounds = key = _key(name)
                    parts = needed.get(leaf, ())
                    is_needed = any(_overlap(bounds, part) is not None for part in parts)
                    if key not in pieces and (is_needed or min(copy.seen_by[key]) == me):
                        pieces[key] = reader.read(name)
        except (MMFreeError, OSError):
            return None
        return pieces


def _open(folder: Path) -> Reader:
    return Reader(folder / PIECES, file_format=_FORMAT, version=_VERSION)


def _folders(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.is_dir()] if folder.is_dir() else []


def _remove(folder: Path) -> None:
    """Without its manifest it no longer counts, however far the removal gets."""
    (folder / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def _bounds(index: tuple[slice, ...], shape: tuple[int, ...]) -> Bounds:
    return tuple(s.indices(size)[:2] for s, size in zip(index, shape, strict=True))


def _tensor_name(name: str, bounds: Bounds) -> str:
    return f"{name}@{','.join(f'{start}:{stop}' for start, stop in bounds)}"


def _key(tensor: str) -> tuple[str, Bounds]:
    name, _, text = tensor.rpartition("@")
    bounds = [part.split(":") for part in text.split(",") if part]
    return name, tuple((int(start), int(stop)) for start, stop in bounds)


def _local_pieces(state: Any) -> dict[tuple[str, Bounds], np.ndarray]:
    """What this process's devices hold of each array, every piece once, on the host."""
    shards = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        for shard in leaf.addressable_shards:
            key = (jax.tree_util.keystr(path), _bounds(shard.index, leaf.shape))
            if key not in shards:
                shard.data.copy_to_host_async()
                shards[key] = shard.data
    return {key: np.array(data) for key, data in shards.items()}


def _needed(abstract_state: Any) -> dict[str, set[Bounds]]:
    """What this process's devices are to hold of each array."""
    return {
        jax.tree_util.keystr(path): {
            _bounds(index, x.shape)
            for index in x.sharding.addressable_devices_indices_map(x.shape).values()
        }
        for path, x in jax.tree_util.tree_leaves_with_path(abstract_state)
    }


def _assemble(
    abstract_state: Any, copy: _Copy, pieces: Mapping[tuple[str, Bounds], np.ndarray]
) -> Any:
    """The state of pieces that all processes see together, by the shardings asked for."""

    def leaf(path: Any, wanted: jax.ShapeDtypeStruct) -> jax.Array:
        name = jax.tree_util.keystr(path)
        of_leaf = {bounds: who for (other, bounds), who in copy.seen_by.items() if other == name}
        mine = {bounds: pieces[name, bounds] for bounds in of_leaf if (name, bounds) in pieces}
        if all(_sees_enough(wanted, of_leaf, i) for i in range(jax.process_count())):

            def part(index: tuple[slice, ...] | None) -> np.ndarray:
                assert index is not None
                return _cut(mine, _bounds(index, wanted.shape), wanted.dtype)

            return jax.make_array_from_callback(wanted.shape, wanted.sharding, part)
        owned = {b: piece for b, piece in mine.items() if min(of_leaf[b]) == jax.process_index()}
        return _spread(owned, wanted)

    return jax.tree_util.tree_map_with_path(leaf, abstract_state)


def _overlap(one: Bounds, other: Bounds) -> Bounds | None:
    both = tuple((max(a, c), min(b, d)) for (a, b), (c, d) in zip(one, other, strict=True))
    return both if all(start < stop for start, stop in both) else None


def _sees_enough(wanted: Any, seen_by: Mapping[Bounds, list[int]], process: int) -> bool:
    """Whether a process sees all that its devices are to hold of an array."""
    for device, index in wanted.sharding.devices_indices_map(wanted.shape).items():
        if device.process_index != process:
            continue
        bounds = _bounds(index, wanted.shape)
        found = [_overlap(b, bounds) for b, who in seen_by.items() if process in who]
        there = sum(math.prod(b - a for a, b in both) for both in found if both is not None)
        if there != math.prod(stop - start for start, stop in bounds):
            return False
    return True


def _within(inner: Bounds, outer: Bounds) -> tuple[slice, ...]:
    """Bounds as an index into what lies within others."""
    return tuple(
        slice(a - start, b - start) for (a, b), (start, _) in zip(inner, outer, strict=True)
    )


def _cut(pieces: Mapping[Bounds, np.ndarray], bounds: Bounds, dtype: Any) -> np.ndarray:
    """The part of an array within `bounds`."""
    out = np.zeros([stop - start for start, stop in bounds], dtype)
    for where, piece in pieces.items():
        if (both := _overlap(where, bounds)) is not None:
            out[_within(both, bounds)] = piece[_within(both, where)]
    return out


def _spread(owned: Mapping[Bounds, np.ndarray], wanted: Any) -> jax.Array:
    """An array of which each process owns other pieces: the sum of their bits over the devices."""
    dtype, shape, mesh = wanted.dtype, wanted.shape, wanted.sharding.mesh
    bits = np.dtype(f"uint{8 * dtype.itemsize}")
    whole = tuple((0, size) for size in shape)
    mine = _cut(owned, whole, dtype).view(bits)[None]
    flat = Mesh(mesh.devices.reshape(-1), ("all",))
    of_devices = [d.process_index for d in flat.devices]
    first = of_devices.index(jax.process_index())

    def part(index: tuple[slice, ...] | None) -> np.ndarray:
        assert index is not None
        return mine if index[0].start == first else np.zeros_like(mine)

    given = jax.make_array_from_callback((flat.size, *shape), NamedSharding(flat, P("all")), part)

    def total(x: jax.Array) -> jax.Array:
        return jax.lax.bitcast_convert_type(jnp.sum(x, axis=0, dtype=x.dtype), dtype)

    return jax.jit(total, out_shardings=wanted.sharding)(given)
