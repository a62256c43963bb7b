"""The ternary product on Hopper tensor cores through Pallas Mosaic GPU.

A persistent, warp-specialised kernel: one warpgroup copies int8 tiles of both operands into
shared memory by TMA, two others multiply them (s8 wgmma, int32 accumulators) and scale the
sums into the output's dtype in registers, so that no int32 matrix is written. Gated, a program
multiplies a tile of the gate's rows and the same one of up's, and writes only their product.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax import lax

from .. import mosaic_gpu as plgpu
from ..refs import Ref

# jax 0.10 wants an index beside the reference; later versions warn about one.
_INDEX = {} if jax.__version_info__ >= (0, 11) else {"idx": ()}


@dataclasses.dataclass(frozen=True)
class Config:
    """Tile sizes; a program multiplies [tile_m, K] by [tile_n, K]^T."""

    tile_m: int = 128
    tile_n: int = 256
    tile_k: int = 128
    stages: int = 4  # Of the pipeline over K.
    split: str = "m"  # The dimension that the two multiplying warpgroups share out.
    store_m: int = 64  # Rows and columns of one store to memory.
    store_n: int = 64
    width: int = 8  # Tiles across the minor dimension of the snake that keeps operands in L2.
    minor: str = "m"  # The dimension that consecutive tiles walk along.
    cluster: str = "m"  # "m" or "n": two programs share the other operand's tiles by multicast.
    slots: int = 2  # Stores in flight for each multiplying warpgroup.
    # Copy the next output tile's operands before this one's are used up, where the pipeline
    # allows it: the steps over K are a multiple of its stages.
    prefetch: bool = True
    # Where each program gets few tiles: only as many programs as finish in the same number of
    # rounds. Tiles that then come out even leave the prefetch possible.
    even: bool = False

    @property
    def block(self) -> tuple[int, int, int]:
        """What M, N and K must be multiples of."""
        return (
            self.tile_m * (2 if self.cluster == "m" else 1),
            self.tile_n * (2 if self.cluster == "n" else 1),
            self.tile_k,
        )


# By itself in the program: see `mosaic.kernel`.
@functools.partial(jax.jit, static_argnames=("out_dtype", "config", "multiprocessors", "gated"))
def ternary_matmul(
    x_q: jax.Array,
    x_scale: jax.Array,
    trits: jax.Array,
    w_scale: jax.Array,
    *,
    out_dtype: jax.typing.DTypeLike,
    config: Config,
    multiprocessors: int,
    gated: bool = False,
) -> jax.Array:
    """(x_q @ trits^T) * x_scale * w_scale for multiples of the tiles.

    Args:
      x_q: [M, K] int8.
      x_scale: [M] float32.
      trits: [N, K] int8; [2N, K] gated.
      w_scale: [1] float32.
      out_dtype: float32 or bfloat16.
      config: the tiles; M, N and K are multiples of them.
      multiprocessors: of the device; one program runs on each.
      gated: give silu(gate) * up of the product's two halves, both cast to out_dtype first, which
        then never reach memory. `config.split` is "m".

    Returns:
      [M, N] of out_dtype.
    """
    m, k = x_q.shape
    n = trits.shape[0] // (2 if gated else 1)
    if gated and config.split != "m":
        raise ValueError(f"a gated product needs split='m', got {config.split!r}")
    if any(size % block for size, block in zip((m, n, k), config.block, strict=True)):
        raise ValueError(f"[M, N, K] = {[m, n, k]} must be multiples of {config.block}")
    clusters = 2 if config.cluster else 1
    programs = multiprocessors // clusters
    if config.even:
        tiles = (m // config.block[0]) * (n // config.block[1])
        programs = -(-tiles // -(-tiles // programs))
    kernel = plgpu.kernel(
        functools.partial(_kernel, config=config, gated=gated),
        out_type=jax.ShapeDtypeStruct((m, n), out_dtype),
        grid=(programs,),
        grid_names=("program",),
        cluster=(clusters,),
        cluster_names=("cluster",),
        num_threads=3,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
    )
    return kernel(x_q, trits, x_scale, w_scale)


def _swizzled(columns: int, dtype: jax.typing.DTypeLike) -> tuple:
    """The shared-memory layout without bank conflicts for rows of so many columns."""
    itemsize = jnp.dtype(dtype).itemsize
    swizzle = plgpu.find_swizzle(columns * itemsize * 8)
    # The stubs of jax 0.11 take these for abstract.
    return (
        plgpu.TilingTransform((8, swizzle // itemsize)),  # pyright: ignore[reportAbstractUsage]
        plgpu.SwizzleTransform(swizzle),  # pyright: ignore[reportAbstractUsage]
    )


def _kernel(
    x_gmem: Ref,
    t_gmem: Ref,
    x_scale_gmem: Ref,
    w_scale_gmem: Ref,
    out_gmem: Ref,
    *,
    config: Config,
    gated: bool,
) -> None:
    m, k = x_gmem.shape
    n = out_gmem.shape[1]
    halves = 2 if gated else 1
    out_dtype = out_gmem.dtype
    group_m = config.tile_m // (2 if config.split == "m" else 1)
    group_n = config.tile_n // (2 if config.split == "n" else 1)
    stores = [
        (slice(i, i + config.store_m), slice(j, j + config.store_n))
        for i in range(0, group_m, config.store_m)
        for j in range(0, group_n, config.store_n)
    ]
    slots = min(config.slots, len(stores))
    steps = k // config.tile_k
    tiles = (m // config.block[0], n // config.block[1])
    programs = lax.axis_size("program")
    prefetch = (
        config.prefetch
        and steps % min(config.stages, steps) == 0
        # The states below tell a program's first tile from its last.
        and tiles[0] * tiles[1] >= 2 * programs
    )
    operand_layout = _swizzled(config.tile_k, jnp.int8)

    def pipeline(
        body: Callable[..., Any], compute_context: Callable[..., Any], state: Any = None
    ) -> Any:
        return plgpu.emit_pipeline_warp_specialized(
            body,
            grid=(steps,),
            memory_registers=40,
            in_specs=[
                plgpu.BlockSpec(
                    (rows, config.tile_k),
                    lambda step: (0, step),
                    transforms=operand_layout,
                    memory_space=plgpu.SMEM,
                    collective_axes=("cluster",) if config.cluster == shared_along else (),
                )
                for rows, shared_along in (
                    (config.tile_m, "n"),
                    *[(config.tile_n, "m")] * halves,
                )
            ],
            wg_axis="warpgroup",
            num_compute_wgs=2,
            max_concurrent_steps=config.stages,
            compute_context=compute_context,
            pipeline_state=state,
        )

    def ignore(*_: Any, **__: Any) -> None:
        return None

    @functools.partial(
        pl.run_scoped,
        allocations=pipeline(ignore, ignore).get_allocations(x_gmem, *[t_gmem] * halves),
        out_smem=plgpu.SMEM(
            (2, slots, config.store_m, config.store_n),
            out_dtype,
            transforms=_swizzled(config.store_n, out_dtype),
        ),
        collective_axes="warpgroup",
    )
    def _scope(allocations: Any, out_smem: Ref) -> None:
        group = lax.axis_index("warpgroup")
        member = lax.axis_index("cluster")

        @plgpu.nd_loop((tiles[0] * tiles[1],), collective_axes="program")
        def _tile(loop: Any) -> None:
            (index,) = loop.index
            m_index, n_index = plgpu.planar_snake(
                index, tiles, 1 if config.minor == "n" else 0, config.width
            )
            if config.cluster == "m":
                m_index = 2 * m_index + member
            elif config.cluster == "n":
                n_index = 2 * n_index + member
            rows = pl.ds(m_index * config.tile_m, config.tile_m)
            columns = pl.ds(n_index * config.tile_n, config.tile_n)
            group_rows = pl.ds(group * group_m, group_m) if config.split == "m" else slice(None)
            group_columns = pl.ds(group * group_n, group_n) if config.split == "n" else slice(None)

            def compute(run_pipeline: Callable[..., Any]) -> None:
                # Read ahead of the product, which hides the latency.
                scale = plgpu.load(
                    x_scale_gmem.at[rows].at[group_rows],
                    layout=plgpu.Layout.WGMMA.reduce(1),
                    optimized=False,
                    **_INDEX,
                )
                scale = scale * w_scale_gmem[0]

                def scaled(accumulator: Ref) -> jax.Array:
                    values = accumulator[...].astype(jnp.float32)
                    values *= lax.broadcast_in_dim(scale, values.shape, [0])
                    return values.astype(out_dtype)

                @functools.partial(
                    pl.run_scoped,
                    accumulators=[plgpu.ACC((group_m, group_n), jnp.int32)] * halves,
                )
                def _accumulate(accumulators: list[Ref]) -> None:
                    run_pipeline(accumulators)
                    values = scaled(accumulators[0])
                    if gated:
                        gate, up = (
                            v.astype(jnp.float32) for v in (values, scaled(accumulators[1]))
                        )
                        values = (gate / (1.0 + jnp.exp(-gate)) * up).astype(out_dtype)
                    for i, part in enumerate(stores):
                        slot = out_smem.at[group, i % slots]
                        plgpu.wait_smem_to_gmem(slots - 1, wait_read_only=True)
                        slot[...] = values[part]
                        plgpu.commit_smem()
                        plgpu.copy_smem_to_gmem(
                            slot,
                            out_gmem.at[rows, columns].at[group_rows, group_columns].at[part],
                        )

            def multiply(_: Any, x_smem: Ref, *refs: Ref) -> Any:
                *t_smems, accumulators = refs
                for t_smem, accumulator in zip(t_smems, accumulators, strict=True):
                    plgpu.wgmma(
                        accumulator,
                        x_smem.at[group_rows],
                        t_smem.at[group_columns].transpose((1, 0)),
                    )
                plgpu.wgmma_wait(0)
                return accumulators

            state = None
            if prefetch:
                last = loop.num_local_steps - 1
                state = jnp.where(
                    loop.local_index == 0,
                    plgpu.PipelinePipeline.START,
                    jnp.where(
                        loop.local_index == last,
                        plgpu.PipelinePipeline.STOP,
                        plgpu.PipelinePipeline.STEADY,
                    ),
                )
            weights = [
                t_gmem.at[pl.ds(half * n + n_index * config.tile_n, config.tile_n), :]
                for half in range(halves)
            ]
            pipeline(multiply, compute, state)(
                x_gmem.at[rows, :], *weights, allocations=allocations
            )

    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
