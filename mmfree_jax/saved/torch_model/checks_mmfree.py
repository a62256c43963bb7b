"""What does not fit a MatMul-free model is refused in one line.

Written by `mmfree export-hf` for `modeling_mmfree.py`. Shapes: B rows, T tokens. Apache-2.0.
"""

from typing import Any

from torch import Tensor

OTHERS = ("output_attentions", "position_ids", "seq_idx", "cu_seq_lens_q")


def check_state(state: Any, rows: int, num_layers: int) -> None:
    """Refuses a state that does not fit what goes on from it.

    Raises:
      ValueError: it is another kind of cache, of another model, or of another number of rows.
    """
    if not hasattr(state, "seen"):
        raise ValueError(
            f"the state is a {type(state).__name__}: give the one that this model returned, or none"
        )
    if len(state.layers) != num_layers:
        raise ValueError(f"the state has {len(state.layers)} layers, the model {num_layers}")
    found = {len(value) for layer in state.layers for value in layer.values()}
    if found - {rows}:
        raise ValueError(
            f"the state is of {found.pop()} rows, {rows} are given: choose or repeat its rows by "
            "batch_select_indices or batch_repeat_interleave"
        )


def token_mask(x: Tensor, attention_mask: Tensor | None) -> Tensor | None:
    """[B, T] float32, of the tokens that are read; None: all count.

    Raises:
      ValueError: there are none, or the mask does not fit them.
    """
    batch, length = x.shape[:2]
    if not length:
        raise ValueError("input_ids hold no tokens: give each row one at least")
    if attention_mask is None:
        return None
    shape = tuple(attention_mask.shape)
    if len(shape) != 2 or shape[0] != batch or shape[1] < length:
        raise ValueError(f"attention_mask has shape {shape}, not [{batch}, {length}] or longer")
    return attention_mask[:, -length:].float()


def check_others(mask: Tensor | None, given: dict[str, Any]) -> None:
    """Refuses what other models read and what would be passed over here without a word.

    Raises:
      ValueError: attentions are asked for, or texts in one row are told apart.
    """
    if given.get("output_attentions"):
        raise ValueError("output_attentions is set: this model has no attentions, leave it out")
    positions = given.get("position_ids")
    again = any(given.get(name) is not None for name in OTHERS[2:])
    if positions is not None and not again:
        back = positions[..., 1:] < positions[..., :-1]
        if mask is not None and back.shape[-1] == mask.shape[1] - 1:
            back = back & (mask[:, 1:] * mask[:, :-1] > 0)  # positions of padding say nothing
        again = bool(back.any())
    if again:
        raise ValueError(
            "position_ids begin again: texts in one row are not kept apart, give each text a row "
            "and pad with attention_mask"
        )
