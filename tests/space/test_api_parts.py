"""The parts of the API that need no model: requests are checked, stop sequences end an answer."""

import json
from dataclasses import replace

import pytest
from pydantic import ValidationError

from chatapp.engine import Sampling, TokenLogprob
from chatapp.server.openai_schema import ChatRequest, CompletionRequest, problems
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
        ({"messages": [{"role": "user", "content": None}]}, "messages[0].content"),
        ({"messages": [{"role": "assistant", "content": "x", "tool_calls": [{}]}, *HELLO]}, "messages[0].tool_calls"),
        ({"messages": [{"role": "assistant", "refusal": "no"}, *HELLO]}, "messages[0].refusal"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": 2.5}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"seed": 2**63}, "seed"),
        ({"stream": "yes"}, "stream"),
        ({"n": 5}, "n"),
        ({"n": 0}, "n"),
        ({"presence_penalty": 2.1}, "presence_penalty"),
        ({"frequency_penalty": "1"}, "frequency_penalty"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"response_format": {"type": "json_schema", "json_schema": {}}}, "response_format.type"),
        ({"min_p": 0.1}, "min_p"),
        ({"min_p": False}, "min_p"),
        ({"logit_bias": {"50256": -100}}, "logit_bias"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"functions": [{"name": "f"}]}, "functions"),
        ({"web_search_options": {}}, "web_search_options"),
        ({"stop": [""]}, "stop"),
        ({"stop": ["a"] * 5}, "stop"),
        ({"logprobs": 1}, "logprobs"),
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


NEUTRAL = {
    "n": 1,
    "presence_penalty": 0,
    "frequency_penalty": 0.0,
    "logprobs": False,
    "top_logprobs": 0,
    "tools": [],
    "tool_choice": "auto",
    "functions": [],
    "function_call": "none",
    "parallel_tool_calls": True,
    "service_tier": "auto",
    "logit_bias": {},
    "modalities": ["text"],
    "min_p": 0,
    "prompt_cache_key": "k",
    "safety_identifier": "me",
    "reasoning_effort": "low",
    "verbosity": "medium",
    "response_format": {"type": "text"},
    "user": "me",
    "metadata": {"a": "b"},
    "store": False,
}


@pytest.mark.parametrize("name", NEUTRAL)
@pytest.mark.parametrize("is_null", [False, True])
def test_what_changes_nothing_is_accepted(name, is_null):
    asked = ChatRequest.model_validate_json(json.dumps({"messages": HELLO, name: None if is_null else NEUTRAL[name]}))
    changed = {name: value for name, value in asked.sampling.items() if value}
    assert changed == {} and asked.stops == [] and asked.conversation == HELLO and (asked.n or 1) == 1


def test_a_message_of_an_answer_comes_back():
    answer = {"role": "assistant", "content": "Yo", "id": "msg_1", "annotations": [], "tool_calls": [], "refusal": None}
    asked = ChatRequest.model_validate({"messages": [*HELLO, {**answer, "audio": None, "function_call": None}, *HELLO]})
    assert asked.conversation == [*HELLO, {"role": "assistant", "content": "Yo"}, *HELLO]
    # One without content says nothing.
    for empty in ({"content": None}, {}):
        asked = ChatRequest.model_validate({"messages": [*HELLO, {"role": "assistant", **empty}, *HELLO]})
        assert asked.conversation == [*HELLO, *HELLO]


def test_options_reach_the_engine_by_its_names():
    options = {"presence_penalty": 0.5, "frequency_penalty": -1, "logprobs": True, "top_logprobs": 3, "seed": -1}
    more = {"max_tokens": 5, "max_completion_tokens": 6, "response_format": {"type": "json_object"}}
    asked = ChatRequest.model_validate({"messages": HELLO, **options, **more})
    assert Sampling(**asked.sampling) == Sampling(
        max_tokens=6, presence_penalty=0.5, frequency_penalty=-1, logprobs=3, seed=2**63 - 1, json_object=True
    )
    asked = CompletionRequest.model_validate({"prompt": "Once", "logprobs": 0})
    assert Sampling(**asked.sampling) == Sampling(max_tokens=16, logprobs=0)


@pytest.mark.parametrize(
    "change, where",
    [
        ({"prompt": [1, 2]}, "prompt"),
        ({"prompt": ["a"] * 5}, "prompt"),
        ({"prompt": ["a", "b"], "n": 3}, "prompt"),
        ({"logprobs": 6}, "logprobs"),
        ({"echo": True, "logprobs": 1}, "echo"),
        ({"best_of": 2}, "best_of"),
        ({"suffix": "end"}, "suffix"),
        ({"messages": HELLO}, "messages"),
    ],
)
def test_a_wrong_field_of_a_text_completion_is_named(change, where):
    with pytest.raises(ValidationError) as raised:
        CompletionRequest.model_validate_json(json.dumps({"prompt": "Once", **change}))
    message, first = problems(raised.value)
    assert first is not None and first.partition(".")[0] == where and "\n" not in message


def test_log_probabilities_stay_with_the_text_of_their_tokens():
    def said(*pairs):
        """The text and tokens of chunks, each of whose tokens is named by its text."""
        found = chunks(*(text for text, _ in pairs))
        logprobs = [tuple(TokenLogprob(token.encode(), -1.0) for token in tokens) for _, tokens in pairs]
        return iter(replace(chunk, logprobs=each) for chunk, each in zip(found, logprobs, strict=True))

    def tokens(answer) -> list[list[str]]:
        return [[each.token.decode() for each in chunk.logprobs] for chunk in answer]

    assert tokens(until_stop(said(("one ", ["one", " "]), ("two", ["two"])), [])) == [["one", " "], ["two"]]
    # "E" is held back until it is clear that it begins no stop sequence.
    held = list(until_stop(said(("a", ["a"]), ("E", ["E"]), ("x", ["x"]), ("", ["y"])), ["END"]))
    assert [chunk.text for chunk in held] == ["a", "Ex", ""] and tokens(held) == [["a"], ["E", "x"], ["y"]]
    # Tokens of the stop sequence, and those after it, are no part of the answer.
    cut = list(until_stop(said(("a", ["a"]), ("b E", ["b", " E"]), ("ND", ["N", "D"]), ("z", ["z"])), ["END"]))
    assert "".join(chunk.text for chunk in cut) == "ab " and tokens(cut) == [["a"], ["b", " E"], []]
