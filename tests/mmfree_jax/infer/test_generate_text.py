"""Text in, text out: streaming, stop strings, and characters that span tokens."""

import dataclasses

import jax
import numpy as np
import pytest
from initial_params import initial_params

from mmfree_jax.errors import ConfigError, DataError
from mmfree_jax.infer import TextStream, generate_text, sample_text
from mmfree_jax.infer.text import AnswerText
from mmfree_jax.model import LanguageModel
from mmfree_jax.model_config import ModelConfig

CONFIG = ModelConfig(
    vocab_size=258,
    hidden_size=32,
    num_layers=2,
    intermediate_size=48,
    compute_dtype="float32",
    residual_dtype="float32",
    remat="none",
)


@dataclasses.dataclass
class ByteTokenizer:
    """Ids are bytes."""

    bos_id: int | None = None
    eos_id: int | None = None
    vocab_size: int = 258

    def encode(self, text):
        return list(text.encode())

    def decode(self, ids):
        return bytes(i for i in ids if i < 256).decode(errors="replace")


class PieceTokenizer(ByteTokenizer):
    """Words behind a space that is dropped at the start, and one U+FFFD for each stray byte."""

    words = ("▁the", "▁cat", "s", "▁", "é", "<0xE2>", "<0x82>", "<0xAC>", "<0xF0>")

    def decode(self, ids):
        out, run = "", b""
        for i in [*ids, None]:
            word = None if i is None else self.words[i % len(self.words)]
            if word is not None and word.startswith("<0x"):
                run += bytes([int(word[3:5], 16)])
                continue
            while run:
                character, run = self._first_character(run)
                out += character
            out += word or ""
        return out.replace("▁", " ").removeprefix(" ")

    @staticmethod
    def _first_character(run):
        for n in range(1, 5):
            try:
                return run[:n].decode(), run[n:]
            except UnicodeDecodeError:
                pass
        return "\ufffd", run[1:]


@pytest.fixture(scope="module")
def model():
    model = LanguageModel(CONFIG)
    params = initial_params(CONFIG, 1)
    return model, jax.tree.map(lambda x: x * 3 if x.ndim == 2 else x, params)


def test_streamed_bytes_never_break_characters():
    text = "naïve café — 東京 🙂🇫🇷 end"
    stream = TextStream(ByteTokenizer())
    pieces = [stream.push([byte]) for byte in text.encode()] + [stream.flush()]
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)


@pytest.mark.parametrize("tokenizer", [ByteTokenizer(), PieceTokenizer()], ids=["bytes", "pieces"])
@pytest.mark.parametrize("seed", range(6))
def test_stream_adds_up_to_the_whole_text_even_of_garbage(tokenizer, seed):
    rng = np.random.default_rng(seed)
    # High bytes: mostly broken characters.
    ids = rng.integers(0, 256, 300).tolist() if seed % 2 else rng.integers(120, 256, 300).tolist()
    stream = TextStream(tokenizer)
    pieces, at = [], 0
    while at < len(ids):
        step = int(rng.integers(1, 4))
        pieces.append(stream.push(ids[at : at + step]))
        at += step
    assert "".join([*pieces, stream.flush()]) == tokenizer.decode(ids)


def test_stream_behind_a_context_keeps_the_space_and_completes_a_character():
    stream = TextStream(PieceTokenizer(), context=[0])
    assert stream.push([1]) == " cat"
    stream = TextStream(ByteTokenizer(), context=[*b"caf", 0xC3])
    assert stream.push([0xA9]) + stream.flush() == "é"


def test_streamed_and_returned_text_agree(model):
    pieces = ["", ""]

    def on_text(row, text):
        pieces[row] += text

    options = {"max_new_tokens": 60, "seed": 4, "temperature": 0.9}
    prompts = ["Fellow citizens", "é"]
    streamed = generate_text(*model, ByteTokenizer(), prompts, on_text=on_text, **options)
    whole = generate_text(*model, ByteTokenizer(), prompts, **options)
    assert pieces == streamed.texts == whole.texts
    assert whole.texts == [ByteTokenizer().decode(t) for t in whole.tokens]


def test_a_stop_string_ends_the_text_wherever_it_starts(model):
    tokenizer = ByteTokenizer()
    options = {"max_new_tokens": 80, "seed": 2}
    free = generate_text(*model, tokenizer, ["ab", "cd"], **options)
    text = free.texts[0]
    stop = next(text[i : i + 2] for i in range(15, 80) if text[i : i + 2].isascii())
    pieces = ["", ""]

    def on_text(row, text):
        pieces[row] += text

    for on in (None, on_text):
        out = generate_text(*model, tokenizer, ["ab", "cd"], stop=[stop], on_text=on, **options)
        for row in (0, 1):
            assert out.texts[row] == free.texts[row].split(stop)[0]
        assert out.finish_reasons[0] == "stop"
    assert pieces == out.texts
    # The session stands behind the stop string.
    read = int(out.session.state.position_B[0])
    assert read == 2 + len(out.tokens[0])
    assert tokenizer.decode(out.tokens[0]).endswith(stop)


@pytest.mark.parametrize("stop", [("cd", "bcd", "d"), ("bcd", "d", "cd")])
def test_of_stop_strings_in_one_token_the_earliest_in_the_text_ends_it(stop):
    class Words(ByteTokenizer):
        def decode(self, ids):
            return "".join(["a", "bcde"][i] for i in ids)

    text = AnswerText(Words(), (), stop)
    assert text.push(0, 1) + text.flush() == "a"
    # One that came with an earlier token ends the text, whatever would have begun before it.
    text = AnswerText(ByteTokenizer(), (), ("bcd", "c"))
    assert "".join(text.push(byte) for byte in b"abc") == "ab"
    assert text.stopped


def test_eos_ends_an_answer_unless_ignored(model):
    free = generate_text(*model, ByteTokenizer(), ["ab"], max_new_tokens=40, seed=2)
    eos = free.tokens[0][10]
    tokenizer = ByteTokenizer(eos_id=eos)
    out = generate_text(*model, tokenizer, ["ab"], max_new_tokens=40, seed=2)
    assert out.tokens[0] == free.tokens[0][: free.tokens[0].index(eos)]
    assert out.finish_reasons == ["stop_id"]
    on = generate_text(*model, tokenizer, ["ab"], max_new_tokens=40, seed=2, stop_at_end=False)
    assert on.tokens == free.tokens


def test_a_conversation_goes_on_from_its_session(model):
    tokenizer = ByteTokenizer(bos_id=256)
    first = generate_text(*model, tokenizer, ["ab"], max_new_tokens=7, temperature=0)
    second = generate_text(
        *model, tokenizer, ["cd"], max_new_tokens=7, temperature=0, session=first.session
    )
    ids = [256, *b"ab", *first.tokens[0], *b"cd"]
    whole = generate_text(*model, tokenizer, [ids], max_new_tokens=7, temperature=0)
    assert second.tokens == whole.tokens


@pytest.mark.parametrize("special", [{}, {"bos_id": 256}, {"eos_id": 257}])
def test_sample_text_starts_with_its_prompt_which_may_be_empty(model, special):
    tokenizer = ByteTokenizer(**special)
    text = sample_text(*model, tokenizer, "", max_new_tokens=8, temperature=0.8, seed=0)
    assert text
    assert sample_text(*model, tokenizer, "ab", max_new_tokens=8, seed=0).startswith("ab")


def test_an_empty_stop_string_is_refused(model):
    with pytest.raises(ConfigError, match="stop"):
        generate_text(*model, ByteTokenizer(), ["a"], stop=[""])


def test_a_text_alone_is_one_stop_string_and_no_list_of_prompts(model):
    """Its characters would each be taken for one."""
    options = {"max_new_tokens": 12, "temperature": 0}
    whole = generate_text(*model, ByteTokenizer(), [[1, 2]], **options)
    character = whole.texts[0][2]
    stop = whole.texts[0][2:4] + "!"
    found = generate_text(*model, ByteTokenizer(), [[1, 2]], stop=stop, **options)
    assert found.texts == whole.texts
    found = generate_text(*model, ByteTokenizer(), [[1, 2]], stop=character, **options)
    assert found.texts == [whole.texts[0].partition(character)[0]]
    with pytest.raises(DataError, match="prompts is 'ab': give a list"):
        generate_text(*model, ByteTokenizer(), "ab", **options)
