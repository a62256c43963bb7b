"""What is installed: versions, optional packages, and what packages declare for others to find."""

import platform
import shlex
import tomllib
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

from mmfree_jax.errors import ConfigError

DISTRIBUTION = "mmfree-jax"
_ROOT = Path(__file__).resolve().parents[1]


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


def install_command(extra: str) -> str:
    """What to type for an extra of this package, in any folder.

    The package is on no index, so that pip finds it by its folder only. An installed wheel's
    folder is gone: there the extra's own packages are named, which are on the index.
    """
    if _checkout():
        return f"pip install -e {shlex.quote(f'{_ROOT}[{extra}]')}"
    declared = (line.partition(";") for line in metadata.requires(DISTRIBUTION) or ())
    wanted = [name.strip() for name, _, when in declared if f"extra == '{extra}'" in when]
    return shlex.join(["pip", "install", *wanted])


def import_optional(module: str, purpose: str, install: str) -> Any:
    """Imports a package that may be absent.

    Args:
      module: its import name.
      purpose: what needs it; the message begins with it.
      install: the command that installs it.

    Raises:
      ConfigError: it is not installed; or it is, and its import fails, told as it is.
    """
    try:
        found = import_module(module)
    except Exception as e:  # a package that does not suit the others here raises any kind
        if not (isinstance(e, ModuleNotFoundError) and e.name == module):
            reason = " ".join(f"{type(e).__name__}: {e}".split())
            raise ConfigError(
                f"{purpose} needs {module}, which is installed but cannot be imported ({reason}): "
                f"run pip install --force-reinstall {module}"
            ) from e
    else:
        if getattr(found, "__file__", None):  # else a folder that happens to have the name
            return found
    raise ConfigError(f"{purpose} needs {module}, which is not installed: run {install}")


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


def load_own(field: str, target: str, kind: str) -> Any:
    """What a setting of a user's own code, `module:attribute`, names.

    Args:
      field: the setting and its value; the message begins with it.
      target: the value.
      kind: of what it is to be, "a function".

    Raises:
      ConfigError: the module is not found or its import fails, or it has no such attribute.
    """
    module, _, attribute = target.partition(":")
    try:
        found = import_module(module)
    except Exception as e:  # a user's module raises any kind
        kind_of_error = "" if isinstance(e, ImportError) else f"{type(e).__name__}: "
        reason = " ".join(f"{kind_of_error}{e}".split())
        raise ConfigError(
            f"{field}: {module} cannot be imported ({reason}); set it to MODULE:NAME of a module "
            "on $PYTHONPATH"
        ) from e
    if not hasattr(found, attribute):
        raise ConfigError(f"{field}: {module} has no {attribute}; name {kind} of it")
    return getattr(found, attribute)


def _checkout() -> dict[str, Any]:
    """The table `project` of a checkout's pyproject.toml; empty where there is none."""
    try:
        return tomllib.loads((_ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    except (OSError, KeyError):
        return {}
