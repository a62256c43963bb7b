"""The pages for whoever extends the package do what they say."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import run_page

from mmfree_jax.config import MeshConfig
from mmfree_jax.train import make_mesh

MIXER, KERNEL = "adding-a-mixer.md", "adding-a-kernel.md"


def broken(monkeypatch, page, file, right, wrong):
    """The page's files with a fault in one of them."""
    code, files = run_page.code_of(page)
    assert right in files[file]
    files = files | {file: files[file].replace(right, wrong)}
    monkeypatch.setattr(run_page, "code_of", lambda page: (code, files))


def test_a_mixer_of_ones_own(tmp_path):
    names, _ = run_page.run_page(MIXER, tmp_path)
    assert names["losses"][-1] < names["losses"][0] / 2
    assert [len(tokens) for tokens in names["answers"][0]] == [8]


def test_the_page_of_a_mixer_notices_a_wrong_one(tmp_path, monkeypatch):
    """An average whose weights do not add up to one."""
    right, wrong = "jax.nn.sigmoid(-decay_E) * v_BTE", "jax.nn.sigmoid(decay_E) * v_BTE"
    broken(monkeypatch, MIXER, "leaky.py", right, wrong)
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        run_page.run_page(MIXER, tmp_path)


def test_a_kernel(tmp_path):
    names, printed = run_page.run_page(KERNEL, tmp_path)
    assert "'xla':" in printed[-1]
    op = functools.partial(names["api"].fading_sum, implementation="pallas_tpu", interpret=True)

    def total(axes, *given):
        return jnp.sum(op(*given, token_axes=axes) ** 2)

    gradients = jax.jit(jax.grad(total, (1, 2, 3)), static_argnums=0)
    given = [names[name] for name in ("x", "a", "h0")]
    expected = gradients((), *given)
    with jax.set_mesh(make_mesh(MeshConfig(), jax.devices()[:2])):
        found = gradients(("data",), *given)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), found, expected)


@pytest.mark.parametrize(
    ("file", "right", "wrong"),
    [
        ("pallas_tpu.py", "state_ref[...] = jax", "_ = jax"),
        ("api.py", "a * l_BTD[:, 0]", "l_BTD[:, 0]"),
    ],
)
def test_the_page_of_a_kernel_notices_a_wrong_one(tmp_path, monkeypatch, file, right, wrong):
    """A state that does not pass from block to block; a gradient of the first state without a."""
    broken(monkeypatch, KERNEL, f"fading_sum/{file}", right, wrong)
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        run_page.run_page(KERNEL, tmp_path)
