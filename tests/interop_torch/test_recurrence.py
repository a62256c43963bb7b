"""The chunked recurrence of the exported code against its definition, one step at a time."""

import importlib.util
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed: run make torch")

from mmfree_jax.saved import remote_code  # noqa: E402


@pytest.fixture(scope="module")
def recurrence():
    file = Path(remote_code.__file__).parent / "torch_model" / "recurrence_mmfree.py"
    spec = importlib.util.spec_from_file_location("recurrence_mmfree", file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def drawn(length, *, leaves=False):
    torch.manual_seed(length)
    decay = torch.rand(2, length, 3, dtype=torch.float64)
    # Closed and open gates, and whole stretches that leave the state as it is.
    decay[:, ::5], decay[:, 1::7], decay[1, : length // 2] = 0.0, 1.0, 1.0
    inputs = torch.randn(2, length, 3, dtype=torch.float64)
    state = torch.randn(2, 3, dtype=torch.float64)
    return [x.requires_grad_(leaves) for x in (decay, inputs, state)]


def steps(decay, inputs, state):
    states = []
    for t in range(inputs.shape[1]):
        state = decay[:, t] * state + inputs[:, t]
        states.append(state)
    return torch.stack(states, dim=1)


@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 31, 33, 256, 257, 300, 4113])
def test_chunks_give_the_states_of_single_steps(recurrence, length):
    given = drawn(length)
    torch.testing.assert_close(recurrence.scan(*given), steps(*given), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("length", [1, 16, 40, 300])
def test_its_gradients_are_those_of_single_steps(recurrence, length):
    weight = torch.randn(2, length, 3, dtype=torch.float64)
    mine, theirs = drawn(length, leaves=True), drawn(length, leaves=True)
    (recurrence.Recurrence.apply(*mine) * weight).sum().backward()
    (steps(*theirs) * weight).sum().backward()
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-10, atol=1e-10)
