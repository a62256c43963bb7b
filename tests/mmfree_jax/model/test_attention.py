"""Causal attention: documents, groups of heads, the choice of a kernel, and its form on CUDA."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

from mmfree_jax.model import functional
from mmfree_jax.model.functional import cached_attention, causal_attention

ROWS_AND_HEADS = P(("data", "fsdp"), None, "tensor")


@dataclasses.dataclass(frozen=True)
class Device:
    """What the choice looks at."""

    platform: str = "gpu"
    compute_capability: str = "9.0"


@pytest.fixture
def on(monkeypatch):
    """Lets this process believe that it has one device of the given kind."""

    def pretend(device, count=1):
        monkeypatch.setattr(functional.jax, "devices", lambda: [device] * count)
        monkeypatch.setattr(functional.jax, "device_count", lambda: count)

    return pretend


def operands(B=2, T=12, H=4, G=2, K=8, dtype=jnp.float32):
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(B, T, n, K)), dtype) for n in (H, G, G))
    segments = jnp.asarray([[1] * 5 + [2] * 6 + [0], [1] * 12][:B], jnp.int32)
    return q, k, v, segments


def by_hand(q, k, v, segments):
    """Softmax over the places that each one sees, one row, head and place at a time."""
    B, T, H, K = q.shape
    out = np.zeros(q.shape)
    for b, t, h in np.ndindex(B, T, H):
        g = h // (H // k.shape[2])
        seen = [s for s in range(t + 1) if segments[b, s] == segments[b, t]]
        logits = np.array([q[b, t, h] @ k[b, s, g] for s in seen]) / np.sqrt(K)
        weight = np.exp(logits - logits.max())
        out[b, t, h] = weight / weight.sum() @ np.array([v[b, s, g] for s in seen])
    return out


def test_each_place_sees_its_document_up_to_itself():
    q, k, v, segments = operands()
    np.testing.assert_allclose(
        causal_attention(q, k, v, segments), by_hand(*map(np.asarray, (q, k, v, segments))),
        atol=1e-5,
    )  # fmt: skip
    one = jnp.ones_like(segments)
    np.testing.assert_allclose(
        causal_attention(q, k, v, None), causal_attention(q, k, v, one), atol=1e-6
    )


def lower_for_cuda(f, *shapes):
    return jax.jit(f).trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("documents", [True, False])
def test_cudnn_takes_forward_and_backward(monkeypatch, documents):
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)
    q, k, v, segments = operands(T=64, K=64, dtype=jnp.bfloat16, B=2)
    segments = jnp.ones((2, 64), jnp.int32) if documents else None

    def loss(q, k, v):
        out = causal_attention(q, k, v, segments, implementation="cudnn")
        return jnp.sum(out.astype(jnp.float32))

    text = lower_for_cuda(jax.value_and_grad(loss, (0, 1, 2)), q, k, v)
    name = "__cudnn$fmhaScaleBiasSoftmax" if documents else "__cudnn$fmhaSoftmax"
    assert text.count(f"@{name}(") == 1
    assert text.count(f"@{name}Backward(") == 1
    assert "CAUSAL" in text
    assert "dot_general" not in text  # nothing is left to XLA


def test_cudnn_reads_a_prompt_over_a_cache_and_xla_one_token(monkeypatch):
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)
    cache = jnp.zeros((2, 256, 2, 64), jnp.bfloat16)

    def lowered(T):
        q, k, v, _ = operands(B=2, T=T, H=4, G=2, K=64, dtype=jnp.bfloat16)
        positions = jnp.arange(T)[None] + jnp.asarray([[0], [7]])
        return lower_for_cuda(
            lambda *given: cached_attention(
                *given, positions, jnp.zeros_like(positions), implementation="cudnn"
            ),
            q, k, v, cache, cache,
        )  # fmt: skip

    prompt, token = lowered(64), lowered(1)
    assert prompt.count("@__cudnn$fmhaScaleBiasSoftmax(") == 1
    assert "dot_general" not in prompt
    assert "__cudnn" not in token


def test_on_a_mesh_each_device_attends_to_its_rows_and_heads(monkeypatch):
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)
    q, k, v, _ = operands(B=2, T=64, H=8, G=4, K=64, dtype=jnp.bfloat16)
    segments = jnp.ones((2, 64), jnp.int32)
    mesh = AbstractMesh((2, 1, 2), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)

    def attend(q, k, v):
        return causal_attention(q, k, v, segments, partition=ROWS_AND_HEADS, implementation="cudnn")

    with jax.sharding.use_abstract_mesh(mesh):
        text = lower_for_cuda(attend, q, k, v)
    (call,) = [line for line in text.splitlines() if "@__cudnn$" in line]
    types = call.rpartition(" : (")[2]
    assert types.startswith("tensor<1x64x4x64xbf16>, tensor<1x64x2x64xbf16>")


def test_cudnn_is_chosen_where_it_can(on):
    q = jnp.zeros((2, 64, 4, 64), jnp.bfloat16)
    on(Device())
    assert functional._cudnn_can(q, None)
    assert not functional._cudnn_can(q.astype(jnp.float32), None)
    assert not functional._cudnn_can(q[:, :63], None)  # odd length
    assert not functional._cudnn_can(q[..., :60], None)  # channels a head
    assert functional._cudnn_can(jnp.zeros((1, 2, 1, 256), jnp.float16), None)
    on(Device(compute_capability="8.0"))
    assert not functional._cudnn_can(jnp.zeros((1, 2, 1, 256), jnp.float16), None)
    for other in (Device("cpu"), Device("tpu"), Device(compute_capability="7.5"),
                  Device(compute_capability="gfx942")):  # fmt: skip
        on(other)
        assert not functional._cudnn_can(q, None)
    on(Device(), count=4)
    assert not functional._cudnn_can(q, None)
    assert functional._cudnn_can(q, ROWS_AND_HEADS)


def test_a_wrong_kernel_is_refused():
    q, k, v, segments = operands()
    with pytest.raises(ValueError, match="'flash' is unknown; choose xla, cudnn"):
        causal_attention(q, k, v, segments, implementation="flash")
    with pytest.raises(ValueError, match="'cudnn' with float32: it takes bfloat16"):
        causal_attention(q, k, v, segments, implementation="cudnn")
