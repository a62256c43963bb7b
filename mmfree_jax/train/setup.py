"""Everything that is checked and opened before a run compiles anything."""

import contextlib
import dataclasses
import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
from jax.sharding import Mesh

from mmfree_jax.config import TrainConfig
from mmfree_jax.config_io import to_dict
from mmfree_jax.data.dataset import HELDOUT, TokenDataset, check_compatible
from mmfree_jax.data.pipeline import EvalBatches, check_length, make_eval_batches, open_mixture
from mmfree_jax.data.row_source import RowSource
from mmfree_jax.data.tokenizer import load_tokenizer, tokenizer_folder
from mmfree_jax.errors import ConfigError, DataError
from mmfree_jax.files import copy_folder, folder_atomically
from mmfree_jax.installed import versions
from mmfree_jax.model.kernel_choice import check_kernels
from mmfree_jax.parallel import processes
from mmfree_jax.parallel.row_layout import RowLayout, on_devices_left
from mmfree_jax.parallel.sharding import check_divisible, make_mesh, process_rows
from mmfree_jax.places import locate
from mmfree_jax.saved.bucket_run import BucketRun, open_bucket_run
from mmfree_jax.saved.goodput import Goodput
from mmfree_jax.saved.manifest import newest_manifest
from mmfree_jax.saved.origin import FROM_NOTHING, Origin
from mmfree_jax.saved.run_directory import CHECKPOINTS, SUMMARY, TOKENIZER, open_run_dir
from mmfree_jax.storage import Url
from mmfree_jax.train.best import with_direction
from mmfree_jax.train.kept_programs import Programs
from mmfree_jax.train.memory import check_fits
from mmfree_jax.train.optimizer import Optimizer, make_optimizer
from mmfree_jax.train.same_run import refuse_other_models
from mmfree_jax.train.task_evaluation import open_tasks

if TYPE_CHECKING:
    from mmfree_jax.evaluate.task_scores import TaskScores

# What decides what a run computes.
PACKAGES = ("mmfree-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


@dataclasses.dataclass(frozen=True)
class Run:
    """What a run is made of, checked and opened."""

    config: TrainConfig
    layout: RowLayout
    run_dir: Path
    """Of this machine; of a run in a bucket a copy of its small files there."""
    mesh: Mesh
    optimizer: Optimizer
    programs: Programs
    data: tuple[RowSource, ...]
    eval_batches: EvalBatches | None
    """None when `eval.batches` is 0."""
    tokenizer: Any
    """None when `eval.sample_tokens` is 0 and there are no `eval.tasks`, and of data without
    text."""
    tasks: "TaskScores | None" = None
    """None without `eval.tasks`."""
    origin: Origin = FROM_NOTHING
    """Known once the run starts; see `start.py`."""
    bucket: BucketRun | None = None
    """What is written to where run_dir is a URL."""

    @property
    def place(self) -> Path | Url:
        """The run directory as its user knows it."""
        return self.run_dir if self.bucket is None else self.bucket.url

    def check(self) -> None:
        """Sees that no other job has taken over a run in a bucket.

        Raises:
          LeaseLostError: another has, or may have.
          StorageError: the bucket refuses, or cannot be reached.
        """
        if self.bucket is not None:
            self.bucket.check()

    def publish(self) -> None:
        """Uploads the small files of a run in a bucket.

        Raises:
          StorageError: the bucket refuses or cannot be reached, or another job has the run.
        """
        if self.bucket is not None and jax.process_index() == 0:
            self.bucket.publish()

    @property
    def is_reduced(self) -> bool:
        """Whether the rows lie on fewer devices than was planned."""
        return self.layout != RowLayout(self.config.batch_size, self.config.grad_accum)

    @property
    def step_config(self) -> TrainConfig:
        """The config as one step computes it, with padding and micro-batches by `layout`."""
        return dataclasses.replace(
            self.config, batch_size=self.layout.rows, grad_accum=self.layout.micro_batches
        )

    @property
    def data_identity(self) -> dict[str, Any]:
        """Which data the run trains on; goes into every checkpoint."""
        return {
            "fingerprints": [d.fingerprint for d in self.data],
            "tokens": [d.num_tokens for d in self.data],
            "paths": [str(d.path) for d in self.data],
            "tokenizer": dict(self.data[0].identity),
        }


def open_run(config: TrainConfig, planned: int | None = None) -> Run:
    """Checks the config against the devices and the data, and opens the data.

    Several processes also compare what they were started on, before anything is compiled.

    Args:
      config: of the run.
      planned: number of processes that it is meant for; None: those that there are.

    Raises:
      ConfigError: the mesh, the batch or the model does not divide over the devices; or the
        processes differ, which names the one and the field.
      DataError: data is missing or damaged, or does not fit the model.
    """
    devices = jax.local_devices()
    processes.check_alike(
        {
            "versions": versions(*PACKAGES),
            "config": to_dict(config),
            "devices": f"{len(devices)} x {devices[0].device_kind}",
            "XLA_FLAGS": os.environ.get("XLA_FLAGS", ""),
            "planned processes": planned,
        }
    )
    run = processes.together(lambda: _open_run(config, planned))
    tasks = {} if run.tasks is None else run.tasks.fingerprints
    processes.check_alike(
        {"data": run.data_identity, "tasks": tasks, "mesh": _arrangement(run.mesh)}
    )
    return run


def datasets_read(run: Run) -> tuple[TokenDataset, ...]:
    """The splits of prepared folders that a run reads: to train on, and to be evaluated on."""
    held_out = open_mixture(run.config.data, HELDOUT) if run.eval_batches else []
    return tuple(d for d in (*run.data, *held_out) if isinstance(d, TokenDataset))


def _arrangement(mesh: Mesh) -> dict[str, Any]:
    """The mesh's axes, and a digest of which device stands where."""
    order = ",".join(str(device.id) for device in mesh.devices.flat)
    return {**mesh.shape, "device order": hashlib.sha256(order.encode()).hexdigest()[:12]}


def _open_run(config: TrainConfig, planned: int | None) -> Run:
    step_config = on_devices_left(config, planned)
    mesh = make_mesh(step_config.mesh)
    check_divisible(step_config, mesh)
    check_kernels(config.model, mesh.devices.flat[0].platform)
    check_fits(step_config, mesh)
    data = tuple(open_mixture(config.data))
    for dataset in data:
        check_compatible(dataset, config.model.vocab_size)
        check_length(dataset, config.data.seq_len)
    eval_batches = None
    if config.eval.batches:
        # No larger than a micro-batch: evaluation must not need more memory than training.
        rows = config.batch_size // config.grad_accum
        devices = mesh.shape["data"] * mesh.shape["fsdp"]
        at_once = -(-rows // devices) * devices  # the same rows where devices are missing
        eval_batches = make_eval_batches(
            config.data,
            batch_size=at_once,
            num_rows=config.eval.batches * rows,
            rows=process_rows(mesh, (at_once, config.data.seq_len)),
        )
    sources = [] if eval_batches is None else [source.name for source in eval_batches.sources]
    tokenizer, has_text = None, isinstance(data[0].path, Path | Url)
    if config.eval.tasks and not has_text:
        raise ConfigError(
            f"eval.tasks is {list(config.eval.tasks)}, but data.paths ({data[0].path}) has no "
            "text: leave them out"
        )
    if has_text and (config.eval.sample_tokens or config.eval.tasks):
        folder = _tokenizer_folder(data)
        tokenizer = load_tokenizer(config.data.paths[0] if folder is None else folder)
    tasks = open_tasks(config, tokenizer)
    config = with_direction(config, sources, {} if tasks is None else tasks.numbers)
    return Run(
        config=config,
        layout=RowLayout(step_config.batch_size, step_config.grad_accum),
        run_dir=Path(config.run_dir),
        mesh=mesh,
        optimizer=make_optimizer(config.optimizer, config.model),
        programs=Programs(mesh, config),
        data=data,
        eval_batches=eval_batches,
        tokenizer=tokenizer,
        tasks=tasks,
    )


def take_run_dir(run: Run, held: contextlib.ExitStack) -> Run:
    """`run` with its run directory, which no other job has until `held` closes.

    Raises:
      InUseError, InUseElsewhereError: another job has it.
      OutputError, StorageError: it cannot be written to.
      CheckpointError: a process sees another one of that name.
      ConfigError: something else than a run was made there.
    """
    place = locate(run.config.run_dir, "run_dir")
    if isinstance(place, Path):
        refuse_other_models(place)
        open_run_dir(place, held)
        return run
    bucket = open_bucket_run(place, held, checkpoints=CHECKPOINTS, last=SUMMARY)
    refuse_other_models(place)  # now that the bucket is known to let this process in
    return dataclasses.replace(run, run_dir=bucket.folder, bucket=bucket)


def check_same_data(run: Run) -> None:
    """Refuses to go on with a run on other data.

    Raises:
      DataError: the newest checkpoint was trained on data with another fingerprint.
    """
    manifest = newest_manifest(run.place / CHECKPOINTS)
    if manifest is None:
        return
    saved, owner = manifest.data, f"run_dir {run.place}"
    for dataset in run.data:
        check_compatible(dataset, identity=saved["tokenizer"], owner=owner)
    if saved["fingerprints"] != run.data_identity["fingerprints"]:
        raise DataError(
            f"data.paths is {[str(d.path) for d in run.data]}, but {owner} was trained on other "
            f"data ({saved['paths']}, {saved['tokens']} tokens): give that data, or another "
            "--run-dir; or, to go on from its checkpoint on this data, "
            f"--branch-from {run.place} --run-dir NEW"
        )


def checkpoint_metadata(
    run: Run,
    step: int,
    meter: dict[str, Any] | None,
    seconds: float,
    goodput: Goodput,
) -> dict[str, Any]:
    """What a checkpoint's manifest holds beside the arrays."""
    origin = run.origin
    return {
        "config": to_dict(run.config),
        "data": run.data_identity,
        # This is the whole position: what is read is a function of the row's number.
        "data_position": {"next_row": origin.row_at(step, run.config.batch_size)},
        "meter": meter,
        "seconds": seconds,
        "goodput": goodput.to_json(),
        "origin": None if origin.parent is None else origin.to_json(),
    }


def copy_tokenizer(run: Run) -> None:
    """Puts the data's tokenizer into the run directory, whole or not at all.

    Raises:
      OutputError: it cannot be copied.
    """
    target = run.run_dir / TOKENIZER
    if target.exists() or (source := _tokenizer_folder(run.data)) is None:
        return
    with folder_atomically(target) as folder:
        copy_folder(source, folder)


def _tokenizer_folder(data: Sequence[RowSource]) -> Path | None:
    """Of the data's tokenizer; None: they hold none."""
    place = data[0].path
    return None if isinstance(place, str) else tokenizer_folder(place)
