"""`mmfree completion`."""

from pathlib import Path
from typing import Annotated, Literal

import tyro

_SHELLS = Path(__file__).parent / "shells"


def completion(shell: Annotated[Literal["bash", "zsh", "fish"], tyro.conf.Positional]) -> int:
    """Print the completion of mmfree for a shell: commands, options, their values, files.

    Args:
      shell: The shell.
    """
    from mmfree_jax.cli.main import commands  # which imports this module by its name

    names = sorted(commands())
    joined = {
        "bash": "\\n".join(names),
        "zsh": "\n".join(names),
        "fish": " ".join(f"'{name}'" for name in names),
    }
    text = (_SHELLS / shell).read_text(encoding="utf-8")
    print(text.replace("@COMMANDS@", joined[shell]), end="")
    return 0
