"""The reference of the library: what is public, and a directive for each name of it."""

import ast
import inspect
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

KERNELS = Path(__file__).resolve().parents[2] / "pallas_kernels"
PUBLIC = (
    "mmfree_jax",
    "mmfree_jax.model",
    "mmfree_jax.model.mixer",
    "mmfree_jax.data",
    "mmfree_jax.train",
    "mmfree_jax.infer",
    "mmfree_jax.evaluate",
    "mmfree_jax.experiments.scaling",
    "mmfree_jax.experiments.scaling.gap",
    "mmfree_jax.experiments.scaling.paper",
    "mmfree_jax.experiments.sweep",
    *(
        f"mmfree_jax.pallas_kernels.{door.parent.name}.api"
        for door in sorted(KERNELS.glob("*/api.py"))
    ),
)
"""The modules whose `__all__` is public; a name that two have is documented with the first."""


def names(module: str) -> list[str]:
    """The public names of a module, sorted without regard to case."""
    return sorted(import_module(module).__all__, key=str.lower)


def home(module: str, name: str) -> str:
    """The module that the reference documents `name` of `module` in."""
    value = getattr(import_module(module), name)
    if callable(value):
        for other in PUBLIC[: PUBLIC.index(module)]:
            package = import_module(other)
            if name in package.__all__ and getattr(package, name) is value:
                return other
    return module


def docstring(module: str, name: str) -> str:
    """The docstring of a function or class; of anything else the string under it, or ""."""
    value = getattr(import_module(module), name)
    if callable(value):
        return value.__doc__ or ""
    return _below(import_module(module), name)


def _below(module: ModuleType, name: str) -> str:
    """The string under an assignment to `name`, or under the one that it was imported from."""
    body = ast.parse(inspect.getsource(module)).body
    for node, text in zip(body, [*body[1:], None], strict=True):
        if isinstance(node, ast.ImportFrom) and name in {alias.name for alias in node.names}:
            dots = "." * node.level
            return _below(import_module(f"{dots}{node.module}", module.__package__), name)
        targets = node.targets if isinstance(node, ast.Assign) else []
        if isinstance(node, ast.AnnAssign):
            targets = [node.target]
        if [target.id for target in targets if isinstance(target, ast.Name)] == [name]:
            is_text = isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant)
            return inspect.cleandoc(str(text.value.value)) if is_text else ""
    return ""


def markdown(module: str) -> str:
    """The directives of all public names of a module that have their home there."""
    own = [name for name in names(module) if home(module, name) == module]
    lines = [".. autosummary::", "", *(f"   {module}.{name}" for name in own), ""]
    for name in own:
        lines += [*directive(module, name), ""]
    elsewhere = [
        f"[{name}](#{home(module, name)}.{name})" for name in names(module) if name not in own
    ]
    text = "```{eval-rst}\n" + "\n".join(lines) + "\n```"
    return text if not elsewhere else f"{text}\n\nAlso here: {', '.join(elsewhere)}."


def kernels() -> str:
    """A heading for each op, and its names."""
    doors = [module for module in PUBLIC if ".pallas_kernels." in module]
    return "\n\n".join(f"## {door.split('.')[-2]}\n\n{markdown(door)}" for door in doors)


def directive(module: str, name: str) -> list[str]:
    """The reStructuredText that documents one name."""
    value: Any = getattr(sys.modules[module], name)
    if inspect.isclass(value):
        return [f".. autoclass:: {module}.{name}", "   :members:"]
    if callable(value):
        return [f".. autofunction:: {module}.{name}"]
    text = docstring(module, name).replace("\n", "\n   ")
    shown = repr(value)
    told = [] if len(shown) > 80 else [f"   :value: {shown}"]
    return [f".. py:data:: {module}.{name}", *told, "", f"   {text}"]
