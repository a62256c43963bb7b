"""What a run directory holds: arrays of a checkpoint, losses and events."""

import jax
import numpy as np

from mmfree_jax.config import TrainConfig
from mmfree_jax.config_io import from_dict
from mmfree_jax.saved.checkpoint import restore
from mmfree_jax.saved.history import read_history
from mmfree_jax.saved.manifest import read_manifest
from mmfree_jax.train.setup import open_run
from mmfree_jax.train.step import abstract_state


def arrays_of(run_dir, step):
    config = from_dict(TrainConfig, read_manifest(run_dir / "checkpoints" / str(step)).config)
    run = open_run(config)
    abstract = abstract_state(config, run.optimizer, run.mesh)
    return by_path(restore(run_dir / "checkpoints" / str(step), abstract).state)


def by_path(state):
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {jax.tree_util.keystr(path): np.asarray(x) for path, x in leaves}


def assert_same(one, other):
    assert one.keys() == other.keys()
    for name, array in one.items():
        assert array.dtype == other[name].dtype
        np.testing.assert_array_equal(array, other[name], err_msg=name)


def losses_of(run_dir, name="metrics.jsonl"):
    return {
        r["step"]: (r["loss"], r["grad_norm"], r["learning_rate"], r["tokens"])
        for r in read_history(run_dir / name)
        if r["kind"] == "train"
    }


def events_of(run_dir):
    records = read_history(run_dir / "metrics.jsonl")
    return [r["event"] for r in records if r["kind"] == "event"]
