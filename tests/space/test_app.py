"""The chat app without a browser: the OpenAI-style API, its errors, and what the page's parts say."""

import json
import re
import signal
import subprocess
import sys
import time

import httpx
import openai
import pytest
from pydantic import ValidationError

from tests.support.project import ROOT

slow = pytest.mark.slow
HELLO = [{"role": "user", "content": "What is the capital of France?"}]


# Parts that need no model.


def chunks(*texts, finish="length"):
    from engine import Chunk

    return [
        Chunk(text, i + 1, finish if i + 1 == len(texts) else None, prompt_tokens=5) for i, text in enumerate(texts)
    ]


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
    from stop_sequences import until_stop

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
    from openai_schema import ChatRequest, problems

    with pytest.raises(ValidationError) as raised:
        ChatRequest.model_validate_json(json.dumps({"messages": HELLO, **change}))
    message, first = problems(raised.value)
    assert first == where and message.startswith(f"{where}: ") and "\n" not in message


@pytest.mark.parametrize("body", ["", "[", "[]", "null", "[" * 100_000, '{"messages": "\\ud800"}', "\x00", "NaN"])
def test_what_is_no_request_is_refused(body):
    from openai_schema import ChatRequest

    with pytest.raises(ValidationError):
        ChatRequest.model_validate_json(body)


def test_optional_fields_may_be_null_and_neutral():
    from openai_schema import ChatRequest

    neutral = {"n": 1, "presence_penalty": 0, "frequency_penalty": 0.0, "logprobs": False, "tools": None}
    asked = ChatRequest.model_validate({"messages": HELLO, "temperature": None, "stop": None, **neutral})
    assert asked.sampling == {} and asked.stops == []


def test_the_models_never_read_the_line_of_figures():
    from conversation import answer, as_messages, last_question, question, stopped

    history = [question("one"), answer("two", "3 tokens"), question("three"), answer("", "…")]
    assert as_messages(history, " Be brief. ") == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "two"},
        {"role": "user", "content": "three"},
    ]
    assert as_messages(history, "  ")[0] == {"role": "user", "content": "one"}
    assert [last_question(history, i) for i in range(4)] == [0, 0, 2, 2]
    assert stopped(history)[-1] == answer("", "stopped")
    assert stopped(history[:2])[-1] == answer("two", "3 tokens · stopped")


def test_figures_say_speed_limit_and_lost_turns():
    from conversation import figures
    from progress import Progress

    assert figures(Progress("a", 1, 0.01, None, None, 0)) == "1 token"
    assert figures(Progress("a b", 20, 0.31, 41.26, "stop", 0)) == "20 tokens · 41.3 tokens/s · first after 0.3 s"
    assert figures(Progress("a", 8, 0, 10.0, "length", 2)).endswith(
        "cut at max tokens · no room for the 2 oldest turns: not read"
    )


def test_speed_counts_the_time_inside_the_model_alone():
    from progress import progress

    def model():
        for chunk in chunks(*"abcdef"):
            time.sleep(0.02)
            yield chunk

    last = None
    for state in progress(model()):
        time.sleep(0.05)  # a slow reader
        last = state
    assert (last.text, last.tokens) == ("abcdef", 6)
    assert 20 < last.tokens_per_second <= 50 and last.first_after >= 0.02


def test_two_answers_grow_in_turns():
    from progress import progress, side_by_side

    states = list(side_by_side({"a": progress(iter(chunks(*"123"))), "b": progress(iter(chunks("x")))}))
    assert [{name: state.text for name, state in both.items()} for both in states] == [
        {"a": "1"},
        {"a": "1", "b": "x"},
        {"a": "12", "b": "x"},
        {"a": "123", "b": "x"},
    ]


def test_a_card_shows_what_it_holds_and_nothing_else():
    from card import about, subtitle, title

    card = {
        "name": "tuned",
        "base_model": {"source": "microsoft/phi-2", "revision": "ef38", "license": "mit"},
        "datasets": [{"source": "file:data/sample/oasst_sample.jsonl", "revision": None, "license": "<b>"}],
        "training": {"params": {"lora_r": 16, "languages": ["en", "de"]}, "train_conversations": 3},
        "export": {"export_precision": "int4"},
        "held_out": {"conversations": 2, "supervised_tokens": 9},
        "quality": {"perplexity": 9.876, "bytes": 2_000_000},
    }
    assert title(card) == "phi-2, tuned" and "oasst_sample · int4" in subtitle(card)
    page = about({"tuned": card, "base": {"name": "base", "quality": {"perplexity": 10}}})
    for line in ("| perplexity | 10.00 | 9.88 |", "| size, MB | – | 2 |", "| languages | `en, de` |", "`ef38`"):
        assert line in page
    assert "<b>" not in page
    assert (title({}), about({"tuned": {}})) == ("Chat", "")


def test_space_imports_nothing_of_the_project_but_itself():
    for path in (ROOT / "space").glob("*.py"):
        assert not re.search(r"^\s*(from|import) (stages|torch|transformers)\b", path.read_text(), re.M), path


# The whole app, with tiny models.


@pytest.fixture(scope="module")
def app(tiny_models):
    from engine import Engine
    from fair_queue import FairQueue

    from tests.support.serving import served

    engines = {name: Engine(tiny_models / name, threads=1) for name in ("tuned", "base")}
    with served(engines, FairQueue()) as address:
        yield address


@pytest.fixture
def client(app):
    with openai.OpenAI(base_url=f"{app}/v1", api_key="none", max_retries=0) as client:
        yield client


@slow
def test_the_openai_client_gets_an_answer(client):
    options = {"model": "tuned", "messages": HELLO, "max_tokens": 12, "temperature": 0}
    whole = client.chat.completions.create(**options)
    choice = whole.choices[0]
    assert (choice.finish_reason, choice.message.role, whole.model) == ("length", "assistant", "tuned")
    assert choice.message.content
    assert whole.usage.completion_tokens == 12 and whole.usage.prompt_tokens > 5
    assert whole.usage.total_tokens == whole.usage.completion_tokens + whole.usage.prompt_tokens

    pieces = list(client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True}))
    assert "".join(p.choices[0].delta.content or "" for p in pieces if p.choices) == choice.message.content
    assert [p.choices[0].finish_reason for p in pieces if p.choices and p.choices[0].finish_reason] == ["length"]
    assert len({p.id for p in pieces}) == 1 and len(pieces) > 5
    assert pieces[-1].usage.completion_tokens == 12

    other = client.chat.completions.create(**{**options, "model": "base"})
    assert other.choices[0].message.content != choice.message.content


@slow
def test_a_conversation_goes_on_with_the_clients_own_message(client):
    options = {"model": "tuned", "max_tokens": 8, "temperature": 0}
    messages = list(HELLO)
    first = client.chat.completions.create(messages=messages, **options)
    messages += [first.choices[0].message, {"role": "user", "content": "Are you sure?"}]
    second = client.chat.completions.create(messages=messages, **options)
    assert second.usage.prompt_tokens > first.usage.prompt_tokens + 8


@slow
def test_without_a_system_message_the_one_of_training_is_read(client):
    system = {"role": "system", "content": "You are a helpful assistant."}  # the tiny models' card
    read = [
        client.chat.completions.create(model="tuned", messages=messages, max_tokens=1).usage.prompt_tokens
        for messages in (HELLO, [system, *HELLO], [{"role": "system", "content": ""}, *HELLO])
    ]
    assert read[0] == read[1] > read[2]


@slow
def test_what_no_model_could_read_is_refused_before_the_line(client):
    with pytest.raises(openai.BadRequestError, match="characters are too long, more than"):
        client.chat.completions.create(model="tuned", messages=[{"role": "user", "content": "a " * 200_000}])


@slow
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


@slow
def test_models_are_listed_and_described(client, app):
    assert [model.id for model in client.models.list()] == ["tuned", "base"]
    assert client.models.retrieve("base").id == "base"
    with pytest.raises(openai.NotFoundError, match="there is no model 'gpt-4', only: tuned, base"):
        client.models.retrieve("gpt-4")
    health = httpx.get(f"{app}/health").json()
    assert health == {"status": "ok", "models": ["tuned", "base"], "running": 0, "waiting": 0}


@slow
def test_errors_have_openais_shape(client, app):
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

    url = f"{app}/v1/chat/completions"
    json_type = {"Content-Type": "application/json"}
    body = json.dumps({"messages": HELLO})
    for status, response in {
        415: httpx.post(url, content=body, headers={"Content-Type": "text/plain"}),
        405: httpx.get(url),
        404: httpx.post(f"{app}/v1/embeddings", json={}),
        400: httpx.post(url, content=b"{", headers=json_type),
        413: httpx.post(url, content=b" " * (1 << 20) + b"{}", headers=json_type),
    }.items():
        assert response.status_code == status
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}
    chunked = httpx.post(url, content=(b" " * 65536 for _ in range(32)), headers=json_type)
    assert chunked.status_code == 413
    assert httpx.post(f"{app}/gradio_api/upload", files={"files": b"x"}).status_code == 404


@slow
def test_old_turns_that_did_not_fit_are_told(client):
    turns = [{"role": role, "content": f"{role} says something " * 20} for role in ("user", "assistant")] * 15
    answer = client.chat.completions.create(model="tuned", messages=[*turns, *HELLO], max_tokens=4)
    assert answer.model_extra["dropped_turns"] > 0
    assert answer.usage.prompt_tokens <= 2048


@slow
def test_the_page_is_quiet_about_its_own_api(app):
    page = httpx.get(app)
    assert page.status_code == 200 and "default-src 'self'" in page.headers["Content-Security-Policy"]
    assert httpx.get(f"{app}/docs").status_code == 404
    assert httpx.get(f"{app}/openapi.json").status_code == 404
    assert httpx.get(f"{app}/gradio_api/info").json()["named_endpoints"] == {}


@slow
def test_a_failing_engine_is_one_error_and_no_end(tiny_models):
    from engine import Engine
    from fair_queue import FairQueue

    from tests.support.serving import served

    class Broken:
        def __init__(self, engine):
            self.card, self.context_length, self._engine = engine.card, engine.context_length, engine
            self.broken = True

        def stream(self, *args):
            for i, chunk in enumerate(self._engine.stream(*args)):
                if self.broken and i == self.fails_at:
                    raise RuntimeError("secret detail")
                yield chunk

    engine = Broken(Engine(tiny_models / "tuned", threads=1))
    with served({"tuned": engine}, FairQueue()) as address:
        with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client:
            engine.fails_at = 0
            with pytest.raises(openai.InternalServerError) as raised:
                client.chat.completions.create(model="tuned", messages=HELLO)
            assert "secret" not in str(raised.value)
            engine.fails_at = 3
            with pytest.raises(openai.APIError, match="the server failed"):
                list(client.chat.completions.create(model="tuned", messages=HELLO, stream=True))
            engine.broken = False
            assert client.chat.completions.create(model="tuned", messages=HELLO, max_tokens=3).choices


# The command.


@slow
def test_the_command_serves_and_says_one_line_when_it_cannot(tiny_models, tmp_path):
    from bench.chat_server import chat_server

    def refused(*arguments) -> str:
        result = subprocess.run(
            [sys.executable, "space/app.py", *map(str, arguments)],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert result.returncode != 0
        return result.stderr

    with chat_server(tiny_models) as (address, process):
        port = address.rpartition(":")[2]
        assert httpx.get(address).status_code == 200
        lines = refused("--models", tiny_models, "--port", port).splitlines()
        assert len(lines) == 1 and lines[0].startswith(f"error: 127.0.0.1:{port} cannot be served")
        process.send_signal(signal.SIGINT)  # Ctrl+C
        assert process.wait(20) == 130
    lines = refused("--models", tmp_path, "--port", 0).splitlines()
    assert len(lines) == 1 and "no exported model" in lines[0]
    assert refused("--models", tiny_models, "--port", 70000).startswith("error: --port 70000: ")
