"""lm-eval's view of an oracle model."""

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from mmfree_jax.evaluate.harness import HarnessModel


@pytest.fixture(scope="package")
def adapter() -> "HarnessModel":
    """The oracle model, as lm-eval asks it."""
    from bigram_oracle import make_adapter  # imports lm-eval, which not all tests here need

    return make_adapter()
