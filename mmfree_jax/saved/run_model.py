"""Reading the parameters of a training run from its checkpoints; the optimiser's are left."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from mmfree_jax.errors import CheckpointError
from mmfree_jax.model.parameters import unflatten
from mmfree_jax.parallel.sharding import param_shardings
from mmfree_jax.ranges import Step
from mmfree_jax.saved import checkpoint
from mmfree_jax.saved import manifest as manifests
from mmfree_jax.saved.array_files import read_arrays
from mmfree_jax.saved.best import best_checkpoint
from mmfree_jax.saved.run_directory import CHECKPOINTS


def find_checkpoint(run: Path, step: Step | None = None) -> Path:
    """The folder of a run's checkpoint, every file of it verified.

    Args:
      run: the run directory.
      step: of the checkpoint; "best": by the run's metric; None: the newest that is whole. Damaged
        ones are passed over with a warning that names them.

    Raises:
      CheckpointError: the run has no such checkpoint, or none that is whole.
    """
    if step is None:
        where = run / CHECKPOINTS
        step = checkpoint.find_newest(where, keep_damaged=True)
        if step is None:
            raise CheckpointError(
                f"{where} holds no checkpoint: train longer, or give another folder"
            )
        return where / str(step)
    if step == "best":
        step = best_checkpoint(run)
    folder = kept_checkpoint(run, step)
    try:
        manifests.verify(folder)
    except manifests.DamagedCheckpointError as e:
        others = [str(s) for s in manifests.checkpoint_steps(folder.parent) if s != step]
        raise CheckpointError(
            f"{e}: give another step ({', '.join(others) or 'there is none'})"
        ) from e
    return folder


def kept_checkpoint(run: Path, step: int) -> Path:
    """The folder of a run's complete checkpoint, not yet verified.

    Raises:
      CheckpointError: the run has none of that step; names those that it has.
    """
    where = run / CHECKPOINTS
    steps = manifests.checkpoint_steps(where)
    if step not in steps:
        found = ", ".join(map(str, steps)) or "none"
        raise CheckpointError(f"{where} has no checkpoint of step {step}: it has {found}")
    return where / str(step)


def read_params(
    folder: Path, shapes: Mapping[str, jax.ShapeDtypeStruct], mesh: Mesh | None
) -> dict[str, Any]:
    """Some or all parameters of a checkpoint, nested.

    Args:
      folder: that `find_checkpoint` found.
      shapes: of the wanted parameters, by path.
      mesh: to lay them out on by the sharding table; None: the default device.

    Raises:
      CheckpointError: the checkpoint has other shapes, or cannot be read.
    """
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
