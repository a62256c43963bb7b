"""The type of what a Pallas kernel is given."""

from typing import Any, TypeAlias

# An array in memory, as a kernel sees it: `ref[...]`, `ref.at[...]`, `ref.shape`, `ref.dtype`.
# Pallas gives no public type that the checkers know.
Ref: TypeAlias = Any
