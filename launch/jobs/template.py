"""Templates of job files: filled in, and read once by what will read them later."""

import json
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


def one_line_yaml(value: Any) -> str:
    """A value in one line of YAML: JSON, but for characters that the two do not write alike.

    JSON's escapes of characters beyond U+FFFF are two surrogates, which no YAML parser joins; and
    YAML takes some others, which JSON leaves alone, for the ends of lines.
    """
    text = json.dumps(value, ensure_ascii=False)
    return re.sub(
        "[\x7f-\x9f\u2028\u2029\ufeff\ufffe\uffff]", lambda match: f"\\u{ord(match[0]):04x}", text
    )


def without_empty(text: str) -> str:
    """YAML without the lines that give a field nothing."""
    return re.sub(r"^ *[\w-]+: (null|\[\]|\{\})\n", "", text, flags=re.MULTILINE)
