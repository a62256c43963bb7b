"""Pallas-Triton, which compiles the kernels for NVIDIA GPUs that are not Mosaic GPU's.

JAX has deprecated it and will remove it (docs/next-jax.md). The kernels take it from here, by the
names of `jax.experimental.pallas.triton`, and the choosers ask `serves`. Where it has gone or
cannot compile for the device, `implementation=None` is XLA, which is said once, and a kernel that
is asked for by name fails in one line.
"""

import concurrent.futures
import functools
import warnings
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from .capability import compute_capability
from .errors import TritonError

try:
    import jax.experimental.pallas.triton as _pltriton
    from jax._src.lib.triton import dialect as _dialect
    from jax._src.pallas.triton import lowering as _lowering
except ImportError as error:
    _pltriton = _dialect = _lowering = None
    _import_fault = str(error)
else:
    _import_fault = None

# XLA refuses Triton on anything older.
OLDEST_CAPABILITY = 8.0
_WAY_OUT = "leave the kernel's name out, for XLA's program, or take a jax and a device that have it"


def serves() -> bool:
    """Whether a kernel may be chosen for the first device; says once, in one line, why not.

    To be asked once a kernel of Pallas-Triton is what would be taken.
    """
    fault = _fault()
    if fault is not None:
        _say(fault)
    return fault is None


def require() -> None:
    """Refuses a kernel that was asked for by name.

    Raises:
      TritonError: there is no Pallas-Triton for it.
    """
    fault = _fault()
    if fault is not None:
        raise TritonError(f"{fault}: {_WAY_OUT}")


def __getattr__(name: str) -> Any:
    """What `jax.experimental.pallas.triton` calls so.

    Raises:
      TritonError: as `require`.
    """
    if name.startswith("_"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    require()
    return getattr(_pltriton, name)


def register_lowering(primitive: Any) -> Any:
    """The decorator of a primitive's rule, which finds what it writes in by `internals`."""
    return (lambda rule: rule) if _lowering is None else _lowering.register_lowering(primitive)


def internals() -> tuple[Any, Any]:
    """Pallas's module that lowers to Triton and Triton's operations, for rules of our own."""
    require()
    return _lowering, _dialect


@functools.cache
def _say(fault: str) -> None:
    warnings.warn(
        f"XLA's programs take the place of the GPU kernels, which are faster: {fault}",
        RuntimeWarning,
        stacklevel=3,
    )


def _fault() -> str | None:
    """Why no kernel can be compiled for the first device; None: it can."""
    if _import_fault is not None:
        return f"jax {jax.__version__} has no Pallas-Triton ({_import_fault})"
    capability = compute_capability()
    if capability is not None and capability < OLDEST_CAPABILITY:
        return (
            f"Pallas-Triton needs an NVIDIA GPU of compute capability {OLDEST_CAPABILITY} or more, "
            f"which {jax.devices()[0].device_kind} is not"
        )
    return _lowering_fault()


@functools.cache
def _lowering_fault() -> str | None:
    """What lowering a small kernel raises.

    In a thread of its own: whoever asks may be tracing a program, or have set a mesh.
    """
    with concurrent.futures.ThreadPoolExecutor(1) as executor:
        error = executor.submit(_lower).exception()
    if error is None:
        return None
    reason = " ".join(str(error).split())[:200]
    return f"jax {jax.__version__} does not lower to Pallas-Triton ({reason})"


def _lower() -> None:
    assert _pltriton is not None
    one = jax.ShapeDtypeStruct((1,), jnp.int32)
    call = pl.pallas_call(
        _copy,
        out_shape=one,
        compiler_params=_pltriton.CompilerParams(num_warps=1, num_stages=1),
        name="probe",
    )
    # Described, so that it is lowered for a GPU also where there is none.
    h100 = AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu")
    mesh = AbstractMesh((1,), ("x",), axis_types=(AxisType.Explicit,), abstract_device=h100)
    with jax.sharding.use_abstract_mesh(mesh):
        jax.jit(call).trace(one).lower(lowering_platforms=("cuda",))


def _copy(in_ref: Any, out_ref: Any) -> None:
    out_ref[...] = in_ref[...]
