"""Clients as they are: the requests that they send, word for word, and a chat front end.

The bodies were recorded from openai 3.57, langchain-openai 1.7 and llm 0.36. Only the texts are shortened.
"""

import json

import gradio as gr
import httpx
import pytest

pytestmark = pytest.mark.slow
HI = [{"content": "Hi", "role": "user"}]
LANGCHAIN = {"model": "tuned", "stream": False, "max_completion_tokens": 8, "temperature": 0.0}
# LangChain's OpenAI, for text completions, sends its defaults with each request.
LANGCHAIN_TEXT = {
    "model": "tuned",
    "frequency_penalty": 0,
    "logprobs": None,
    "max_tokens": 8,
    "n": 1,
    "presence_penalty": 0,
    "seed": None,
    "temperature": 0.7,
    "top_p": 1,
}
USAGE = {"include_usage": True}
LLM = {"model": "tuned", "stream": True, "max_tokens": 8, "stream_options": USAGE}
YO = {"content": "Yo", "role": "assistant"}
SYSTEM = [{"content": "Be brief.", "role": "system"}, {"content": "Be kind.", "role": "system"}]
FULL_ANSWER = {
    "content": "Yo",
    "refusal": None,
    "role": "assistant",
    "annotations": [],
    "audio": None,
    "function_call": None,
    "tool_calls": None,
}
CHATS = {
    "langchain invoke": {**LANGCHAIN, "messages": HI},
    "langchain system messages": {**LANGCHAIN, "messages": [*SYSTEM, *HI, YO, *HI]},
    "langchain late system message": {**LANGCHAIN, "messages": [*HI, YO, SYSTEM[0], *HI]},
    "langchain stream": {**LANGCHAIN, "stream": True, "messages": HI},
    "langchain logprobs": {**LANGCHAIN, "messages": HI, "logprobs": True, "top_logprobs": 2},
    "langchain all options": {
        "model": "tuned",
        "stream": False,
        "service_tier": "default",
        "messages": HI,
        "frequency_penalty": 0.5,
        "max_completion_tokens": 4,
        "n": 2,
        "presence_penalty": 0.5,
        "reasoning_effort": "low",
        "seed": 1,
        "stop": ["x"],
    },
    "langchain bind_tools of nothing": {**LANGCHAIN, "messages": HI, "tools": []},
    "langchain json_mode": {**LANGCHAIN, "messages": HI, "response_format": {"type": "json_object"}},
    "openai stream": {
        "model": "tuned",
        "stream": True,
        "messages": HI,
        "max_tokens": 4,
        "n": 2,
        "stream_options": USAGE,
    },
    "openai answer given back": {"model": "tuned", "messages": [*HI, FULL_ANSWER, *HI], "max_tokens": 4},
    "openai stream helper": {"model": "tuned", "stream": True, "messages": HI, "logprobs": True, "max_tokens": 4},
    "llm": {**LLM, "messages": [SYSTEM[0], *HI]},
    "llm -c": {**LLM, "messages": [SYSTEM[0], *HI, YO, *HI]},
    "llm json": {**LLM, "messages": HI, "response_format": {"type": "json_object"}},
    "llm --no-stream": {
        "model": "tuned",
        "stream": False,
        "messages": HI,
        "frequency_penalty": 0.5,
        "logit_bias": {},
        "max_tokens": 8,
        "presence_penalty": 0.5,
        "seed": 3,
        "stop": "x",
        "temperature": 0.5,
    },
}
TEXTS = {
    "langchain invoke": {**LANGCHAIN_TEXT, "prompt": ["Once"]},
    "langchain stream": {**LANGCHAIN_TEXT, "prompt": "Once", "stream": True},
    "langchain best_of": {**LANGCHAIN_TEXT, "prompt": ["Once"], "best_of": 2, "logprobs": 2, "n": 2},
    "llm completion": {**LLM, "prompt": "Hi"},
    "llm completion --no-stream": {"model": "tuned", "stream": False, "prompt": "Hi", "logprobs": 2, "max_tokens": 8},
}


def asked(address: str, path: str, body: dict) -> list[dict]:
    """The objects of the answer: one, or those of a stream."""
    response = httpx.post(f"{address}/v1/{path}", json=body, headers={"Authorization": "Bearer k"}, timeout=60)
    assert response.status_code == 200, response.text
    if not body.get("stream"):
        return [response.json()]
    assert response.headers["content-type"].startswith("text/event-stream")
    *events, done = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    assert done == "[DONE]"
    return [json.loads(each) for each in events]


@pytest.mark.parametrize("name", CHATS)
def test_the_chat_requests_of_clients_are_answered(name, address):
    body = CHATS[name]
    objects = asked(address, "chat/completions", body)
    kind = "chat.completion.chunk" if body.get("stream") else "chat.completion"
    assert {each["object"] for each in objects} == {kind}
    ended = [choice for each in objects for choice in each["choices"] if choice["finish_reason"]]
    assert sorted(choice["index"] for choice in ended) == list(range(body.get("n", 1)))
    if body.get("stream_options"):
        assert objects[-1]["choices"] == [] and objects[-1]["usage"]["completion_tokens"] > 0
    with_logprobs = [choice for each in objects for choice in each["choices"] if choice["logprobs"]]
    assert bool(with_logprobs) == body.get("logprobs", False)


@pytest.mark.parametrize("name", TEXTS)
def test_the_text_requests_of_clients_are_answered(name, address):
    body = TEXTS[name]
    objects = asked(address, "completions", body)
    assert {each["object"] for each in objects} == {"text_completion"}
    ended = [choice for each in objects for choice in each["choices"] if choice["finish_reason"]]
    assert sorted(choice["index"] for choice in ended) == list(range(body.get("n", 1)))
    assert any(choice["text"] for each in objects for choice in each["choices"])


@pytest.mark.parametrize("streaming", [True, False])
def test_a_chat_front_end_speaks_the_api(streaming, address):
    """`gr.load_chat` makes a chat page for any server of OpenAI's API. It sends its history with each question."""
    front_end = gr.load_chat(f"{address}/v1", "tuned", "k", file_types=None, streaming=streaming)
    history: list[dict] = []
    for question in ("Hi", "And?"):
        answers = front_end.fn(question, history)
        *_, answer = answers if streaming else [answers]
        assert answer
        for role, text in (("user", question), ("assistant", answer)):
            history.append({"role": role, "content": [{"type": "text", "text": text}]})
