"""The PyTorch code that is exported beside a MatMul-free model, so that transformers can load it.

It lies in `torch_model/`, imports torch and transformers and nothing of ours, and is never imported
here: `tests/interop_torch` runs it.
"""

import shutil
from pathlib import Path

_SOURCES = Path(__file__).parent / "torch_model"


def auto_map(*, packed: bool) -> dict[str, str]:
    """The field of config.json by which transformers finds the classes.

    Args:
      packed: the weights are stored at 2 bits.
    """
    kind = "HGRNBitPacked" if packed else "HGRNBit"
    return {
        "AutoConfig": f"configuration_mmfree.{kind}Config",
        "AutoModel": f"modeling_mmfree.{kind}Model",
        "AutoModelForCausalLM": f"modeling_mmfree.{kind}ForCausalLM",
    }


def write_code(folder: Path) -> None:
    """Puts the modules into the folder of a model."""
    for source in sorted(_SOURCES.glob("*.py")):
        shutil.copyfile(source, folder / source.name)
