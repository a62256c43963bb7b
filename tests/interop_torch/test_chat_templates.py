"""Chat templates give the texts and ids of `apply_chat_template`, asked of transformers itself."""

import importlib.util
from pathlib import Path

import pytest
import tokenizers

pytest.importorskip("transformers")

import transformers

from mmfree_jax.data.tokenizer import JsonTokenizer
from mmfree_jax.serve.chat_template import ChatFormat

_KNOWN = Path(__file__).parents[1] / "mmfree_jax" / "serve" / "test_chat_template.py"


def _known():
    """The templates, messages and tokenizer whose expected values are written down there."""
    spec = importlib.util.spec_from_file_location("known_templates", _KNOWN)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_texts_and_ids_are_those_of_transformers():
    known = _known()
    tokenizer: JsonTokenizer = known.make_tokenizer()
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer.from_str(tokenizer.text), **known.NAMES
    )
    messages = [message.fields() for message in known.MESSAGES]
    for template, text in known.TEXTS.items():
        asked = {"chat_template": template, "add_generation_prompt": True}
        assert theirs.apply_chat_template(messages, tokenize=False, **asked) == text
        ids = theirs.apply_chat_template(messages, tokenize=True, return_dict=False, **asked)
        assert ChatFormat(tokenizer, template, known.NAMES).prompt(known.MESSAGES) == ids
