"""What OpenAI's own client gets from a real server on loopback."""

import importlib
import json
import typing

import jax
import jax.numpy as jnp
import openai
import pytest
from served import NAME, small_model

from mmfree_jax.data.tokenizer import ByteTokenizer
from mmfree_jax.infer import generate_text
from mmfree_jax.serve import bodies

PROMPT = "We hold these truths"
GREEDY = {"model": NAME, "temperature": 0, "prompt": PROMPT}


@pytest.fixture(scope="module")
def expected():
    """The greedy answer of 24 tokens, by `generate_text`."""
    model, params = small_model()
    out = generate_text(
        model, params, ByteTokenizer(), [PROMPT], max_new_tokens=24, temperature=0.0
    )
    return out.texts[0], out.tokens[0]


def test_a_completion_is_what_generate_gives(client, expected):
    text, tokens = expected
    response = client.completions.create(**GREEDY, max_tokens=24)
    assert response.object == "text_completion"
    assert response.model == NAME
    (choice,) = response.choices
    assert (choice.text, choice.index, choice.logprobs) == (text, 0, None)
    assert choice.finish_reason == ("length" if len(tokens) == 24 else "stop")
    usage = response.usage
    assert usage.prompt_tokens == 1 + len(PROMPT.encode())
    assert usage.completion_tokens == len(tokens)
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens


def test_a_stream_adds_up_to_the_answer_in_whole_characters(client, expected):
    chunks = list(
        client.completions.create(
            **GREEDY, max_tokens=24, stream=True, stream_options={"include_usage": True}
        )
    )
    *pieces, last = chunks
    assert "".join(c.choices[0].text for c in pieces) == expected[0]
    assert [c.choices[0].finish_reason for c in pieces[:-1]] == [None] * (len(pieces) - 1)
    assert pieces[-1].choices[0].finish_reason in ("length", "stop")
    assert last.choices == []
    assert last.usage.completion_tokens == len(expected[1])
    assert len({c.id for c in chunks}) == 1
    without = list(client.completions.create(**GREEDY, max_tokens=2, stream=True))
    assert all(c.usage is None for c in without)


def test_a_character_of_several_tokens_comes_whole(client):
    """The three bytes of a character, one after another by biases and the penalty."""
    first, second, third = "日".encode()
    response = client.completions.create(
        model=NAME, prompt="x", max_tokens=5, temperature=0, stream=True,
        logit_bias={str(first): 100, str(second): 98.6, str(third): 97.3},
        frequency_penalty=2, presence_penalty=2,
    )  # fmt: skip
    texts = [chunk.choices[0].text for chunk in response]
    # The other two tokens begin a character that never ends.
    assert "".join(texts) == "日\ufffd"
    assert next(filter(None, texts)).startswith("日")


def test_seeded_samples_are_those_of_the_seed_alone(client):
    ask = {"model": NAME, "prompt": PROMPT, "max_tokens": 12, "seed": 5}
    first = client.completions.create(**ask, n=3)
    again = client.completions.create(**ask, n=3)
    texts = [choice.text for choice in first.choices]
    assert texts == [choice.text for choice in again.choices]
    assert len(set(texts)) == 3
    assert [choice.index for choice in first.choices] == [0, 1, 2]
    assert first.usage.prompt_tokens == 1 + len(PROMPT)
    assert first.usage.completion_tokens == 36
    alone = client.completions.create(**ask)
    assert alone.choices[0].text == texts[0]
    assert client.completions.create(**ask | {"seed": 6}).choices[0].text != texts[0]
    unseeded = [client.completions.create(**ask | {"seed": None}).choices[0].text for _ in "ab"]
    assert len(set(unseeded)) == 2


def test_prompts_of_every_kind_are_answered_in_their_order(client):
    ids = [ByteTokenizer().encode(text) for text in ("one", "two")]
    bos = [256]
    kinds = ["one", ["one", "two"], bos + ids[0], [bos + ids[0], bos + ids[1]]]
    answers = [
        [c.text for c in client.completions.create(
            model=NAME, prompt=prompt, max_tokens=5, temperature=0).choices]
        for prompt in kinds
    ]  # fmt: skip
    assert answers[0] == answers[1][:1] == answers[2]
    assert answers[1] == answers[3]
    several = client.completions.create(
        model=NAME, prompt=["one", "two"], n=2, max_tokens=5, temperature=0
    )
    one, two = answers[1]
    assert [c.text for c in several.choices] == [one, one, two, two]
    assert several.usage.prompt_tokens == 8


def test_a_stop_string_over_several_tokens_is_never_given_in_part(client, expected):
    text = expected[0]
    stop = text[4:7]
    cut = text[: text.index(stop)]
    ask = {**GREEDY, "max_tokens": 24, "stop": [stop, "never there"]}
    whole = client.completions.create(**ask, logprobs=0)
    assert (whole.choices[0].text, whole.choices[0].finish_reason) == (cut, "stop")
    chunks = list(client.completions.create(**ask, stream=True))
    assert "".join(c.choices[0].text for c in chunks) == cut
    assert chunks[-1].choices[0].finish_reason == "stop"
    # Tokens up to the one that completed the stop string count.
    texts = [ByteTokenizer().decode(expected[1][:count]) for count in range(25)]
    assert whole.usage.completion_tokens == next(i for i, t in enumerate(texts) if stop in t)
    ids = client.completions.create(
        **GREEDY, max_tokens=24, extra_body={"stop_token_ids": [expected[1][3]]}
    )
    assert ids.choices[0].finish_reason == "stop"
    assert ids.usage.completion_tokens == expected[1].index(expected[1][3])


def test_an_echo_with_logprobs_scores_the_prompt(client, expected):
    response = client.completions.create(**GREEDY, max_tokens=3, echo=True, logprobs=2)
    choice, tokens = response.choices[0], [256, *PROMPT.encode(), *expected[1][:3]]
    assert choice.text.startswith(PROMPT)
    scores = choice.logprobs
    assert len(scores.tokens) == len(tokens)
    assert scores.tokens[: 1 + len(PROMPT)] == ["<|bos|>", *PROMPT]
    assert scores.text_offset[: 1 + len(PROMPT)] == [0, *range(len(PROMPT))]
    assert scores.token_logprobs[0] is None
    assert scores.top_logprobs[0] is None
    model, params = small_model()
    logits = model.apply({"params": params}, jnp.asarray([tokens]))
    logprobs = jax.nn.log_softmax(logits[0].astype(jnp.float32))
    wanted = [float(logprobs[i, token]) for i, token in enumerate(tokens[1:])]
    assert scores.token_logprobs[1:] == pytest.approx(wanted, abs=1e-4)
    for i, top in enumerate(scores.top_logprobs[1:]):
        assert max(top.values()) == pytest.approx(float(logprobs[i].max()), abs=1e-4)
        assert len(top) in (2, 3)
    # The greedy ones are the likeliest.
    for top, own in list(zip(scores.top_logprobs, scores.token_logprobs, strict=True))[-3:]:
        assert own == max(top.values())


def test_a_scored_prompt_has_one_entry_behind_it_whatever_the_token(client):
    """lm-eval drops the last entry: without one for the end of the text it would drop a score."""
    ask = {**GREEDY, "max_tokens": 1, "logprobs": 1, "logit_bias": {"257": 100}}
    scored = client.completions.create(**ask, echo=True).choices[0]
    assert scored.logprobs.tokens == ["<|bos|>", *PROMPT, "<|eos|>"]
    assert scored.text == PROMPT
    plain = client.completions.create(**ask)
    assert (plain.choices[0].finish_reason, plain.usage.completion_tokens) == ("stop", 0)


def test_nothing_is_generated_where_nothing_is_asked_for(client):
    response = client.completions.create(**GREEDY, max_tokens=0, echo=True, logprobs=0)
    assert response.choices[0].text == PROMPT
    assert response.usage.completion_tokens == 0
    assert len(response.choices[0].logprobs.tokens) == 1 + len(PROMPT)


def test_a_chat_has_the_plain_form_and_openais_shape(client):
    messages = [{"role": "developer", "content": "Be short."},
                {"role": "user", "content": [{"type": "text", "text": "Hi"}]}]  # fmt: skip
    ask = {"model": NAME, "messages": messages, "temperature": 0, "max_completion_tokens": 6}
    whole = client.chat.completions.create(**ask, logprobs=True, top_logprobs=2)
    assert whole.object == "chat.completion"
    message = whole.choices[0].message
    assert message.role == "assistant"
    plain = client.completions.create(
        model=NAME, prompt="System: Be short.\nUser: Hi\nAssistant:", temperature=0, max_tokens=6
    )
    assert message.content == plain.choices[0].text
    assert whole.usage.prompt_tokens == plain.usage.prompt_tokens
    content = whole.choices[0].logprobs.content
    assert len(content) == 6
    assert all(len(entry.top_logprobs) == 2 for entry in content)
    assert all(bytes(e.bytes).decode(errors="replace") for e in content)
    chunks = list(client.chat.completions.create(**ask, stream=True))
    assert chunks[0].object == "chat.completion.chunk"
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == message.content
    assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason


def test_a_prompt_that_was_read_before_is_counted_as_cached(client):
    ask = {"model": NAME, "prompt": "A prompt that nobody else sends, twice.", "max_tokens": 1}
    first = client.completions.create(**ask).usage
    second = client.completions.create(**ask).usage
    assert first.prompt_tokens_details.cached_tokens == 0
    assert second.prompt_tokens_details.cached_tokens > 0
    assert second.prompt_tokens == first.prompt_tokens


def test_an_answer_handed_back_as_the_client_gave_it_is_a_turn(client):
    ask = {"model": NAME, "temperature": 0, "max_tokens": 4, "tools": []}
    user = {"role": "user", "content": "Hi"}
    answer = client.chat.completions.create(**ask, messages=[user]).choices[0].message
    empty = answer.model_copy(update={"content": None})
    for given, text in ((answer, answer.content), (empty, "")):
        messages = [user, given.model_dump(), user]
        got = client.chat.completions.create(**ask, messages=messages).choices[0].message.content
        prompt = f"User: Hi\nAssistant: {text}\nUser: Hi\nAssistant:"
        want = client.completions.create(model=NAME, prompt=prompt, temperature=0, max_tokens=4)
        assert got == want.choices[0].text


@pytest.mark.parametrize(
    ("read", "params", "own"),
    [
        (bodies.read_chat, "chat.completion_create_params", {"messages": []}),
        (bodies.read_completion, "completion_create_params", {"prompt": "x"}),
    ],
)
def test_every_field_that_the_client_can_send_is_known(read, params, own):
    """An unknown field is told as such; what OpenAI has and this server has not, is refused."""
    base = importlib.import_module(f"openai.types.{params}").CompletionCreateParamsBase
    for name in typing.get_type_hints(base):
        with pytest.raises(bodies.RequestError) as e:
            read({"model": "m", "n": 0} | own | {name: object()})
        assert e.value.code != "unknown_parameter", name


def test_errors_are_the_clients_own(client):
    with pytest.raises(openai.NotFoundError) as e:
        client.completions.create(model="gpt", prompt="x")
    assert (e.value.code, e.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.BadRequestError, match=r"temperature is 3: set a value in \[0, 2\]"):
        client.completions.create(model=NAME, prompt="x", temperature=3)
    with pytest.raises(openai.BadRequestError, match="tools is not supported"):
        client.chat.completions.create(
            model=NAME, messages=[{"role": "user", "content": "x"}],
            tools=[{"type": "function", "function": {"name": "f"}}],
        )  # fmt: skip
    assert client.models.list().data[0].id == NAME
    assert client.models.retrieve(NAME).owned_by == "mmfree"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("another")


def test_sessions_are_saved_forked_continued_and_deleted(client, small, expected):
    text, _ = expected
    status, saved, _ = small.ask("POST", "/v1/sessions", {"name": "a", "prompt": PROMPT})
    assert (status, saved["tokens"]) == (201, 1 + len(PROMPT))
    assert small.ask("POST", "/v1/sessions/a/fork", {"name": "b"})[0] == 201
    half = client.completions.create(
        **GREEDY | {"prompt": None}, max_tokens=10, extra_body={"session": "b", "save_as": "b"}
    )
    rest = client.completions.create(
        **GREEDY | {"prompt": None}, max_tokens=14, extra_body={"session": "b"}
    )
    both = half.choices[0].text + rest.choices[0].text
    assert both.replace("\ufffd", "") == text.replace("\ufffd", "")
    _, listed, _ = small.ask("GET", "/v1/sessions")
    assert [(s["id"], s["tokens"]) for s in listed["data"]] == [
        ("a", 1 + len(PROMPT)), ("b", 11 + len(PROMPT)),
    ]  # fmt: skip
    assert small.ask("DELETE", "/v1/sessions/b")[1]["deleted"] is True
    assert small.ask("GET", "/v1/sessions/b")[0] == 404
    status, error, _ = small.ask("POST", "/v1/completions", {"model": NAME, "session": "b"})
    assert (status, error["error"]["code"]) == (404, "session_not_found")
    assert small.ask("POST", "/v1/sessions/a/restore")[0] == 404  # there is no folder
    assert small.ask("DELETE", "/v1/sessions/a")[0] == 200


def test_the_events_of_a_stream_are_as_written_down(small):
    body = {"model": NAME, "prompt": "x", "max_tokens": 1, "stream": True, "seed": 1}
    status, content, headers = small.ask("POST", "/v1/completions", body)
    assert status == 200
    assert headers["content-type"] == "text/event-stream; charset=utf-8"
    *events, done, rest = content.decode().split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    for event in events:
        assert event.startswith("data: {")
        assert set(json.loads(event[6:])) == {"id", "object", "created", "model", "choices"}


def test_metrics_and_health(small):
    status, text, _ = small.ask("GET", "/metrics")
    assert status == 200
    assert b"mmfree_slots 4.0\n" in text
    assert b'mmfree_responses_total{endpoint="models",status="200"}' in text
    assert small.ask("GET", "/health")[1] == {"status": "ok"}


def test_ids_and_texts(small):
    _, found, _ = small.ask("POST", "/tokenize", {"prompt": "hé", "add_special_tokens": False})
    assert found["tokens"] == [0x68, 0xC3, 0xA9]
    assert small.ask("POST", "/tokenize", {"prompt": "h"})[1]["tokens"] == [256, 0x68]
    assert small.ask("POST", "/tokenize", {"prompt": "<|eos|>"})[1]["tokens"] == [257]
    _, found, _ = small.ask("POST", "/detokenize", {"tokens": [256, 0x68, 0xC3, 0xA9]})
    assert found == {"prompt": "hé"}
    _, found, _ = small.ask("GET", "/tokenizer_info")
    assert found == {"bos_token": "<|bos|>", "eos_token": "<|eos|>", "chat_template": None}
