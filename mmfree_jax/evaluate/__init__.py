"""How good a model is: held-out loss, and accuracy on tasks.

Names are imported when they are first used.
"""

from typing import TYPE_CHECKING

from mmfree_jax.lazy_names import lazy_names

if TYPE_CHECKING:
    from mmfree_jax.evaluate.encoding import encode_pair
    from mmfree_jax.evaluate.perplexity import HeldOut, Interval, evaluate_held_out
    from mmfree_jax.evaluate.scoring import Query, Score, Scorer
    from mmfree_jax.evaluate.task_accuracy import evaluate_tasks

__all__ = [
    "HeldOut",
    "Interval",
    "Query",
    "Score",
    "Scorer",
    "encode_pair",
    "evaluate_held_out",
    "evaluate_tasks",
]

_NAMES = {
    "mmfree_jax.evaluate.encoding": "encode_pair",
    "mmfree_jax.evaluate.perplexity": "HeldOut Interval evaluate_held_out",
    "mmfree_jax.evaluate.scoring": "Query Score Scorer",
    "mmfree_jax.evaluate.task_accuracy": "evaluate_tasks",
}
__getattr__, __dir__ = lazy_names(__name__, _NAMES)
