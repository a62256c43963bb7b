"""Examples in the docstrings of what is public are run, and those called first have one."""

import doctest
import inspect
from contextlib import chdir
from importlib import import_module

import pytest

PUBLIC = {
    "mmfree_jax": "LanguageModel generate load_pretrained preset save_pretrained",
    "mmfree_jax.model": "init_state training_weights",
    "mmfree_jax.data": "ByteTokenizer make_train_iterator prepare_dataset",
    "mmfree_jax.train": "count_flops count_parameters loss_sums make_mesh make_optimizer "
    "make_schedule",
    "mmfree_jax.infer": "Sampling TextStream",
    "mmfree_jax.evaluate": "Scorer encode_pair",
    "mmfree_jax.experiments.scaling": "compute fit_law make_frame",
    "mmfree_jax.pallas_kernels.bitlinear.api": "bitlinear",
    "mmfree_jax.pallas_kernels.cross_entropy.api": "linear_cross_entropy",
    "mmfree_jax.pallas_kernels.decode.api": "",
    "mmfree_jax.pallas_kernels.gla.api": "gla",
    "mmfree_jax.pallas_kernels.norm_quant.api": "norm_quant norm_quantize quantize_int8 rms_norm",
    "mmfree_jax.pallas_kernels.packed_matmul.api": "pack packed_matmul",
    "mmfree_jax.pallas_kernels.recurrence.api": "linear_recurrence mlgru_recurrence",
    "mmfree_jax.pallas_kernels.ternary_matmul.api": "ternarize ternary_matmul",
    "mmfree_jax.pallas_kernels.wkv.api": "wkv",
}
"""The modules whose names are public, and the names that are called first."""


def examples(module):
    """Each public function or class of a module that has an example, once."""
    found = {}
    for name in import_module(module).__all__:
        value = getattr(import_module(module), name)
        if (inspect.isroutine(value) or inspect.isclass(value)) and ">>>" in (value.__doc__ or ""):
            found[name] = value
    return found


@pytest.mark.parametrize("module", PUBLIC)
def test_what_is_called_first_has_an_example(module):
    assert set(PUBLIC[module].split()) <= set(examples(module))


CASES = {f"{x.__module__}.{x.__name__}": x for m in PUBLIC for x in examples(m).values()}


@pytest.mark.parametrize("name", sorted(CASES))
def test_an_example_does_what_it_shows(name, tmp_path):
    """In an empty folder, with nothing imported."""
    runner = doctest.DocTestRunner(verbose=False)
    with chdir(tmp_path):
        for test in doctest.DocTestFinder(recurse=False).find(CASES[name], name, globs={}):
            runner.run(test)
    assert runner.tries > 0
    assert runner.failures == 0
