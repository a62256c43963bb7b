"""MatMul-free language models in JAX. Names are imported when they are first used."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmfree_jax.config import TrainConfig
    from mmfree_jax.data.tokenizer import load_tokenizer
    from mmfree_jax.errors import MMFreeError
    from mmfree_jax.infer import generate, generate_text
    from mmfree_jax.model import LanguageModel
    from mmfree_jax.model_config import ModelConfig
    from mmfree_jax.presets import preset
    from mmfree_jax.saved.convert import export_hf, import_hf
    from mmfree_jax.saved.pretrained import load_pretrained

_NAMES = {
    "LanguageModel": "mmfree_jax.model",
    "MMFreeError": "mmfree_jax.errors",
    "ModelConfig": "mmfree_jax.model_config",
    "TrainConfig": "mmfree_jax.config",
    "export_hf": "mmfree_jax.saved.convert",
    "generate": "mmfree_jax.infer",
    "generate_text": "mmfree_jax.infer",
    "import_hf": "mmfree_jax.saved.convert",
    "load_pretrained": "mmfree_jax.saved.pretrained",
    "load_tokenizer": "mmfree_jax.data.tokenizer",
    "preset": "mmfree_jax.presets",
}

__all__ = [
    "LanguageModel",
    "MMFreeError",
    "ModelConfig",
    "TrainConfig",
    "export_hf",
    "generate",
    "generate_text",
    "import_hf",
    "load_pretrained",
    "load_tokenizer",
    "preset",
]


def __getattr__(name: str) -> Any:
    if name not in _NAMES:
        raise AttributeError(f"module 'mmfree_jax' has no attribute {name!r}")
    value = getattr(import_module(_NAMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_NAMES})
