"""MatMul-free language models in JAX. Names are imported when they are first used."""

from typing import TYPE_CHECKING

from mmfree_jax.lazy_names import lazy_names

if TYPE_CHECKING:
    from mmfree_jax.config import (
        CheckpointConfig,
        DataConfig,
        EvalConfig,
        LogConfig,
        MeshConfig,
        OptimizerConfig,
        TrainConfig,
    )
    from mmfree_jax.data.tokenizer import load_tokenizer
    from mmfree_jax.errors import MMFreeError
    from mmfree_jax.infer import generate, generate_text
    from mmfree_jax.model import LanguageModel
    from mmfree_jax.model_config import LinearConfig, ModelConfig
    from mmfree_jax.presets import preset
    from mmfree_jax.saved.convert import export_hf, import_hf
    from mmfree_jax.saved.open_model import open_model
    from mmfree_jax.saved.pack import pack
    from mmfree_jax.saved.pretrained import load_pretrained, save_pretrained

__all__ = [
    "CheckpointConfig",
    "DataConfig",
    "EvalConfig",
    "LanguageModel",
    "LinearConfig",
    "LogConfig",
    "MMFreeError",
    "MeshConfig",
    "ModelConfig",
    "OptimizerConfig",
    "TrainConfig",
    "export_hf",
    "generate",
    "generate_text",
    "import_hf",
    "load_pretrained",
    "load_tokenizer",
    "open_model",
    "pack",
    "preset",
    "save_pretrained",
]

_NAMES = {
    "mmfree_jax.config": (
        "CheckpointConfig DataConfig EvalConfig LogConfig MeshConfig OptimizerConfig TrainConfig"
    ),
    "mmfree_jax.data.tokenizer": "load_tokenizer",
    "mmfree_jax.errors": "MMFreeError",
    "mmfree_jax.infer": "generate generate_text",
    "mmfree_jax.model": "LanguageModel",
    "mmfree_jax.model_config": "LinearConfig ModelConfig",
    "mmfree_jax.presets": "preset",
    "mmfree_jax.saved.convert": "export_hf import_hf",
    "mmfree_jax.saved.open_model": "open_model",
    "mmfree_jax.saved.pack": "pack",
    "mmfree_jax.saved.pretrained": "load_pretrained save_pretrained",
}
__getattr__, __dir__ = lazy_names(__name__, _NAMES)
