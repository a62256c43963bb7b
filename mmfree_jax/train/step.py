"""The training step: one pure function of (state, batch), and how it is compiled."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from mmfree_jax.config import DataConfig, OptimizerConfig, TrainConfig
from mmfree_jax.model import LanguageModel, Master, Ternary, training_weights
from mmfree_jax.model.parameters import init_params, param_shapes, unflatten
from mmfree_jax.model.training_forms import config_of_form, weights_of_form
from mmfree_jax.model.weights import Blended, is_ternary
from mmfree_jax.model_config import ModelConfig
from mmfree_jax.parallel.sharding import batch_sharding, param_shardings, state_shardings
from mmfree_jax.quantizer_config import Form, strength_at
from mmfree_jax.train.loss import Batch, LossSums, TokenLosses, loss_sums, token_losses
from mmfree_jax.train.optimizer import Optimizer
from mmfree_jax.train.schedule import ScheduleValues

Metrics = dict[str, jax.Array]
_Init = Callable[[jax.Array], "TrainState"]


@flax.struct.dataclass
class TrainState:
    """All that a step changes.

    Attributes:
      step: int32, steps taken; it alone decides which rows come next.
      params: master weights.
      opt_state: the optimiser's.
      skipped: int32, updates skipped in a row because they were not finite.
    """

    step: jax.Array
    params: dict[str, Any]
    opt_state: optax.OptState
    skipped: jax.Array


def init_state(config: TrainConfig, optimizer: Optimizer, rng: jax.Array) -> TrainState:
    """The state before the first step. Pure: jit or eval_shape it."""
    return _first_state(optimizer, init_params(config.model, rng))


def _first_state(optimizer: Optimizer, params: dict[str, Any]) -> TrainState:
    zero = jnp.zeros((), jnp.int32)
    return TrainState(step=zero, params=params, opt_state=optimizer.init(params), skipped=zero)


def train_step(
    state: TrainState,
    batch: Batch,
    schedule: ScheduleValues,
    *,
    config: TrainConfig,
    optimizer: Optimizer,
    form: Form = "ternary",
) -> tuple[TrainState, Metrics]:
    """One optimiser step on the mean loss over the batch's predicted tokens.

    A loss or gradient that is not finite leaves parameters and optimiser as they were; what
    then becomes of the run is the loop's business.

    Args:
      state: before the step.
      batch: "tokens", "targets", "segment_ids", int32 [B, T] each.
      schedule: numbers of what changes over the run; no compiled program depends on them.
      config: of the run.
      optimizer: whose state is in `state`.
      form: of the layers that are to be ternary, which those numbers give this step.

    Returns:
      The state after it, and float32 scalars: loss (nats a token), z_loss, accuracy,
      grad_norm (before clipping), tokens (predicted), finite (1 or 0).
    """
    model = LanguageModel(config_of_form(form, config.model))
    strength = strength_at(state.step, schedule.float_steps, schedule.ternary_from)
    weights = weights_of_form(
        form, optimizer.point(state.params, state.opt_state), config.model, strength
    )

    def objective(params: dict[str, Any], batch: Batch) -> tuple[jax.Array, LossSums]:
        own = dataclasses.replace(weights, params=params)
        return loss_sums(own, batch, model=model, z_loss=config.z_loss, chunk=config.loss_chunk)

    def sums_and_grads(batch: Batch) -> tuple[LossSums, Any]:
        (_, sums), grads = jax.value_and_grad(objective, has_aux=True)(params, batch)
        return sums, grads

    params = _exchanging_in(config.optimizer.gradient_dtype, weights, config.model)
    if config.grad_accum == 1:
        sums, grads = sums_and_grads(batch)
    else:
        (sums, grads), _ = jax.lax.scan(
            lambda carry, micro: (jax.tree.map(jnp.add, carry, sums_and_grads(micro)), None),
            (LossSums(*[jnp.zeros(())] * 4), jax.tree.map(jnp.zeros_like, state.params)),
            _micro_batches(batch, config.grad_accum),
        )

    tokens = jnp.maximum(sums.tokens, 1.0)
    grad_norm = _norm(grads) / tokens
    loss = sums.loss / tokens
    finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
    params, opt_state = optimizer.update(
        grads,
        state.opt_state,
        state.params,
        schedule,
        scale=1.0 / tokens,
        norm=grad_norm,
        apply=finite,
    )
    new_state = TrainState(
        step=state.step + 1,
        params=params,
        opt_state=opt_state,
        skipped=jnp.where(finite, 0, state.skipped + 1),
    )
    metrics = {
        "loss": loss,
        "z_loss": sums.z_loss / tokens,
        "accuracy": sums.correct / tokens,
        "grad_norm": grad_norm,
        "tokens": sums.tokens,
        "finite": finite.astype(jnp.float32),
    }
    return new_state, metrics


def _exchanging_in(
    dtype: str, weights: Master | Blended | Ternary, config: ModelConfig
) -> dict[str, Any]:
    """The parameters, the matrices cast: in their dtype the sum of their gradients is exchanged.

    A cast changes no value of the forward pass: the fused program reads a ternary weight's trits
    and never the weight, and rows of the embedding go into the residual stream, whose dtype
    must be as short. Nothing is cast on one device, which exchanges nothing.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if not isinstance(weights, Ternary) or mesh.empty or mesh.size == 1:
        return weights.params

    def cast(path: tuple[Any, ...], leaf: jax.Array) -> jax.Array:
        names = tuple(key.key for key in path)
        short = names[0] == "embedding" and config.residual_dtype == dtype
        return leaf.astype(dtype) if short or is_ternary(config, names) else leaf

    return jax.tree_util.tree_map_with_path(cast, weights.params)


def _norm(tree: Any) -> jax.Array:
    """The global norm, in float32."""
    squares = [jnp.sum(jnp.square(x.astype(jnp.float32))) for x in jax.tree.leaves(tree)]
    return jnp.sqrt(functools.reduce(jnp.add, squares))


def _micro_batches(batch: Batch, count: int) -> Batch:
    """[B, T] -> [count, B / count, T], every micro-batch spread over all the batch's devices."""
    return jax.tree.map(
        lambda x: x.reshape(x.shape[0] // count, count, *x.shape[1:]).swapaxes(0, 1), batch
    )


def eval_step(params: dict[str, Any], batch: Batch, *, config: TrainConfig) -> TokenLosses:
    """The loss of each token of one batch, without gradients."""
    weights, model = training_weights(params, config.model), LanguageModel(config.model)
    return token_losses(weights, batch, model=model, chunk=config.loss_chunk)


def state_shapes(config: TrainConfig, optimizer: Optimizer) -> TrainState:
    """The shapes and dtypes of the state, without making it."""
    params = unflatten(param_shapes(config.model))
    return jax.eval_shape(functools.partial(_first_state, optimizer), params)


def abstract_state(config: TrainConfig, optimizer: Optimizer, mesh: Mesh) -> TrainState:
    """The shapes, dtypes and shardings of the state on a mesh, to read a checkpoint into."""
    shapes = state_shapes(config, optimizer)
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        shapes,
        state_shardings(mesh, shapes),
    )


def traced_config(config: TrainConfig) -> TrainConfig:
    """What the programs of a run are traced from: `config` without all that they do not depend on.

    Runs that differ in nothing else share them. A schedule's numbers are arguments of the step; an
    optimiser of the user's own may read them, and has them.
    """
    optimizer = config.optimizer
    if optimizer.factory is None:
        numbers = (
            "learning_rate",
            "warmup_steps",
            "decay_fraction",
            "min_lr_ratio",
            "second_stage_at",
            "second_stage_rate",
        )
        default = OptimizerConfig()
        optimizer = dataclasses.replace(optimizer, **{n: getattr(default, n) for n in numbers})
    return TrainConfig(
        steps=max(TrainConfig.steps, optimizer.warmup_steps + 1),
        batch_size=config.batch_size,
        grad_accum=config.grad_accum,
        z_loss=config.z_loss,
        loss_chunk=config.loss_chunk,
        model=config.model,
        data=DataConfig(seq_len=config.data.seq_len),
        optimizer=optimizer,
        mesh=config.mesh,
    )


def init_sharded(
    config: TrainConfig,
    optimizer: Optimizer,
    mesh: Mesh,
    program: Callable[[Callable[[], _Init]], _Init] = lambda make: make(),
) -> TrainState:
    """The initial state, made in place on the mesh: no device ever holds all of it.

    Args:
      config: of the run.
      optimizer: whose state it holds.
      mesh: where it lies.
      program: the program that its argument makes, or an equal one that is kept somewhere.
    """
    with jax.set_mesh(mesh):
        init = program(lambda: jit_init(config, optimizer, mesh))
        return init(jax.random.key(config.seed))


def jit_init(
    config: TrainConfig, optimizer: Optimizer, mesh: Mesh
) -> Callable[[jax.Array], TrainState]:
    """`init_state` compiled for the mesh."""
    shardings = state_shardings(mesh, state_shapes(config, optimizer))
    return jax.jit(functools.partial(init_state, config, optimizer), out_shardings=shardings)


def jit_train_step(
    config: TrainConfig, optimizer: Optimizer, mesh: Mesh, form: Form = "ternary"
) -> Callable[[TrainState, Batch, ScheduleValues], tuple[TrainState, Metrics]]:
    """`train_step` of one form compiled for the mesh; the state is donated."""
    shardings = state_shardings(mesh, state_shapes(config, optimizer))
    return jax.jit(
        functools.partial(train_step, config=config, optimizer=optimizer, form=form),
        in_shardings=(shardings, batch_sharding(mesh), NamedSharding(mesh, P())),
        out_shardings=(shardings, NamedSharding(mesh, P())),
        donate_argnums=0,
        compiler_options=_compiler_options(config, mesh),
    )


def _compiler_options(config: TrainConfig, mesh: Mesh) -> dict[str, bool] | None:
    """What the step asks of XLA.

    At large products cuBLAS is as fast as XLA's Triton kernels, and only a cuBLAS call writes a
    layer's gradient straight into the stack of all layers'. Small ones may go to either.
    """
    on_gpu = mesh.devices.flat[0].platform in ("gpu", "cuda")
    large = config.model.hidden_size >= 1024
    return {"xla_gpu_enable_triton_gemm": False} if on_gpu and large else None


def jit_eval_step(
    config: TrainConfig, mesh: Mesh
) -> Callable[[dict[str, Any], Batch], TokenLosses]:
    """`eval_step` compiled for the mesh; every process has the whole result."""
    shapes = unflatten(param_shapes(config.model))
    return jax.jit(
        functools.partial(eval_step, config=config),
        in_shardings=(param_shardings(mesh, shapes), batch_sharding(mesh)),
        out_shardings=NamedSharding(mesh, P()),
    )
