"""The running app without a browser: the OpenAI-style API, its errors, and the page's headers."""

import json

import httpx
import openai
import pytest

from chatapp.server.fair_queue import FairQueue
from chatapp.server.request_guard import MAX_BODY
from tests.support.serving import Failing, served

pytestmark = pytest.mark.slow
HELLO = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture
def client(address):
    with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_the_openai_client_gets_an_answer(client):
    options = {"model": "tuned", "messages": HELLO, "max_tokens": 12, "temperature": 0}
    complete = client.chat.completions.create(**options)
    choice = complete.choices[0]
    assert (choice.finish_reason, choice.message.role, complete.model) == ("length", "assistant", "tuned")
    assert choice.message.content
    assert complete.usage.completion_tokens == 12 and complete.usage.prompt_tokens > 5
    assert complete.usage.total_tokens == complete.usage.completion_tokens + complete.usage.prompt_tokens

    pieces = list(client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True}))
    assert "".join(p.choices[0].delta.content or "" for p in pieces if p.choices) == choice.message.content
    assert [p.choices[0].finish_reason for p in pieces if p.choices and p.choices[0].finish_reason] == ["length"]
    assert len({p.id for p in pieces}) == 1 and len(pieces) > 5
    assert pieces[-1].usage.completion_tokens == 12

    other = client.chat.completions.create(**{**options, "model": "base"})
    assert other.choices[0].message.content != choice.message.content


def test_a_conversation_goes_on_with_the_clients_own_message(client):
    options = {"model": "tuned", "max_tokens": 8, "temperature": 0}
    messages = list(HELLO)
    first = client.chat.completions.create(messages=messages, **options)
    messages += [first.choices[0].message, {"role": "user", "content": "Are you sure?"}]
    second = client.chat.completions.create(messages=messages, **options)
    assert second.usage.prompt_tokens > first.usage.prompt_tokens + 8


def test_without_a_system_message_the_one_of_training_is_read(client):
    system = {"role": "system", "content": "You are a helpful assistant."}  # the tiny models' card
    read = [
        client.chat.completions.create(model="tuned", messages=messages, max_tokens=1).usage.prompt_tokens
        for messages in (HELLO, [system, *HELLO], [{"role": "system", "content": ""}, *HELLO])
    ]
    assert read[0] == read[1] > read[2]


def test_what_no_model_could_read_is_refused_before_the_queue(client):
    with pytest.raises(openai.BadRequestError, match="characters are too many, at most .* fit"):
        client.chat.completions.create(model="tuned", messages=[{"role": "user", "content": "a " * 200_000}])


def test_seed_stop_and_text_parts_do_what_openai_says(client):
    parts = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
    ]
    plain = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    answers = [
        client.chat.completions.create(
            model="tuned", messages=messages, seed=7, max_completion_tokens=20, temperature=1
        )
        for messages in (parts, plain)
    ]
    first, second = (answer.choices[0].message.content for answer in answers)
    assert first == second
    stop = first[4:6]
    cut = client.chat.completions.create(
        model="tuned", messages=plain, seed=7, max_tokens=20, temperature=1, stop=[stop]
    ).choices[0]
    assert (cut.message.content, cut.finish_reason) == (first[: first.index(stop)], "stop")


def test_models_are_listed_and_described(client, address):
    assert [model.id for model in client.models.list()] == ["tuned", "base"]
    assert client.models.retrieve("base").id == "base"
    with pytest.raises(openai.NotFoundError, match="there is no model 'gpt-4', only: tuned, base"):
        client.models.retrieve("gpt-4")
    health = httpx.get(f"{address}/health").json()
    assert health == {"status": "ok", "models": ["tuned", "base"], "running": 0, "waiting": 0}


def test_errors_have_openais_shape(client, address):
    with pytest.raises(openai.BadRequestError) as raised:
        client.chat.completions.create(model="tuned", messages=HELLO, temperature=9)
    assert raised.value.param == "temperature" and raised.value.type == "invalid_request_error"
    with pytest.raises(openai.NotFoundError) as raised:
        client.chat.completions.create(model="gpt-4", messages=HELLO)
    assert raised.value.code == "model_not_found"
    for stream in (False, True):
        for messages in ([{"role": "assistant", "content": "x"}], [{"role": "user", "content": "word " * 9000}]):
            with pytest.raises(openai.BadRequestError) as raised:
                client.chat.completions.create(model="tuned", messages=messages, stream=stream)
            assert raised.value.param == "messages"
    with pytest.raises(openai.BadRequestError, match="context has 2048 tokens"):
        client.chat.completions.create(model="tuned", messages=HELLO, max_tokens=4096)

    url = f"{address}/v1/chat/completions"
    json_type = {"Content-Type": "application/json"}
    body = json.dumps({"messages": HELLO})
    for status, response in {
        415: httpx.post(url, content=body, headers={"Content-Type": "text/plain"}),
        405: httpx.get(url),
        404: httpx.post(f"{address}/v1/embeddings", json={}),
        400: httpx.post(url, content=b"{", headers=json_type),
        413: httpx.post(url, content=b" " * MAX_BODY + b"{}", headers=json_type),
    }.items():
        assert response.status_code == status
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}
    chunked = httpx.post(url, content=(b" " * 65536 for _ in range(MAX_BODY // 65536 + 1)), headers=json_type)
    assert chunked.status_code == 413 and chunked.json()["error"]["message"].startswith("a request may have at most")
    assert httpx.post(f"{address}/gradio_api/upload", files={"files": b"x"}).status_code == 404


def test_old_turns_that_did_not_fit_are_reported(client):
    turns = [{"role": role, "content": f"{role} says something " * 20} for role in ("user", "assistant")] * 15
    answer = client.chat.completions.create(model="tuned", messages=[*turns, *HELLO], max_tokens=4)
    assert answer.model_extra["dropped_turns"] > 0
    assert answer.usage.prompt_tokens <= 2048


def test_the_page_is_quiet_about_its_own_api(address):
    page = httpx.get(address)
    assert page.status_code == 200 and "default-src 'self'" in page.headers["Content-Security-Policy"]
    assert httpx.get(f"{address}/docs").status_code == 404
    assert httpx.get(f"{address}/openapi.json").status_code == 404
    assert httpx.get(f"{address}/gradio_api/info").json()["named_endpoints"] == {}


def test_a_failing_engine_gives_one_error_and_the_app_goes_on(engines):
    engine = Failing(engines["tuned"])
    with served({"tuned": engine}, FairQueue()) as address:
        with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client:
            engine.fails_at = 0
            with pytest.raises(openai.InternalServerError) as raised:
                client.chat.completions.create(model="tuned", messages=HELLO)
            assert "secret" not in str(raised.value)
            engine.fails_at = 3
            with pytest.raises(openai.APIError, match="the server failed"):
                list(client.chat.completions.create(model="tuned", messages=HELLO, stream=True))
            engine.fails_at = None
            assert client.chat.completions.create(model="tuned", messages=HELLO, max_tokens=3).choices
