"""The recurrence by chunks, the short convolutions beside it, and the state of a whole model.

Written by `mmfree export-hf` for `modeling_mmfree.py`. Shapes: B rows, T tokens, E channels of the
state, W tokens that a convolution sees. Apache-2.0.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Time steps that are computed one after the other, in all chunks at once.
CHUNK = 16


class HGRNBitState:
    """What a model remembers of the tokens that it has read: as much after one as after a million.

    Attributes:
      layers: for each layer its recurrent state "h" [B, E] and the last inputs of its convolutions
        [B, W - 1, channels], by their names; all float32. Empty before the first token.
      seen: tokens read, padding included.
    """

    # What `generate` asks of a cache.
    is_linear = (True,)
    is_compileable = False
    is_croppable = False

    def __init__(self, num_layers: int) -> None:
        self.layers: list[dict[str, Tensor]] = [{} for _ in range(num_layers)]
        self.seen = 0

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens read, padding included."""
        return self.seen

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps these rows, in this order."""
        for layer in self.layers:
            for name, value in layer.items():
                layer[name] = value.index_select(0, indices.to(value.device))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """The rows that a beam search goes on from."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row so many times."""
        for layer in self.layers:
            for name, value in layer.items():
                layer[name] = value.repeat_interleave(repeats, dim=0)


def scan(decay: Tensor, inputs: Tensor, state: Tensor) -> Tensor:
    """h_t = decay_t h_{t-1} + inputs_t, in chunks whose steps are taken together.

    Args:
      decay: [B, T, E] float32, between 0 and 1.
      inputs: [B, T, E] float32.
      state: [B, E], before the first step.

    Returns:
      [B, T, E], the state after every step.
    """
    batch, length, size = inputs.shape
    if length <= CHUNK:
        states = torch.empty_like(inputs)
        for t in range(length):
            state = torch.addcmul(inputs[:, t], decay[:, t], state, out=states[:, t])
        return states
    padding = (0, 0, 0, -length % CHUNK)
    decay = F.pad(decay, padding).view(batch, -1, CHUNK, size)
    inputs = F.pad(inputs, padding).view(batch, -1, CHUNK, size)
    # Within each chunk: the states if it began at zero, and the share of its start that is left.
    states, left = inputs.clone(), decay.clone()
    for t in range(1, CHUNK):
        states[:, :, t].addcmul_(decay[:, :, t], states[:, :, t - 1])
        left[:, :, t].mul_(left[:, :, t - 1])
    ends = scan(left[:, :, -1], states[:, :, -1], state)
    starts = torch.cat([state[:, None], ends[:, :-1]], dim=1)
    states.addcmul_(left, starts[:, :, None])
    return states.view(batch, -1, size)[:, :length]


class Recurrence(torch.autograd.Function):
    """`scan` with its gradient, the same scan backwards in time."""

    @staticmethod
    def forward(ctx: Any, decay: Tensor, inputs: Tensor, state: Tensor) -> Tensor:
        """As `scan`."""
        states = scan(decay, inputs, state)
        ctx.save_for_backward(decay, states, state)
        return states

    @staticmethod
    def backward(ctx: Any, dstates: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """g_t = dh_t + decay_{t+1} g_{t+1}: gradients of decay, inputs and state."""
        decay, states, state = ctx.saved_tensors
        following = torch.cat([decay[:, 1:], torch.zeros_like(decay[:, :1])], dim=1)
        g = scan(following.flip(1), dstates.flip(1), torch.zeros_like(state)).flip(1)
        previous = torch.cat([state[:, None], states[:, :-1]], dim=1)
        return g * previous, g, g[:, 0] * decay[:, 0]


class ShortConvolution(nn.Module):
    """silu of a causal convolution over each channel."""

    def __init__(self, channels: int, length: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, 1, length))

    def forward(
        self, x: Tensor, mask: Tensor | None, history: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Convolves.

        Args:
          x: [B, T, channels].
          mask: [B, T], 0 on padding.
          history: [B, W - 1, channels], the inputs before the first; None: zeros.

        Returns:
          [B, T, channels] float32, and the inputs before the next one.
        """
        x = x.float() if mask is None else x.float() * mask[..., None]
        batch, length, channels = x.shape
        before = self.weight.shape[-1] - 1
        if history is None:
            history = x.new_zeros(batch, before, channels)
        x = torch.cat([history, x], dim=1)
        y = F.conv1d(x.mT, self.weight.float(), groups=channels).mT
        if mask is None:
            return F.silu(y), x[:, length:]
        # After the last token that is not padding.
        ends = (mask * torch.arange(1, length + 1, device=mask.device)).amax(1).long()
        places = ends[:, None] + torch.arange(before, device=mask.device)
        return F.silu(y), x.gather(1, places[..., None].expand(-1, -1, channels))


class UncalledConvolution(nn.Module):
    """A tensor that the authors' module has and never reads, kept so that theirs finds it."""

    def __init__(self, channels: int, length: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.zeros(channels, 1, length))
