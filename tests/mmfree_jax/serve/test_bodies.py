"""Bad fields of a request: each is refused by its name, and what OpenAI's programs send is read."""

import pytest

from mmfree_jax.serve.bodies import Message, read_chat, read_completion
from mmfree_jax.serve.json_body import check_content_type, parse_body
from mmfree_jax.serve.request_errors import RequestError

NAN = float("nan")
BAD = {
    "model": [1, ["m"], {}, True],
    "prompt": [1, True, {}, [], [[]], [[], [1]], ["a", 1], ["a", [1]], [1.5], [True], [-1], [2**31],
               [[1, "a"]], [None], [{}]],
    "n": [0, -1, 129, 1.0, True, "1", 10**30],
    "temperature": [-0.1, 2.1, NAN, float("inf"), True, "1", [1], 1e-42],
    "top_p": [-0.1, 1.1, NAN, False, "1"],
    "top_k": [-2, 1.5, True, 2**31, "1"],
    "min_p": [-1, 1.5, NAN, True],
    "presence_penalty": [-2.1, 2.1, NAN, True],
    "frequency_penalty": [-2.1, 2.1, NAN, True],
    "repetition_penalty": [0, -1, NAN, True, 1e10],
    "logit_bias": [[], {"a": 1}, {"1": 101}, {"1": NAN}, {"1": True}, {"-1": 1}, {"1.0": 1},
                   {"²": 1}, {"1": None}, {"1": 1, "01": 2}, {str(i): 1 for i in range(301)}],
    "seed": [-1, 2**32, 1.5, True, "1", 10**39],
    "stop": [1, True, {}, [""], "", ["a"] * 5, [1], [None], "x" * 1001],
    "stop_token_ids": [1, [-1], [True], ["a"], [1.0], list(range(9))],
    "ignore_eos": [0, 1, "true"],
    "max_tokens": [-1, 1.5, True, "5", 10**30],
    "stream": [0, 1, "true", []],
    "stream_options": [True, [], {"include_usage": 1}, {"other": True}],
    "echo": [1, "true"],
    "logprobs": [-1, 21, True, 1.0, "1"],
    "best_of": [2, 0, True],
    "session": [1, True],
    "save_as": [1],
    "suffix": ["x", 1],
    "nonsense": [1, {}],
    "x" * 500: [1],
    "x" * 100_000: [1],
    "x\n\x1b[31m": [1],
}  # fmt: skip


def refused(read, body):
    with pytest.raises(RequestError) as e:
        read(body)
    assert 400 <= e.value.status < 500
    assert "\n" not in str(e.value)
    assert len(str(e.value)) < 700
    return e.value


@pytest.mark.parametrize("name", BAD)
def test_a_bad_field_of_a_completion_is_named(name):
    for value in BAD[name]:
        body = {"model": "m", "prompt": "x", "stream": True, name: value}
        error = refused(read_completion, body)
        assert error.param.startswith(name[:200]), (value, str(error))
        assert error.body()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize("name", sorted(set(BAD) - {"prompt", "echo", "logprobs", "best_of"}))
def test_a_bad_field_of_a_chat_is_named(name):
    for value in BAD[name]:
        body = {"model": "m", "messages": [{"role": "user", "content": "x"}], "stream": True}
        assert refused(read_chat, body | {name: value}).param.startswith(name[:200])


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"messages": None}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": "x"}, "messages"),
        ({"messages": ["x"]}, "messages[0]"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": ["user"], "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": 1}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": []}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
         "messages[0].content[0].type"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]},
         "messages[0].content[0].text"),
        ({"messages": [{"role": "assistant", "content": "x", "tool_calls": [1]}]},
         "messages[0].tool_calls"),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0].content"),
        ({"messages": [{"role": "system", "content": "x", "refusal": "y"}]},
         "messages[0].refusal"),
        ({"messages": [{"role": "user", "content": [{"type": "refusal", "refusal": "x"}]}]},
         "messages[0].content[0].type"),
        ({"messages": [{"role": "assistant", "content": "x", "refusal": "y"}]},
         "messages[0].refusal"),
        ({"messages": [{"role": "assistant", "content": None, "audio": {"id": "x"}}]},
         "messages[0].audio"),
        ({"tools": [1]}, "tools"),
        ({"tools": False}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"parallel_tool_calls": 1}, "parallel_tool_calls"),
        ({"reasoning_effort": "low"}, "reasoning_effort"),
        ({"verbosity": "low"}, "verbosity"),
        ({"functions": [1]}, "functions"),
        ({"response_format": {"type": "json_object"}}, "response_format.type"),
        ({"modalities": ["audio"]}, "modalities[0]"),
        ({"audio": {}}, "audio"),
        ({"logprobs": 1}, "logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"top_logprobs": 1}, "top_logprobs"),
        ({"max_tokens": 1, "max_completion_tokens": 1}, "max_tokens"),
        ({"max_completion_tokens": 0}, "max_completion_tokens"),
        ({"stream_options": {}}, "stream_options"),
        ({"model": None}, "model"),
    ],
)  # fmt: skip
def test_what_a_chat_cannot_be_is_named(change, param):
    body = {"model": "m", "messages": [{"role": "user", "content": "x"}]}
    assert refused(read_chat, body | change).param == param


def test_fields_at_odds_are_named():
    body = {"model": "m", "prompt": ["a", "b"]}
    assert refused(read_completion, body | {"save_as": "s"}).param == "save_as"
    assert refused(read_completion, body | {"session": "s", "echo": True}).param == "echo"
    assert refused(read_completion, body | {"stream_options": {}}).param == "stream_options"
    for body in ([], "x", None, 1):
        error = refused(read_completion, body)
        assert "the body is" in str(error)
        assert "give a JSON object" in str(error)
        assert error.param is None


def test_a_number_within_the_range_that_is_none_in_float32_is_told_so():
    error = refused(read_completion, {"model": "m", "temperature": 1e-300})
    assert "temperature is 1e-300: it is 0 in float32" in str(error)


def test_what_programs_send_is_read():
    body = read_completion(
        {"model": "m", "prompt": [1, 2], "suffix": None, "user": "me", "best_of": 2, "n": 2,
         "top_k": -1, "stop": None, "logit_bias": {"5": -100}, "stop_token_ids": [3]}
    )  # fmt: skip
    assert (body.prompt, body.top_k, body.stop) == (((1, 2),), 0, ())
    assert (body.logit_bias, body.stop_token_ids) == (((5, -100.0),), (3,))
    chat = read_chat(
        {"model": "m", "tools": None, "store": False, "metadata": {"a": "b"},
         "response_format": {"type": "text"}, "modalities": ["text"], "stop": "x",
         "messages": [{"role": "developer", "content": "a"},
                      {"role": "user", "name": "eve", "content": [{"type": "text", "text": "b"},
                                                                  {"type": "text", "text": "c"}]},
                      {"role": "assistant", "content": "d", "tool_calls": None}]}
    )  # fmt: skip
    assert chat.messages == (
        Message("system", "a"), Message("user", "b\nc", "eve"), Message("assistant", "d"),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        ({"content": None, "tool_calls": []}, ""),
        ({}, ""),
        ({"content": None, "refusal": "No.", "annotations": [{"type": "url_citation"}]}, "No."),
        ({"content": [{"type": "text", "text": "a"}, {"type": "refusal", "refusal": "b"}]}, "a\nb"),
    ],
)
def test_answers_that_clients_hand_back_are_read(answer, text):
    messages = [{"role": "user", "content": "x"}, {"role": "assistant"} | answer]
    body = {"model": "m", "messages": messages, "tools": [], "tool_choice": "none",
            "parallel_tool_calls": True, "functions": [], "function_call": "auto",
            "reasoning_effort": "none", "verbosity": "medium"}  # fmt: skip
    assert read_chat(body).messages[1] == Message("assistant", text)


@pytest.mark.parametrize(
    "data",
    [
        b"", b"{", b'{"a": 1, "a": 2}', b'{"a": {"b": 1, "b": 1}}', b"NaN", b'{"a": Infinity}',
        b'{"a": -Infinity}', b"[" * 200 + b"]" * 200, b"[" * 10**5, b'{"a": ' * 500, b"\xff\xfe{}",
        b'{"a": "\xff"}', b'{"a": "\\ud800"}', b'{"\\udc00": 1}', b'{"a": ' + b"9" * 5000 + b"}",
        '{"a": 1}'.encode("utf-16"), b"\xef\xbb\xbf{}", b'{"a": 1} x', b"'a'",
    ],
    ids=lambda data: repr(data[:20]),
)  # fmt: skip
def test_a_body_that_is_no_json_is_refused(data):
    assert refused(parse_body, data).code == "invalid_json"


def test_content_types():
    for good in ("application/json", "application/json; charset=UTF-8", "Application/JSON"):
        check_content_type(good)
    for bad in (None, "", "text/plain", "application/jsonx", "application/x-www-form-urlencoded",
                "application/json; charset=utf-16", "multipart/form-data"):  # fmt: skip
        with pytest.raises(RequestError) as e:
            check_content_type(bad)
        assert e.value.status == 415
