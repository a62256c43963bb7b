"""What is installed: versions, and what packages declare for others to find."""

import platform
import tomllib
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

DISTRIBUTION = "mmfree-jax"


def versions(*packages: str) -> dict[str, str | None]:
    """Versions of Python and of `packages`; None for those that are not here."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in packages:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def own_version() -> str:
    """The installed version of this package, or the checkout's."""
    return versions(DISTRIBUTION)[DISTRIBUTION] or _checkout()["version"]


def entry_points(group: str) -> dict[str, str]:
    """Name of each entry point of a group and where it is: `module:attribute`.

    For a checkout that is not installed they are read from its pyproject.toml.
    """
    found = {e.name: e.value for e in metadata.entry_points(group=group)}
    return dict(sorted((found or _checkout().get("entry-points", {}).get(group, {})).items()))


def load(target: str) -> Any:
    """What `module:attribute` names."""
    module, _, attribute = target.partition(":")
    return getattr(import_module(module), attribute)


def _checkout() -> dict[str, Any]:
    """The table `project` of a checkout's pyproject.toml; empty where there is none."""
    path = Path(__file__).resolve().parents[1] / "pyproject.toml"
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))["project"]
    except (OSError, KeyError):
        return {}
