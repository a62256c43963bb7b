"""Kernels that a config names: known ones only, and those that run on the devices."""

import dataclasses
import typing

import pytest
from initial_params import initial_params

from mmfree_jax import model_config
from mmfree_jax.config_io import from_dict
from mmfree_jax.errors import ConfigError
from mmfree_jax.model.kernel_choice import check_kernels, without_foreign_kernels
from mmfree_jax.model_config import ModelConfig
from mmfree_jax.pallas_kernels.recurrence import api as recurrence
from mmfree_jax.pallas_kernels.ternary_matmul import api as ternary_matmul


def test_the_names_are_those_of_the_kernels():
    assert typing.get_args(model_config.MatmulKernel) == ternary_matmul.IMPLEMENTATIONS
    known = typing.get_args(model_config.RecurrenceKernel)
    assert set(known) == set(recurrence._IMPLEMENTATIONS)


@pytest.mark.parametrize("name", ["matmul_kernel", "recurrence_kernel", "attention_kernel"])
def test_an_unknown_kernel_is_refused_by_name(name):
    with pytest.raises(ConfigError, match=f"{name} is 'true': choose one of xla"):
        from_dict(ModelConfig, {name: "true"})


@pytest.mark.parametrize(
    ("name", "kernel", "needs"),
    [
        ("matmul_kernel", "pallas_triton", "GPU"),
        ("matmul_kernel", "pallas_tpu", "TPU"),
        ("recurrence_kernel", "pallas_gpu", "GPU"),
        ("attention_kernel", "cudnn", "GPU"),
    ],
)
def test_a_kernel_of_other_devices_is_refused_or_left_out(name, kernel, needs):
    config = from_dict(ModelConfig, {name: kernel})
    message = f"model.{name} is '{kernel}', which needs a {needs}, and these devices are of kind"
    with pytest.raises(ConfigError, match=message):
        check_kernels(config, "cpu")
    check_kernels(config, needs.lower())
    assert without_foreign_kernels(config, "cpu") == ModelConfig()
    assert without_foreign_kernels(config, needs.lower()) == config


def test_kernels_of_xla_run_everywhere():
    config = ModelConfig(matmul_kernel="xla_int8", recurrence_kernel="xla", attention_kernel="xla")
    for platform in ("cpu", "gpu", "tpu"):
        check_kernels(config, platform)
        assert without_foreign_kernels(config, platform) == config


def test_a_run_of_a_gpus_kernels_is_opened_here(save_model, tmp_path):
    here = ModelConfig(vocab_size=16, hidden_size=8, num_layers=1, intermediate_size=16)
    params = initial_params(here)
    config = dataclasses.replace(here, matmul_kernel="pallas_triton")
    saved = save_model(tmp_path / "model", config, params)
    assert saved.config.matmul_kernel == "pallas_triton"
    assert saved.model().config.matmul_kernel is None
