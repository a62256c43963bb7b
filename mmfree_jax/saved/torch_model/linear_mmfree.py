"""BitLinear: ternary weights on int8 inputs, trained straight through, or stored at 2 bits.

Written by `mmfree export-hf` for `modeling_mmfree.py`. A layer computes Q8(RMSNorm(x)) @ T(W)^T:
each token's input rounded to int8, the float weight to {-1, 0, +1} times one number. The product is
one of small integers, which floats hold exactly. Gradients pass both roundings unchanged.

Shapes: K inputs, N outputs, Q = ceil(K / 4) bytes of a packed row. Apache-2.0.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .configuration_mmfree import HGRNBitConfig


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last axis; float32 out."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        """Normalises [..., size]."""
        x = x.float()
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        return x * torch.rsqrt(length.square() / x.shape[-1] + self.eps) * self.weight.float()


# From so many rows on, products of small integers are quicker as such on these CPUs.
_INT8_ROWS = 32
_HAS_INT8 = (
    hasattr(torch, "_int_mm")
    and torch.backends.mkldnn.is_available()
    and torch.backends.cpu.get_cpu_capability() == "AVX512"
)


def _product(q: Tensor, trits: Tensor) -> Tensor:
    """q @ trits^T in float32, exact, for whole numbers [..., K] up to 128 and trits [N, K]."""
    rows = q.flatten(0, -2)
    if _HAS_INT8 and q.device.type == "cpu" and len(rows) >= _INT8_ROWS:
        y = torch._int_mm(rows.to(torch.int8), trits.to(torch.int8).T)
        return y.view(*q.shape[:-1], -1).float()
    if trits.dtype == torch.float16:  # whose largest number is 65504
        return F.linear((q / 128).half(), trits).float() * 128
    return F.linear(q.to(trits.dtype), trits).float()


class _TernaryProduct(torch.autograd.Function):
    """Q8(x) @ (trits * scale)^T, whose gradients pass the rounding of x and of W unchanged."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, trits: Tensor, scale: Tensor) -> Tensor:
        """[..., N] float32.

        Args:
          ctx: of autograd.
          x: [..., K] float32.
          weight: [N, K], gets the gradient and is not read; None: there is none.
          trits: [N, K] in the dtype of the product.
          scale: float32, one number.
        """
        absmax = torch.maximum(x.amax(-1, keepdim=True), -x.amin(-1, keepdim=True)).clamp_(min=1e-5)
        q = (x * (127.0 / absmax)).round_()
        x_scale = absmax / 127.0
        if any(ctx.needs_input_grad):
            kept = (q.to(torch.int8), x_scale) if ctx.needs_input_grad[1] else (None, None)
            ctx.save_for_backward(*kept, trits.to(torch.int8), scale)
            ctx.dtypes = trits.dtype, None if weight is None else weight.dtype
        return _product(q, trits).mul_(x_scale * scale)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x and of the weight."""
        q, x_scale, trits, scale = ctx.saved_tensors
        dtype, weight_dtype = ctx.dtypes
        dx = dweight = None
        if ctx.needs_input_grad[0]:
            dx = ((dy * scale).to(dtype) @ trits.to(dtype)).float()
        if q is not None:
            rows = dy.flatten(0, -2).to(dtype)
            inputs = (q * x_scale).flatten(0, -2).to(dtype)
            dweight = (rows.T @ inputs).to(weight_dtype)
        return dx, dweight, None, None


def _product_dtype(weight: Tensor) -> torch.dtype:
    """What products are computed in: the weights' dtype, or autocast's."""
    device = weight.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype


class BitLinear(nn.Linear):
    """A linear layer without bias that ternarises its weight, behind an RMSNorm of its own."""

    def __init__(self, in_features: int, out_features: int, config: HGRNBitConfig) -> None:
        super().__init__(in_features, out_features, bias=False)
        self.norm = RMSNorm(in_features, getattr(config, "linear_norm_eps", 1e-6))
        # The weight that was ternarised last, its version, and its trits and scale.
        self._kept: tuple[Tensor, int, Tensor, Tensor] | None = None

    def forget(self) -> None:
        """Drops the trits: the weight may have changed unseen, by its `.data`."""
        self._kept = None

    def train(self, mode: bool = True) -> "BitLinear":
        """Forgets the trits too."""
        self.forget()
        return super().train(mode)

    def ternary(self) -> tuple[Tensor, Tensor]:
        """Trits [N, K] in the dtype of the product, and their scale in float32.

        Without gradients, in evaluation, they are kept: a model that writes a text ternarises once,
        and anew for the next one (`forget`).
        """
        weight, dtype = self.weight, _product_dtype(self.weight)
        keeps = not (self.training or torch.is_grad_enabled() or weight.is_inference())
        if keeps and self._kept is not None:
            of, version, trits, scale = self._kept
            same = of is weight and version == weight._version
            if same and (trits.dtype, trits.device) == (dtype, weight.device):
                return trits, scale
        with torch.no_grad():
            scale = weight.abs().mean(dtype=torch.float32).clamp(min=1e-5)
            trits = (weight * (1.0 / scale)).round_().clamp_(-1, 1).to(dtype)
        self._kept = (weight, weight._version, trits, scale) if keeps else None
        return trits, scale

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] -> [..., N] in the weight's dtype."""
        x = self.norm(x)
        return _TernaryProduct.apply(x, self.weight, *self.ternary()).to(self.weight.dtype)


class PackedBitLinear(nn.Module):
    """A BitLinear whose weight is stored at 2 bits, and is not trained.

    Buffers: `packed` [N, ceil(K / 4)] uint8, whose byte k has the trits of columns k, k + Q, k + 2Q
    and k + 3Q, plus one, from its lowest two bits on (Q bytes a row); `scale` [1].
    """

    def __init__(self, in_features: int, out_features: int, config: HGRNBitConfig) -> None:
        super().__init__()
        self.in_features = in_features
        self.norm = RMSNorm(in_features, getattr(config, "linear_norm_eps", 1e-6))
        size = (out_features, -(-in_features // 4))
        self.register_buffer("packed", torch.zeros(size, dtype=torch.uint8))
        self.register_buffer("scale", torch.ones(1))
        # What was unpacked last, its version, and its trits.
        self._kept: tuple[Tensor, int, Tensor] | None = None

    def trits(self) -> Tensor:
        """[N, K] in the dtype of the product, unpacked when first asked for."""
        dtype, packed = _product_dtype(self.norm.weight), self.packed
        keeps = not packed.is_inference()  # which has no version
        if keeps and self._kept is not None:
            of, version, trits = self._kept
            same = of is packed and version == packed._version
            if same and (trits.dtype, trits.device) == (dtype, packed.device):
                return trits
        planes = [(packed >> shift & 3).to(torch.int8) - 1 for shift in (0, 2, 4, 6)]
        trits = torch.cat(planes, dim=1)[:, : self.in_features].to(dtype)
        self._kept = (packed, packed._version, trits) if keeps else None
        return trits

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] -> [..., N] in the norm's dtype."""
        scale = self.scale.float()
        y = _TernaryProduct.apply(self.norm(x), None, self.trits(), scale)
        return y.to(self.norm.weight.dtype)


def bit_linear(in_features: int, out_features: int, config: HGRNBitConfig) -> nn.Module:
    """A linear layer in the form that the config says."""
    kind = PackedBitLinear if config.packed else BitLinear
    return kind(in_features, out_features, config)


def forget_trits(model: nn.Module) -> None:
    """Lets the layers of a model ternarise again."""
    for module in model.modules():
        if isinstance(module, BitLinear):
            module.forget()
