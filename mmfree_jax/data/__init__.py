"""From text to batches. Names are imported when they are first used."""

from typing import TYPE_CHECKING

from mmfree_jax.lazy_names import lazy_names

if TYPE_CHECKING:
    from mmfree_jax.data.dataset import TokenDataset, open_dataset
    from mmfree_jax.data.pipeline import EvalBatches, make_eval_batches, make_train_iterator
    from mmfree_jax.data.prepare import PrepareConfig, prepare_dataset
    from mmfree_jax.data.tokenizer import ByteTokenizer, Tokenizer, load_tokenizer

__all__ = [
    "ByteTokenizer",
    "EvalBatches",
    "PrepareConfig",
    "TokenDataset",
    "Tokenizer",
    "load_tokenizer",
    "make_eval_batches",
    "make_train_iterator",
    "open_dataset",
    "prepare_dataset",
]

_NAMES = {
    "mmfree_jax.data.dataset": "TokenDataset open_dataset",
    "mmfree_jax.data.pipeline": "EvalBatches make_eval_batches make_train_iterator",
    "mmfree_jax.data.prepare": "PrepareConfig prepare_dataset",
    "mmfree_jax.data.tokenizer": "ByteTokenizer Tokenizer load_tokenizer",
}
__getattr__, __dir__ = lazy_names(__name__, _NAMES)
