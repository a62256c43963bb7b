"""MatMul-free language models (arXiv 2406.02528) in plain PyTorch, for transformers.

Written by `mmfree export-hf` beside a model's weights:
`AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)` loads it, on CPUs and GPUs,
with PyTorch 2.4 or newer and transformers 4.48 or newer. Parameters have the names that the paper's
authors gave them. Apache-2.0.

Shapes: B rows, T tokens, D channels of the residual stream, E of the recurrent state, V vocabulary.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from .checks_mmfree import OTHERS, check_others, check_state, token_mask
from .configuration_mmfree import HGRNBitConfig, HGRNBitPackedConfig
from .linear_mmfree import BitLinear, RMSNorm, bit_linear, forget_trits
from .recurrence_mmfree import HGRNBitState, Recurrence, ShortConvolution, UncalledConvolution

# transformers renamed the recurrent state in its outputs.
_STATE = next(
    field.name
    for field in dataclasses.fields(CausalLMOutputWithPast)
    if field.name in ("past_key_values", "cache")
)
_TIED: Any = {"lm_head.weight": "model.embeddings.weight"}
if int(transformers.__version__.partition(".")[0]) < 5:
    _TIED = list(_TIED)


class HGRNBitAttention(nn.Module):
    """The token mixer: h_t = F_t h_{t-1} + (1 - F_t) silu(i_t); out = o(RMSNorm(g) silu(h))."""

    def __init__(self, config: HGRNBitConfig) -> None:
        super().__init__()
        width, inner = config.hidden_size, config.state_size
        self.i_proj = bit_linear(width, inner, config)
        self.f_proj = bit_linear(width, inner, config)
        self.g_proj = bit_linear(width, inner, config)
        self.g_norm = RMSNorm(inner, config.rms_norm_eps)
        self.o_proj = bit_linear(inner, width, config)
        self.is_shared = config.use_short_conv and config.share_conv_kernel
        self.is_separate = config.use_short_conv and not config.share_conv_kernel
        if self.is_shared:
            self.h_conv1d = ShortConvolution(width, config.conv_size)
        if self.is_separate:
            self.q_conv1d = UncalledConvolution(inner, config.conv_size)
            self.i_conv1d = ShortConvolution(inner, config.conv_size)
            self.f_conv1d = ShortConvolution(inner, config.conv_size)

    def forward(
        self, x: Tensor, bound: Tensor | None, mask: Tensor | None, state: dict[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Mixes.

        Args:
          x: [B, T, D], normalised.
          bound: [E], the least value of the forget gate; None: 0.
          mask: [B, T] float32, 0 on padding, which leaves the state as it is.
          state: of the layer, see `HGRNBitState`; empty: start at zero.

        Returns:
          [B, T, D] and the state after the last token.
        """
        after: dict[str, Tensor] = {}
        if self.is_shared:
            x, after["h_conv1d"] = self.h_conv1d(x, mask, state.get("h_conv1d"))
        i, f, g = self.i_proj(x), self.f_proj(x), self.g_proj(x)
        if self.is_separate:
            i, after["i_conv1d"] = self.i_conv1d(i, mask, state.get("i_conv1d"))
            f, after["f_conv1d"] = self.f_conv1d(f, mask, state.get("f_conv1d"))
        # 1 - F, without cancellation where F is near 1.
        opened = torch.sigmoid(-f.float())
        if bound is not None:
            opened = (1 - bound.to(opened.device)) * opened
        if mask is not None:
            opened = opened * mask[..., None]
        start = state.get("h")
        if start is None:
            start = opened.new_zeros(opened[:, 0].shape)
        states = Recurrence.apply(1 - opened, F.silu(i.float()) * opened, start)
        after["h"] = states[:, -1]
        return self.o_proj(self.g_norm(g) * F.silu(states)), after


class HGRNBitMLP(nn.Module):
    """The channel mixer: down(silu(gate) * up)."""

    def __init__(self, config: HGRNBitConfig) -> None:
        super().__init__()
        self.gate_proj = bit_linear(config.hidden_size, 2 * config.glu_size, config)
        self.down_proj = bit_linear(config.glu_size, config.hidden_size, config)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        gate, up = self.gate_proj(x).float().chunk(2, dim=-1)
        return self.down_proj(F.silu(gate) * up)


class HGRNBitBlock(nn.Module):
    """A token mixer and a channel mixer, each behind a norm and added to the stream."""

    def __init__(self, config: HGRNBitConfig) -> None:
        super().__init__()
        self.attn_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attn = HGRNBitAttention(config)
        self.mlp_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = HGRNBitMLP(config)

    def forward(
        self, x: Tensor, bound: Tensor | None, mask: Tensor | None, state: dict[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The stream [B, T, D] after the block, and the layer's state; see `HGRNBitAttention`."""
        update, state = self.attn(self.attn_norm(x), bound, mask, state)
        x = x + update
        return x + self.mlp(self.mlp_norm(x)), state


class HGRNBitPreTrainedModel(PreTrainedModel):
    """What all models here share."""

    config_class = HGRNBitConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules: ClassVar[list[str]] = ["HGRNBitBlock"]
    _is_stateful = True

    def _init_weights(self, module: nn.Module) -> None:
        std = self.config.initializer_range
        if isinstance(module, (nn.Embedding, nn.Linear)):
            nn.init.normal_(module.weight, std=std)
        elif isinstance(module, HGRNBitMLP) and not self.config.packed:
            deep = std / math.sqrt(2 * self.config.num_hidden_layers)
            nn.init.normal_(module.down_proj.weight, std=deep)
        elif isinstance(module, HGRNBitAttention) and not self.config.packed:
            for linear in (module.i_proj, module.f_proj, module.g_proj, module.o_proj):
                nn.init.xavier_uniform_(linear.weight, gain=2**-2.5)
        elif isinstance(module, ShortConvolution):
            nn.init.kaiming_uniform_(module.weight, a=math.sqrt(5))
        elif isinstance(module, RMSNorm):
            nn.init.ones_(module.weight)
        elif isinstance(module, HGRNBitModel) and self.config.use_lower_bound:
            nn.init.zeros_(module.lower_bounds)


class HGRNBitModel(HGRNBitPreTrainedModel):
    """The model without its head."""

    def __init__(self, config: HGRNBitConfig) -> None:
        super().__init__(config)
        layers, width = config.num_hidden_layers, config.hidden_size
        self.embeddings = nn.Embedding(config.vocab_size, width)
        self.lower_bounds = None
        if config.use_lower_bound:
            self.lower_bounds = nn.Parameter(torch.zeros(layers, width))
        self.layers = nn.ModuleList([HGRNBitBlock(config) for _ in range(layers)])
        self.norm = RMSNorm(width, config.rms_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The embedding."""
        return self.embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replaces the embedding."""
        self.embeddings = value

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        past_key_values: HGRNBitState | None = None,
        cache: HGRNBitState | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Reads tokens.

        Args:
          input_ids: [B, T].
          attention_mask: [B, T] or longer to the left, 0 on padding, on either side of a row;
            padding leaves the state as it is.
          inputs_embeds: [B, T, D] in place of `input_ids`.
          past_key_values: the state to go on from, which is changed.
          cache: the same, by its newer name.
          use_cache: return the state.
          output_hidden_states: return the stream before each block, and the normed last one.
          return_dict: False: a tuple.
          kwargs: positions and the like, which are not read.

        Raises:
          ValueError: what is given does not fit, or asks for what this model has not.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give input_ids or inputs_embeds, one of them")
        x = self.embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        checkpoints = self.gradient_checkpointing and self.training
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        state = past_key_values if cache is None else cache
        if state is None:
            state = HGRNBitState(len(self.layers))
        check_state(state, len(x), len(self.layers))
        if not state.seen:
            forget_trits(self)
        mask = token_mask(x, attention_mask)
        check_others(mask, kwargs)
        bounds: Sequence[Tensor | None] = [None] * len(self.layers)
        if self.lower_bounds is not None:
            share = self.lower_bounds.float().softmax(dim=0)
            bounds = list(share.cumsum(dim=0) - share[:1])
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        streams = []
        for number, (block, bound) in enumerate(zip(self.layers, bounds, strict=True)):
            if output_hidden_states:
                streams.append(x)
            given = (x, bound, mask, state.layers[number])
            if checkpoints:
                x, after = self._gradient_checkpointing_func(block.__call__, *given)
            else:
                x, after = block(*given)
            if use_cache:
                state.layers[number] = after
        if use_cache:
            state.seen += x.shape[1]
        x = self.norm(x).to(x.dtype)
        output = BaseModelOutputWithPast(
            last_hidden_state=x,
            hidden_states=(*streams, x) if output_hidden_states else None,
            **{_STATE: state if use_cache else None},
        )
        return output if _returns_dict(return_dict, self.config) else output.to_tuple()


def _returns_dict(return_dict: bool | None, config: HGRNBitConfig) -> bool:
    return getattr(config, "return_dict", True) if return_dict is None else return_dict


class HGRNBitForCausalLM(HGRNBitPreTrainedModel, GenerationMixin):
    """The model with its head, for next-token prediction."""

    _tied_weights_keys = _TIED

    def __init__(self, config: HGRNBitConfig) -> None:
        super().__init__(config)
        self.model = HGRNBitModel(config)
        self.lm_head = bit_linear(config.hidden_size, config.vocab_size, config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The embedding."""
        return self.model.embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replaces the embedding."""
        self.model.embeddings = value

    def get_output_embeddings(self) -> nn.Module | None:
        """The head; None where its weight is packed, which can be neither tied nor resized."""
        return None if self.config.packed else self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Takes another head, or the weight of one without a norm, of as many rows as it has."""
        if isinstance(new_embeddings, BitLinear):
            self.lm_head = new_embeddings
        else:
            self.lm_head.weight = new_embeddings.weight
            self.lm_head.out_features = new_embeddings.weight.shape[0]

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # the state is made by `forward`

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        next_sequence_length: int | None = None,
        past_key_values: HGRNBitState | None = None,
        cache: HGRNBitState | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """The tokens that the state has not seen; before the first, all."""
        state = past_key_values if cache is None else cache
        given: dict[str, Any] = {"input_ids": input_ids}
        if state is not None and next_sequence_length is not None:
            given = {"input_ids": input_ids[:, -next_sequence_length:]}
        elif getattr(state, "seen", 0):
            length = (input_ids if attention_mask is None else attention_mask).shape[1]
            if length <= state.seen:
                raise ValueError(
                    f"the state has read {state.seen} tokens and {length} are given: a recurrent "
                    "state cannot go back, give one token more at least"
                )
            given = {"input_ids": input_ids[:, state.seen - length :]}
        elif inputs_embeds is not None:
            given = {"inputs_embeds": inputs_embeds}
        return given | {
            _STATE: state,
            "attention_mask": attention_mask,
            "use_cache": use_cache,
            "logits_to_keep": logits_to_keep,
            "output_attentions": kwargs.get("output_attentions"),
        }

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        past_key_values: HGRNBitState | None = None,
        cache: HGRNBitState | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> Any:
        """Next-token logits [B, T, V] in float32; see `HGRNBitModel.forward` for the rest.

        Args:
          input_ids, attention_mask, inputs_embeds, past_key_values, cache: as there.
          labels: [B, T], the tokens themselves, -100 where none is to be predicted; gives a loss.
          use_cache, output_hidden_states, return_dict: as there.
          logits_to_keep: of the last so many tokens, or at these places; 0: all.
          kwargs: of the loss; see there for others.
        """
        state = past_key_values if cache is None else cache
        if isinstance(self.lm_head, BitLinear) and not getattr(state, "seen", 0):
            self.lm_head.forget()
        output = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            past_key_values=past_key_values,
            cache=cache,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            return_dict=True,
            **{name: kwargs.pop(name) for name in OTHERS if name in kwargs},
        )
        x = output.last_hidden_state
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(x[:, kept]).float()
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs
            )
        result = CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=output.hidden_states,
            **{_STATE: output.get(_STATE)},
        )
        return result if _returns_dict(return_dict, self.config) else result.to_tuple()


class HGRNBitPackedModel(HGRNBitModel):
    """`HGRNBitModel` with weights at 2 bits."""

    config_class = HGRNBitPackedConfig


class HGRNBitPackedForCausalLM(HGRNBitForCausalLM):
    """`HGRNBitForCausalLM` with weights at 2 bits."""

    config_class = HGRNBitPackedConfig


# Saved again, a model has its code with it; newer transformers see to that themselves.
HGRNBitConfig.register_for_auto_class()
HGRNBitModel.register_for_auto_class("AutoModel")
HGRNBitForCausalLM.register_for_auto_class("AutoModelForCausalLM")
