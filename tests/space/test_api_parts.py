"""The parts of the API that need no model: requests are checked, stop sequences end an answer."""

import json

import pytest
from pydantic import ValidationError

from chatapp.server.openai_schema import ChatRequest, problems
from chatapp.server.stop_sequences import until_stop
from tests.support.chunks import chunks

HELLO = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.mark.parametrize(
    "texts, stops, answer, finish",
    [
        (["one ", "two ", "three"], [], "one two three", "length"),
        (["one ", "two ", "three"], ["two"], "one ", "stop"),
        (["a", "b", "c", "d"], ["bc"], "a", "stop"),  # across pieces
        (["a", "b", "x", "d"], ["bc"], "abxd", "length"),  # what only began like one
        (["ab", "ab", "ac"], ["abac"], "ab", "stop"),
        (["one END two"], ["two", "END"], "one ", "stop"),  # the first of them
        (["a", "E", "N"], ["END"], "aEN", "length"),  # held back, and given at the end
    ],
)
def test_an_answer_ends_at_the_first_stop_sequence(texts, stops, answer, finish):
    got = list(until_stop(iter(chunks(*texts)), stops))
    assert "".join(chunk.text for chunk in got) == answer
    assert [chunk.finish_reason for chunk in got if chunk.finish_reason] == [finish]


@pytest.mark.parametrize(
    "change, where",
    [
        ({"messages": []}, "messages"),
        ({"messages": "hello"}, "messages"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
        ({"messages": HELLO * 1001}, "messages"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": 2.5}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"seed": 2**63}, "seed"),
        ({"stream": "yes"}, "stream"),
        ({"n": 2}, "n"),
        ({"stop": [""]}, "stop"),
        ({"stop": ["a"] * 5}, "stop"),
        ({"logprobs": True}, "logprobs"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"model": 5}, "model"),
    ],
)
def test_a_wrong_field_is_named(change, where):
    with pytest.raises(ValidationError) as raised:
        ChatRequest.model_validate_json(json.dumps({"messages": HELLO, **change}))
    message, first = problems(raised.value)
    assert first == where and message.startswith(f"{where}: ") and "\n" not in message


@pytest.mark.parametrize("body", ["", "[", "[]", "null", "[" * 100_000, '{"messages": "\\ud800"}', "\x00", "NaN"])
def test_what_is_no_request_is_refused(body):
    with pytest.raises(ValidationError):
        ChatRequest.model_validate_json(body)


def test_optional_fields_may_be_null_and_neutral():
    neutral = {"n": 1, "presence_penalty": 0, "frequency_penalty": 0.0, "logprobs": False, "tools": None}
    asked = ChatRequest.model_validate({"messages": HELLO, "temperature": None, "stop": None, **neutral})
    assert asked.sampling == {} and asked.stops == []
