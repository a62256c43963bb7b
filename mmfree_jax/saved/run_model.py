"""Reading the parameters of a training run from its checkpoints; the optimiser's are left."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from mmfree_jax.errors import CheckpointError
from mmfree_jax.files import sha256
from mmfree_jax.model.parameters import unflatten
from mmfree_jax.parallel.sharding import param_shardings
from mmfree_jax.ranges import Step
from mmfree_jax.saved import checkpoint
from mmfree_jax.saved import manifest as manifests
from mmfree_jax.saved.array_files import read_arrays
from mmfree_jax.saved.best import best_checkpoint
from mmfree_jax.saved.checkpoint_files import Place, read_manifest_bytes
from mmfree_jax.saved.run_directory import CHECKPOINTS

_LOOKS = 3
"""That are taken at checkpoints while a run deletes them."""


def find_checkpoint(
    run: Place,
    step: Step | None = None,
    *,
    records: Path | None = None,
    check: Callable[[Any], object] = manifests.verify,
) -> Place:
    """The folder, or URL, of a run's checkpoint that is whole.

    Args:
      run: the run directory, or its URL.
      step: of the checkpoint; "best": by the run's metric; None: the newest that is whole. Damaged
        ones are passed over with a warning that names them.
      records: a copy of the run's small files; None: they are read in `run`, which is a folder.
      check: raises `DamagedCheckpointError` for one that is damaged.

    Raises:
      CheckpointError: the run has no such checkpoint, or none that is whole.
      StorageError: the bucket refuses, or cannot be reached.
    """
    if step is None:
        return _find_newest(run / CHECKPOINTS, check)
    if step == "best":
        step = best_checkpoint(records or Path(str(run)), run / CHECKPOINTS)
    folder = kept_checkpoint(run, step)
    try:
        check(folder)
    except manifests.DamagedCheckpointError as e:
        others = [str(s) for s in manifests.checkpoint_steps(run / CHECKPOINTS) if s != step]
        raise CheckpointError(
            f"{e}: give another step ({', '.join(others) or 'there is none'})"
        ) from e
    return folder


def _find_newest(where: Place, check: Callable[[Any], object]) -> Place:
    for _ in range(_LOOKS):
        steps = manifests.checkpoint_steps(where)
        try:
            found = checkpoint.find_newest(where, keep_damaged=True, check=check)
        except CheckpointError:
            if steps == manifests.checkpoint_steps(where):
                raise
            continue  # the run goes on, and has deleted what was looked at
        if found is None:
            raise CheckpointError(
                f"{where} holds no checkpoint: train longer, or give another folder"
            )
        return where / str(found)
    raise CheckpointError(
        f"the checkpoints in {where} were deleted while they were read, as a run does that keeps "
        "its newest alone: run the command again, or train that run with --checkpoint.keep-every"
    )


def kept_checkpoint(run: Place, step: int) -> Place:
    """The folder, or URL, of a run's complete checkpoint, not yet verified.

    Raises:
      CheckpointError: the run has none of that step; names those that it has.
    """
    where = run / CHECKPOINTS
    steps = manifests.checkpoint_steps(where)
    if step not in steps:
        found = ", ".join(map(str, steps)) or "none"
        raise CheckpointError(f"{where} has no checkpoint of step {step}: it has {found}")
    return where / str(step)


def check_still_there(folder: Place, checksum: str) -> None:
    """Call after reading a checkpoint of a run that may go on.

    Of a chunk that is deleted while it is read, zeros may be all that is noticed. What a run
    deletes loses its manifest first.

    Args:
      folder: of the checkpoint.
      checksum: SHA-256 of its manifest before.

    Raises:
      CheckpointError: it was deleted meanwhile.
    """
    try:
        there = sha256(read_manifest_bytes(folder)) == checksum
    except OSError:
        there = False
    if not there:
        raise CheckpointError(
            f"checkpoint {folder} was deleted while it was read, as a run does that keeps its "
            "newest alone: run the command again, or train that run with --checkpoint.keep-every"
        )


def read_params(
    folder: Path, shapes: Mapping[str, jax.ShapeDtypeStruct], mesh: Mesh | None
) -> dict[str, Any]:
    """Some or all parameters of a checkpoint, nested.

    Args:
      folder: that `find_checkpoint` found.
      shapes: of the wanted parameters, by path.
      mesh: to lay them out on by the sharding table; None: the default device.

    Raises:
      CheckpointError: the checkpoint has other shapes, cannot be read, or was deleted meanwhile.
    """
    try:
        checksum = sha256(read_manifest_bytes(folder))
    except OSError:
        checksum = ""  # of one that is gone already
    try:
        params = _read_params(folder, shapes, mesh)
    except CheckpointError:
        check_still_there(folder, checksum)
        raise
    check_still_there(folder, checksum)
    return params


def _read_params(
    folder: Path, shapes: Mapping[str, jax.ShapeDtypeStruct], mesh: Mesh | None
) -> dict[str, Any]:
    wanted = unflatten(shapes)
    saved = manifests.read_manifest(folder).leaves
    for name, shape_and_dtype in manifests.leaf_types({"params": wanted}).items():
        name = name.replace("['params']", ".params", 1)
        if saved.get(name) != shape_and_dtype:
            raise CheckpointError(
                f"checkpoint {folder}: {name} is {saved.get(name)}, but the run's config needs "
                f"{shape_and_dtype}: the config is of another run"
            )
    if mesh is None:
        device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        shardings = jax.tree.map(lambda _: device, wanted)
    else:
        shardings = param_shardings(mesh, wanted)
    abstract = jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        wanted,
        shardings,
    )
    return read_arrays(folder, {"params": abstract}, partial=True)["params"]
