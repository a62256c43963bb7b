"""Training: the step, the loop around it, and what they leave on disk.

The names here are what a training loop of one's own is made of; they are imported when they are
first used.
"""

from typing import TYPE_CHECKING

from mmfree_jax.lazy_names import lazy_names

if TYPE_CHECKING:
    from mmfree_jax.figures import show_late
    from mmfree_jax.parallel.sharding import make_mesh
    from mmfree_jax.train.flops import count_flops, count_parameters
    from mmfree_jax.train.loss import LossSums, TokenLosses, loss_sums, token_losses
    from mmfree_jax.train.metric_series import RunMetrics, read_metrics
    from mmfree_jax.train.optimizer import Optimizer, make_optimizer
    from mmfree_jax.train.plot import draw_metrics
    from mmfree_jax.train.schedule import (
        ScheduleValues,
        learning_rate,
        make_schedule,
        schedule_values,
    )
    from mmfree_jax.train.step import (
        TrainState,
        eval_step,
        init_sharded,
        init_state,
        jit_eval_step,
        jit_train_step,
        train_step,
    )
    from mmfree_jax.train.training import train

__all__ = [
    "LossSums",
    "Optimizer",
    "RunMetrics",
    "ScheduleValues",
    "TokenLosses",
    "TrainState",
    "count_flops",
    "count_parameters",
    "draw_metrics",
    "eval_step",
    "init_sharded",
    "init_state",
    "jit_eval_step",
    "jit_train_step",
    "learning_rate",
    "loss_sums",
    "make_mesh",
    "make_optimizer",
    "make_schedule",
    "read_metrics",
    "schedule_values",
    "show_late",
    "token_losses",
    "train",
    "train_step",
]

_NAMES = {
    "mmfree_jax.figures": "show_late",
    "mmfree_jax.parallel.sharding": "make_mesh",
    "mmfree_jax.train.flops": "count_flops count_parameters",
    "mmfree_jax.train.loss": "LossSums TokenLosses loss_sums token_losses",
    "mmfree_jax.train.metric_series": "RunMetrics read_metrics",
    "mmfree_jax.train.optimizer": "Optimizer make_optimizer",
    "mmfree_jax.train.plot": "draw_metrics",
    "mmfree_jax.train.schedule": "ScheduleValues learning_rate make_schedule schedule_values",
    "mmfree_jax.train.step": (
        "TrainState eval_step init_sharded init_state jit_eval_step jit_train_step train_step"
    ),
    "mmfree_jax.train.training": "train",
}
__getattr__, __dir__ = lazy_names(__name__, _NAMES)
