"""A run on fewer devices than planned: padding and more micro-batches change no loss."""

import numpy as np
import pytest
from whole_runs import replace

from mmfree_jax.model_config import LinearConfig
from mmfree_jax.parallel.process_options import ProcessOptions
from mmfree_jax.saved.history import read_history
from mmfree_jax.train.training import train

pytestmark = pytest.mark.usefixtures("cached_compilation")


def _losses(run_dir):
    records = read_history(run_dir / "metrics.jsonl")
    return {(r["kind"], r["step"]): r["loss"] for r in records if "loss" in r}


def test_a_third_of_the_processes_makes_the_same_steps(small_run, tmp_path):
    # Not quantised: a sum in another order may otherwise turn a trit.
    linear = LinearConfig(ternary_weights=False, int8_activations=False)
    linears = {f"model__{part}_linear": linear for part in ("mixer", "glu", "head")}
    config = replace(
        small_run, steps=5, batch_size=36, optimizer__eps=1e-3, optimizer__warmup_steps=0,
        eval__every_steps=3, log__ternary_every_steps=0, **linears,
    )  # fmt: skip
    whole = replace(config, run_dir=str(tmp_path / "whole"), mesh__fsdp=2, mesh__tensor=2)
    whole = replace(whole, mesh__data=2)
    train(whole)
    left = replace(config, run_dir=str(tmp_path / "left"), mesh__data=12)
    train(left, process_options=ProcessOptions(planned=3))

    expected, found = _losses(tmp_path / "whole"), _losses(tmp_path / "left")
    assert found.keys() == expected.keys()
    assert len(found) == 7
    for key, loss in expected.items():
        np.testing.assert_allclose(found[key], loss, rtol=2e-5, err_msg=str(key))
    events = [r for r in read_history(tmp_path / "left" / "metrics.jsonl") if r["kind"] == "event"]
    assert events[0]["event"] == (
        "fewer processes than planned (1): 36 rows in 5 micro-batches of 8 on 4 x 2 devices, "
        "4 rows of padding among them"
    )
