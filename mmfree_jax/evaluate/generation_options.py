"""What lm-eval's tasks ask of generated text, read as lm-eval reads it for its own models."""

import warnings
from collections.abc import Mapping
from typing import Any

MOST_TOKENS = 256
"""lm-eval's own default for max_gen_toks."""
_NAMES_OF_MOST = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_PASSED_ON = ("top_p", "top_k", "min_p", "repetition_penalty")
# These change nothing: how a program runs, or the value that everything has here.
_NO_EFFECT = {"num_beams": 1, "use_cache": True, "early_stopping": False}


def most_tokens(options: Mapping[str, Any]) -> int:
    """Most tokens of an answer; of several names for it lm-eval's own goes first."""
    given = (options[name] for name in _NAMES_OF_MOST if options.get(name) is not None)
    return int(next(given, MOST_TOKENS))


def generation_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of `generate_text` for a task's `generation_kwargs`.

    A temperature above 0 draws unless `do_sample` is false, as in lm-eval. What is not known here
    is told in a warning.
    """
    temperature = options.get("temperature")
    sampled = options.get("do_sample")
    if sampled is None:
        sampled = bool(temperature)
    until = options.get("until") or []
    stop = [until] if isinstance(until, str) else list(until)
    found = {name: options[name] for name in _PASSED_ON if options.get(name) is not None}
    if found.get("top_k") == 0:  # off, for transformers
        del found["top_k"]
    known = {"temperature", "do_sample", "until", *_NAMES_OF_MOST, *_PASSED_ON}
    for name, value in options.items():
        if name not in known and value is not None and value != _NO_EFFECT.get(name, ...):
            warnings.warn(
                f"generation_kwargs of a task has {name} = {value!r}, which changes nothing here",
                stacklevel=2,
            )
    return found | {
        "stop": [s for s in stop if s],
        "max_new_tokens": most_tokens(options),
        "temperature": (1.0 if temperature is None else float(temperature)) if sampled else 0.0,
    }
