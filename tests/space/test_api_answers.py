"""What the API answers: several answers, log probabilities, JSON, text completions, long histories, who may ask."""

import json

import httpx
import openai
import pytest

from chatapp.server.access import Access
from chatapp.server.fair_queue import FairQueue
from tests.support.chats import chat
from tests.support.serving import Failing, served

pytestmark = pytest.mark.slow
HELLO = [{"role": "user", "content": "What is the capital of France?"}]
KEY, SITE = "s3cret", "https://chat.example"
ERROR = {"message", "type", "param", "code"}


@pytest.fixture
def client(address):
    with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def guarded(engines):
    """The address of an app with a key, whose API the pages of one other site may call."""
    with served(engines, FairQueue(), access=Access(KEY, (SITE,))) as address:
        yield address


def contents(completion) -> list[str]:
    return [choice.message.content for choice in completion.choices]


def test_several_answers_differ_and_their_seeds_repeat_them(client):
    options = {"model": "tuned", "messages": HELLO, "max_tokens": 12, "temperature": 1.5, "seed": 7}
    four = client.chat.completions.create(**options, n=4)
    assert [choice.index for choice in four.choices] == [0, 1, 2, 3] and len(set(contents(four))) == 4
    one, next_one = (client.chat.completions.create(**{**options, "seed": seed}) for seed in (7, 8))
    assert contents(four)[:2] == [*contents(one), *contents(next_one)]
    assert four.usage.prompt_tokens == one.usage.prompt_tokens and four.usage.completion_tokens == 48

    streamed = ["", "", "", ""]
    for piece in client.chat.completions.create(**options, n=4, stream=True, stream_options={"include_usage": True}):
        for choice in piece.choices:
            streamed[choice.index] += choice.delta.content or ""
    assert streamed == contents(four) and piece.usage.completion_tokens == 48


def test_penalties_change_the_answer_and_stay_out_of_the_prompt(client):
    options = {"model": "tuned", "messages": HELLO, "max_tokens": 40, "temperature": 0, "logprobs": True}

    def said(**penalty) -> list[str]:
        answer = client.chat.completions.create(**options, **penalty)
        return [each.token for each in answer.choices[0].logprobs.content]

    plain = said()
    assert len(set(plain)) < len(set(said(frequency_penalty=2, presence_penalty=2)))
    assert plain == said(frequency_penalty=0, presence_penalty=0)
    # The first token has nothing to be penalised for.
    assert plain[0] == said(frequency_penalty=2)[0] == said(presence_penalty=-2)[0]


def test_log_probabilities_have_openais_shape(client):
    options = {"model": "tuned", "messages": HELLO, "max_tokens": 10, "temperature": 0}
    answer = client.chat.completions.create(**options, logprobs=True, top_logprobs=3)
    found = answer.choices[0].logprobs.content
    assert len(found) == 10 and all(len(each.top_logprobs) == 3 for each in found)
    for each in found:
        assert each.top_logprobs[0].token == each.token and each.logprob == each.top_logprobs[0].logprob <= 0
        assert bytes(each.bytes).decode(errors="replace") == each.token
    text = b"".join(bytes(each.bytes) for each in found).decode(errors="ignore")
    assert text.strip() == answer.choices[0].message.content.replace("\ufffd", "")
    pieces = client.chat.completions.create(**options, logprobs=True, stream=True)
    streamed = [each for piece in pieces for c in piece.choices if c.logprobs for each in c.logprobs.content]
    assert [(each.token, each.logprob) for each in streamed] == [(each.token, each.logprob) for each in found]
    assert client.chat.completions.create(**options).choices[0].logprobs is None


def test_a_json_object_is_one(client):
    options = {"model": "tuned", "messages": HELLO, "max_tokens": 400, "temperature": 1, "seed": 1, "n": 4}
    answers = client.chat.completions.create(**options, response_format={"type": "json_object"})
    assert all(text.startswith("{") for text in contents(answers))
    complete = [choice.message.content for choice in answers.choices if choice.finish_reason == "stop"]
    assert complete and all(isinstance(json.loads(text), dict) for text in complete)
    assert not any(text.startswith("{") for text in contents(client.chat.completions.create(**options)))
    with pytest.raises(openai.BadRequestError, match="should be 'text' or 'json_object'") as raised:
        client.chat.completions.create(
            model="tuned", messages=HELLO, response_format={"type": "json_schema", "json_schema": {"name": "x"}}
        )
    assert raised.value.param == "response_format.type"


def test_a_text_goes_on(client, engines):
    options = {"model": "tuned", "max_tokens": 8, "temperature": 0}
    answer = client.completions.create(prompt="Once upon a time", logprobs=2, **options)
    choice = answer.choices[0]
    assert answer.object == "text_completion" and choice.finish_reason == "length"
    assert answer.usage.prompt_tokens == len(engines["tuned"]._prompt.tokenizer.encode("Once upon a time").ids)
    logprobs = choice.logprobs
    assert len(logprobs.tokens) == len(logprobs.token_logprobs) == len(logprobs.text_offset) == 8
    assert all(
        max(top, key=top.get) == token for top, token in zip(logprobs.top_logprobs, logprobs.tokens, strict=True)
    )
    streamed = client.completions.create(prompt="Once upon a time", stream=True, **options)
    assert "".join(piece.choices[0].text for piece in streamed) == choice.text
    echoed = client.completions.create(prompt=["Once upon a time", "Egg"], echo=True, n=2, **options).choices
    assert [each.index for each in echoed] == [0, 1, 2, 3]
    assert echoed[0].text == echoed[1].text == "Once upon a time" + choice.text and echoed[2].text.startswith("Egg")
    # OpenAI's default length of this path; and a prompt that is too long is refused, as nothing in it can be dropped.
    assert client.completions.create(model="tuned", prompt="Once").usage.completion_tokens == 16
    for prompt in ("word " * 9000, "w" * 100_000, ""):
        with pytest.raises(openai.BadRequestError) as raised:
            client.completions.create(model="tuned", prompt=prompt)
        assert raised.value.param == "prompt"


def test_system_messages_are_read_as_in_training(client):
    def read(*messages) -> int:
        return client.chat.completions.create(model="tuned", messages=messages, max_tokens=1).usage.prompt_tokens

    brief, kind = ({"role": "system", "content": text} for text in ("Be brief.", "Be kind."))
    assert read(brief, kind, *HELLO) == read({"role": "system", "content": "Be brief.\n\nBe kind."}, *HELLO)
    answer = {"role": "assistant", "content": "Paris"}
    assert read(*HELLO, answer, kind, *HELLO) > read(*HELLO, answer, *HELLO)
    # An answer without content is left out, and the questions around it are joined.
    joined = {"role": "user", "content": f"{HELLO[0]['content']}\n\nWell?"}
    assert read(*HELLO, {"role": "assistant", "content": None}, {"role": "user", "content": "Well?"}) == read(joined)
    with pytest.raises(openai.BadRequestError, match="stands between two messages of the user"):
        read(*HELLO, kind, *HELLO)


@pytest.mark.parametrize("count, words", [(5001, 1), (401, 300), (3, 30_000)])
def test_a_history_of_any_length_is_answered(count, words, client):
    texts = [f"{'word ' * words}{i}" for i in range(count - 1)]
    answer = client.chat.completions.create(model="tuned", messages=chat(*texts, "Well?"), max_tokens=4)
    assert answer.model_extra["dropped_turns"] > 0 and answer.usage.prompt_tokens <= 2048


def test_without_the_key_the_api_is_closed(guarded):
    with openai.OpenAI(base_url=f"{guarded}/v1", api_key=KEY, max_retries=0) as client:
        assert client.chat.completions.create(model="tuned", messages=HELLO, max_tokens=2).choices
        assert [model.id for model in client.models.list()] == ["tuned", "base"]
    with openai.OpenAI(base_url=f"{guarded}/v1", api_key="wrong", max_retries=0) as client:
        with pytest.raises(openai.AuthenticationError, match="the API key is missing or wrong") as raised:
            client.chat.completions.create(model="tuned", messages=HELLO)
        assert raised.value.code == "invalid_api_key"
    url = f"{guarded}/v1/chat/completions"
    for header in (
        {},
        {"Authorization": KEY},
        {"Authorization": f"Basic {KEY}"},
        {"Authorization": "Bearer ü".encode()},
    ):
        for response in (httpx.post(url, json={}, headers=header), httpx.get(f"{guarded}/v1/models", headers=header)):
            assert response.status_code == 401 and set(response.json()["error"]) == ERROR
    assert httpx.get(f"{guarded}/health").status_code == 200


def test_only_the_pages_of_allowed_sites_may_call_the_api(guarded, address):
    asks = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,content-type"}
    url = f"{guarded}/v1/chat/completions"
    allowed = httpx.options(url, headers={"Origin": SITE, **asks})
    assert allowed.status_code == 200 and allowed.headers["access-control-allow-origin"] == SITE
    assert "authorization" in allowed.headers["access-control-allow-headers"].lower()
    # Its pages may read errors, too: also those that come before the API.
    for response in (
        httpx.post(url, headers={"Origin": SITE}),
        httpx.post(url, headers={"Origin": SITE}, content=b" " * 5_000_000),
    ):
        assert response.status_code >= 400 and response.headers["access-control-allow-origin"] == SITE
    for response in (
        httpx.options(url, headers={"Origin": "https://evil.example", **asks}),
        httpx.options(f"{address}/v1/chat/completions", headers={"Origin": SITE, **asks}),
        httpx.get(guarded, headers={"Origin": SITE}),  # the page is no part of the API
    ):
        assert "access-control-allow-origin" not in response.headers


@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "DELETE", "OPTIONS"])
@pytest.mark.parametrize(
    "path",
    ["/v1", "/v1/", "/v1/embeddings", "/v1/responses", "/v1/a/b", "/chat/completions", "/completions", "/models"],
)
def test_unknown_paths_answer_in_openais_shape(method, path, address):
    response = httpx.request(method, address + path)
    assert response.status_code == 404 and set(response.json()["error"]) == ERROR
    assert ("ends with /v1" in response.json()["error"]["message"]) == (not path.startswith("/v1"))


def test_models_with_a_slash_in_their_name_are_not_found(address):
    response = httpx.get(f"{address}/v1/models/openai/gpt-4")
    assert response.status_code == 404 and response.json()["error"]["code"] == "model_not_found"


def test_one_failure_ends_all_answers_of_a_request(engines):
    engine = Failing(engines["tuned"])
    engine.fails_at = 3
    with served({"tuned": engine}, FairQueue()) as address:
        with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client:
            with pytest.raises(openai.InternalServerError):
                client.chat.completions.create(model="tuned", messages=HELLO, n=2)
            assert httpx.get(f"{address}/health").json()["running"] == 0
