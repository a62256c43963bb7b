"""Where Pallas-Triton is gone, or a GPU is not one for a kernel; the device here is a CPU."""

import ast
import functools
import subprocess
import sys
import types
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax._src.pallas.triton import lowering

from mmfree_jax.pallas_kernels import triton
from mmfree_jax.pallas_kernels.bitlinear import int8_kernels
from mmfree_jax.pallas_kernels.bitlinear.api import bitlinear_many
from mmfree_jax.pallas_kernels.cross_entropy.api import linear_cross_entropy_sum
from mmfree_jax.pallas_kernels.decode import api as decode
from mmfree_jax.pallas_kernels.decode import device
from mmfree_jax.pallas_kernels.errors import KernelError, MosaicError, TritonError
from mmfree_jax.pallas_kernels.norm_quant import api as norm_quant
from mmfree_jax.pallas_kernels.packed_matmul import api as packed
from mmfree_jax.pallas_kernels.recurrence.api import mlgru_recurrence
from mmfree_jax.pallas_kernels.ternary_matmul.api import ternarize, ternary_matmul

KERNELS = Path(__file__).resolve().parents[2] / "pallas_kernels"
H100 = "NVIDIA H100 80GB HBM3"


def believe_in(patch, kind=H100, capability="9.0"):
    """Lets the choosers believe in a GPU of a kind and a capability."""
    gpu = types.SimpleNamespace(device_kind=kind, compute_capability=capability, platform="gpu")
    patch.setattr(jax, "devices", lambda *_: [gpu])
    patch.setattr(jax, "device_count", lambda *_: 1)
    patch.setattr(jax, "default_backend", lambda: "gpu")
    patch.setattr(device, "multiprocessors", lambda: 132)


@pytest.fixture
def a_gpu(monkeypatch):
    caches = triton._lowering_fault, triton._say
    for cache in caches:
        cache.cache_clear()
    yield functools.partial(believe_in, monkeypatch)
    for cache in caches:
        cache.cache_clear()


def layer_and_loss(implementation=None):
    """The kernels that carry training, forward and backward, as they are traced."""
    x, a = jnp.ones((2, 16, 1024), jnp.bfloat16), jnp.ones(1024)
    w, targets = jnp.ones((1024, 1024)), jnp.zeros(32, jnp.int32)
    trits, scale = ternarize(w)

    def loss(x, w):
        i, f = bitlinear_many(
            x, (a, a), (w, w), (trits, trits), (scale, scale), eps=1e-6, outer_norm_weight=a,
            implementation="xla_int8" if implementation else None,
        )  # fmt: skip
        h, _ = mlgru_recurrence(i, f, implementation=implementation)
        return linear_cross_entropy_sum(
            h.reshape(32, -1), w, targets, implementation=implementation
        )[0]

    return str(jax.make_jaxpr(jax.value_and_grad(loss, (0, 1)))(x, w))


def packed_by_name():
    """A kernel that stands on Pallas-Triton."""
    x, packed_weights = jnp.ones((4, 64), jnp.int8), jnp.zeros((4, 16), jnp.uint8)
    return packed.packed_matmul(x, packed_weights, implementation="pallas_gpu")


# The kernels that carry training are Mosaic GPU's.
WITHOUT_TRITON = {
    "norm": True, "training": True,
    "int8 backward": False, "packed": False, "decode": False, "greedy": False,
}  # fmt: skip


def in_use():
    """Where the choosers take a kernel, on a GPU."""
    sizes = {"width": 1024, "state_size": 1024, "glu_size": 2816}
    return {
        "norm": norm_quant.default_implementation(1024) == "pallas_gpu",
        "int8 backward": int8_kernels.fit(16384, 1024, 1024, implementation=None),
        "packed": packed.kernels_serve(),
        "decode": decode.measured_best(1, **sizes) is not None,
        "greedy": decode.greedy_rows(**sizes) > 0,
        "training": "softmax_rows" in layer_and_loss(),
    }


def test_an_h100_takes_the_kernels(a_gpu):
    a_gpu()
    assert all(in_use().values())
    text = layer_and_loss()
    for kernel in ("norm_quant", "linear_recurrence_reversed", "softmax_rows"):
        assert kernel in text


def test_where_lowering_raises_xla_is_taken_which_is_said_once(a_gpu, monkeypatch):
    def gone(*_, **__):
        raise NotImplementedError("The Pallas Triton backend\nhas been removed.")

    monkeypatch.setattr(lowering, "lower_jaxpr_to_triton_module", gone)
    a_gpu()
    with pytest.warns(RuntimeWarning) as said:
        assert in_use() == WITHOUT_TRITON
    # jax's own warning, that it will go, is another.
    (warning,) = [w for w in said if w.category is RuntimeWarning]
    assert str(warning.message) == (
        "XLA's programs take the place of the GPU kernels, which are faster: "
        f"jax {jax.__version__} does not lower to Pallas-Triton "
        "(The Pallas Triton backend has been removed.)"
    )
    with pytest.raises(TritonError, match="leave the kernel's name out, for XLA's program"):
        packed_by_name()


def gone_from_jax():
    """Run in a process where `jax.experimental.pallas.triton` cannot be imported."""
    with pytest.MonkeyPatch.context() as patch:
        believe_in(patch)
        with pytest.warns(RuntimeWarning, match="has no Pallas-Triton") as said:
            assert in_use() == WITHOUT_TRITON
        assert len(said) == 1
        x, one = jnp.ones((4, 64), jnp.int8), jnp.ones((1, 1))
        calls = [
            lambda: ternary_matmul(x, jnp.ones((4, 1)), x, one, implementation="pallas_triton"),
            packed_by_name,
        ]
        for call in calls:
            with pytest.raises(TritonError, match=r"has no Pallas-Triton .*: leave the kernel's"):
                call()
    print("gone, as it should be")


WITHOUT = """
import runpy, sys
sys.modules["jax.experimental.pallas.triton"] = None
names = runpy.run_path(sys.argv[1])
assert "jax.experimental.pallas.mosaic_gpu" not in sys.modules, "it takes a while to import"
names["gone_from_jax"]()
"""


def test_gone_from_jax():
    run = [sys.executable, "-c", WITHOUT, __file__]
    done = subprocess.run(run, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "gone, as it should be\n"), done.stderr


@pytest.mark.parametrize(
    ("kind", "capability", "serves", "prefetches"),
    [
        ("AMD Instinct MI300X", "gfx942", False, False),
        ("Tesla V100-SXM2-16GB", "7.0", False, False),
        ("Tesla T4", "7.5", False, False),
        ("NVIDIA A100-SXM4-80GB", "8.0", True, False),
        ("NVIDIA L4", "8.9", True, False),
        (H100, "9.0", True, True),
        ("NVIDIA B200", "10.0", True, True),
    ],
)
def test_a_card_gets_kernels_that_compile_for_it(kind, capability, serves, prefetches, a_gpu):
    a_gpu(kind, capability)
    with warnings.catch_warnings(record=True):
        warnings.simplefilter("always")
        found = in_use()
    hopper = capability == "9.0"
    assert found == {
        "norm": hopper, "int8 backward": hopper, "training": hopper,
        "packed": serves, "decode": serves, "greedy": serves,
    }  # fmt: skip
    if serves:
        assert device.prefetches() == prefetches
        assert (device.measured_cut(1024).ahead > 0) == prefetches
    else:
        with pytest.raises(TritonError, match=f"8.0 or more, which {kind} is not: leave"):
            packed_by_name()
    if not hopper:
        with pytest.raises(MosaicError, match=f"9.0, which {kind} is not: take"):
            layer_and_loss("pallas_gpu")
        x, one = jnp.ones((256, 256), jnp.int8), jnp.ones((256, 1))
        with pytest.raises(KernelError, match=f"9.0 have, which {kind} is not: leave"):
            ternary_matmul(x, one, x, one[:1], implementation="pallas_mosaic_gpu")


def sources():
    for path in sorted(KERNELS.rglob("*.py")):
        yield path.relative_to(KERNELS).as_posix(), path.read_text(encoding="utf-8")


def test_pallas_triton_has_one_door():
    past = [
        name
        for name, text in sources()
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.ImportFrom | ast.Import)
        for alias in node.names
        if "pallas.triton" in f"{getattr(node, 'module', '')}.{alias.name}"
    ]
    assert set(past) == {"triton.py"}


def test_no_kernel_addresses_by_slices():
    """jax 0.12 refuses a slice that ends beyond its array, whose start it knows; masked or not."""
    for name, text in sources():
        if "triton as pltriton" in text:
            assert "pl.ds(" not in text, name
            assert "pl.dslice(" not in text, name
