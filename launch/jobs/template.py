"""Templates of job files: filled in, and read once by what will read them later."""

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

from mmfree_jax.errors import ConfigError

_TEMPLATES = Path(__file__).parents[1] / "templates"


def fill(name: str, values: dict[str, Any]) -> str:
    """A template with `values` in its places."""
    text = (_TEMPLATES / name).read_text(encoding="utf-8")
    return re.sub(r"@\{(\w+)\}", lambda match: str(values[match[1]]), text)


def check_script(text: str) -> None:
    """Has bash read a script without running it.

    Raises:
      ConfigError: it is not a valid script, which `setup` alone can make it.
    """
    bash = shutil.which("bash")
    if bash is None:
        return
    done = subprocess.run([bash, "-n"], input=text.encode(), capture_output=True)
    if done.returncode:
        reason = " ".join(done.stderr.decode(errors="replace").split())
        raise ConfigError(f"the rendered script is not valid: {reason}; see the value of setup")
