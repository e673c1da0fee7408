"""Under load and abuse: many clients at once, clients that leave, hostile requests, memory over 500 requests."""

import asyncio
import json
import socket
import time

import httpx
import psutil
import pytest

from bench.chat_server import idle, wait_until
from chatapp.server import request_timeout
from chatapp.server.fair_queue import FairQueue
from tests.support.serving import Paced, served

pytestmark = pytest.mark.slow
HELLO = [{"role": "user", "content": "What is the capital of France?"}]
JSON = {"Content-Type": "application/json"}
LIMITS = httpx.Limits(max_connections=100)


def body(**options) -> dict:
    return {"messages": HELLO, "max_tokens": 16, **options}


async def ask(client: httpx.AsyncClient, key: int | str, **options) -> httpx.Response:
    return await client.post("/v1/chat/completions", json=body(**options), headers={"Authorization": f"Bearer {key}"})


def head(host: str, content: bytes) -> bytes:
    """The head of a request with this body."""
    lines = ["POST /v1/chat/completions HTTP/1.1", f"Host: {host}", "Content-Type: application/json"]
    return "\r\n".join([*lines, f"Content-Length: {len(content)}", "", ""]).encode()


def at_once(address: str, scenario):
    """Run `scenario(client)` with an asynchronous client of that address."""

    async def run():
        async with httpx.AsyncClient(base_url=address, timeout=120, limits=LIMITS) as client:
            return await scenario(client)

    return asyncio.run(run())


@pytest.fixture(scope="module")
def paced(engines):
    """The app with one engine that takes 20 ms for each piece, and 8 places; gives its address."""
    with served({"tuned": Paced(engines["tuned"], 0.02)}, FairQueue(places=8)) as address:
        yield address


def test_32_clients_at_once_are_all_answered(running):
    async def scenario(client):
        return await asyncio.gather(*(ask(client, key) for key in range(32)))

    for response in at_once(running[0], scenario):
        assert response.status_code == 200
        assert response.json()["usage"]["completion_tokens"] == 16
    assert wait_until(lambda: idle(running[0])) < 5


def test_a_full_queue_answers_busy_and_when_to_retry(paced):
    async def scenario(client):
        return await asyncio.gather(*(ask(client, key, stream=key % 2 == 0) for key in range(32)))

    responses = at_once(paced, scenario)
    answered = [response for response in responses if response.status_code == 200]
    busy = [response for response in responses if response.status_code == 429]
    assert len(answered) == 9 and len(busy) == 23  # one answered at a time, eight places
    for response in busy:
        assert 1 <= int(response.headers["Retry-After"]) <= 60
        assert response.json()["error"]["code"] == "server_busy"


def test_a_greedy_client_does_not_starve_another(paced):
    async def scenario(client):
        async def timed(key, **options):
            response = await ask(client, key, **options)
            return key, response.status_code, time.monotonic()

        greedy = [asyncio.create_task(timed("greedy")) for _ in range(12)]
        while health_of(await client.get("/health"))["waiting"] < 8:
            await asyncio.sleep(0.01)
        modest = await timed("modest")
        return modest, await asyncio.gather(*greedy)

    def health_of(response):
        return response.json()

    modest, greedy = at_once(paced, scenario)
    assert modest[1] == 200
    assert sum(status == 200 and when < modest[2] for _, status, when in greedy) <= 2
    assert {status for _, status, _ in greedy} == {200, 429}


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_disconnects_frees_the_model_within_a_second(paced, stream):
    async def scenario(client):
        sent = client.build_request("POST", "/v1/chat/completions", json=body(max_tokens=2000, stream=stream))
        task = asyncio.create_task(client.send(sent, stream=True))
        waiting = asyncio.create_task(ask(client, "other", max_tokens=2000))
        while (await client.get("/health")).json() != {"status": "ok", "models": ["tuned"], "running": 1, "waiting": 1}:
            await asyncio.sleep(0.01)
        waiting.cancel()
        if stream:
            response = await task
            await anext(response.aiter_lines())
            await response.aclose()
        else:
            task.cancel()

    at_once(paced, scenario)
    assert wait_until(lambda: idle(paced)) < 1


def test_a_client_that_never_reads_delays_nobody(engines):
    content = json.dumps(body(max_tokens=600, stream=True)).encode()
    # 600 tokens are more than all buffers hold, so a server that waits for this client would never answer the other.
    with served({"tuned": engines["tuned"]}, FairQueue(), send_buffer=4096) as address, socket.socket() as lazy:
        host, port = address.removeprefix("http://").split(":")
        lazy.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)  # the system's minimum
        lazy.connect((host, int(port)))
        lazy.sendall(head(host, content) + content)
        wait_until(lambda: not idle(address))
        assert httpx.post(f"{address}/v1/chat/completions", json=body(), timeout=60).status_code == 200


def test_idle_connections_are_closed(engines, monkeypatch):
    """Connections that send nothing, or one byte at a time, are closed. Requests that arrive in time are served."""
    monkeypatch.setattr(request_timeout, "TIMEOUT_REQUEST", 3)
    with served(engines, FairQueue(), http=request_timeout.RequestTimeoutProtocol, ws="none") as address:
        host, port = address.removeprefix("http://").split(":")
        idle_ones = [socket.create_connection((host, int(port))) for _ in range(20)]
        trickling = socket.create_connection((host, int(port)))
        with httpx.Client(base_url=address) as client:
            began, closed = time.monotonic(), set()
            while len(closed) < 21 and time.monotonic() - began < 60:
                for one in [*idle_ones, trickling]:
                    one.setblocking(False)
                    try:
                        if one is trickling and one not in closed:
                            one.send(b"G")
                        if one.recv(1) == b"":
                            closed.add(one)
                    except BlockingIOError:
                        pass
                    except ConnectionError:
                        closed.add(one)
                assert client.get("/health").status_code == 200  # on one connection that is kept alive
                time.sleep(0.1)
        assert len(closed) == 21
        slow = client_of_two_parts(host, int(port), 0.5)
        assert slow.startswith(b"HTTP/1.1 200")
        for one in [*idle_ones, trickling]:
            one.close()


def client_of_two_parts(host: str, port: int, pause: float) -> bytes:
    content = json.dumps(body(max_tokens=80)).encode()
    with socket.create_connection((host, port)) as one:
        one.sendall(head(host, content) + content[:10])
        time.sleep(pause)
        one.sendall(content[10:])
        return one.recv(1000)


GRADIO = [
    ("/gradio_api/queue/join", b"{"),
    ("/gradio_api/queue/join", b"[]"),
    ("/gradio_api/queue/join", b'{"data": "x", "fn_index": "y"}'),
    ("/gradio_api/queue/join", b'{"data": [], "fn_index": 999, "session_hash": "a"}'),
    ("/gradio_api/queue/join", b'{"data": [], "fn_index": -1, "session_hash": "b"}'),
    ("/gradio_api/queue/join", b'{"data": [5, {"a": 1}, [[[]]]], "fn_index": 0, "session_hash": "c"}'),
    (
        "/gradio_api/queue/join",
        b'{"data": ["x", null], "fn_index": 1, "session_hash": "d", "event_data": {"index": 7}}',
    ),
    ("/gradio_api/run/predict", b'{"data": [1]}'),
    ("/gradio_api/call/nothing", b'{"data": []}'),
    ("/gradio_api/upload", b"x"),
    ("/gradio_api/queue/join", b" " * 5_000_000),
]


def test_hostile_requests_to_the_page_do_no_harm(running):
    address, process = running
    with httpx.Client(base_url=address, timeout=60) as client:
        for path, content in GRADIO:
            response = client.post(path, content=content, headers=JSON)
            # Gradio accepts some wrong requests, and then ends their event with an error.
            assert 400 <= response.status_code < 500 or response.json().keys() == {"event_id"}, (path, content[:60])
        for session in "cd":  # listen to the events that were accepted
            try:
                with client.stream("GET", f"/gradio_api/queue/data?session_hash={session}", timeout=2) as events:
                    next(events.iter_lines(), None)
            except httpx.TimeoutException:
                pass
        assert client.post("/v1/chat/completions", json=body()).status_code == 200
        assert 'property="og:title"' in client.get("/").text
    assert process.poll() is None
    wait_until(lambda: idle(address))


HOSTILE = [
    b"",
    b"{",
    b"[" * 200_000,
    b"\xff\xfe\x00",
    b'{"messages": "x"}',
    b'{"messages": [{"role": "user", "content": null}]}',
    json.dumps({"messages": HELLO, "temperature": "NaN"}).encode(),
    b'{"messages": [{"role": "user", "content": "x"}], "temperature": NaN}',
    json.dumps({"messages": HELLO, "max_tokens": 10**30}).encode(),
    json.dumps({"messages": HELLO, "model": "../../etc/passwd"}).encode(),
    json.dumps({"messages": [{"role": "user", "content": "   "}]}).encode(),
    json.dumps({"messages": [{"role": "user", "content": "a" * 900_000}]}).encode(),
    json.dumps({"messages": [{"role": "user", "content": "<|im_end|>" * 50_000}]}).encode(),
    json.dumps({"messages": [{"role": "user", "content": "🙂\u0000\u202e" * 40_000}]}).encode(),
    json.dumps({"messages": HELLO * 5000}).encode(),
    b" " * 5_000_000,
]


def test_hostile_requests_get_a_4xx_and_do_no_harm(running):
    address, process = running

    async def scenario(client):
        hostile = [
            client.post("/v1/chat/completions", content=content, headers={**JSON, "Authorization": f"{i}"})
            for i, content in enumerate(HOSTILE)
        ]
        return await asyncio.gather(*hostile, *(ask(client, f"good {i}") for i in range(8)))

    responses = at_once(address, scenario)
    refused, good = responses[: len(HOSTILE)], responses[len(HOSTILE) :]
    assert [response.status_code for response in good] == [200] * 8
    for content, response in zip(HOSTILE, refused, strict=True):
        assert 400 <= response.status_code < 500, (content[:80], response.status_code)
        assert "\n" not in response.json()["error"]["message"]
    assert process.poll() is None
    wait_until(lambda: idle(address))


def test_memory_is_bounded_over_500_requests(running):
    address, process = running

    async def some(client, count: int):
        for start in range(0, count, 25):
            batch = [
                ask(
                    client,
                    i,
                    messages=[{"role": "user", "content": f"Question {i}: {'word ' * (i % 40)}"}],
                    max_tokens=8,
                    stream=i % 2 == 0,
                )
                for i in range(start, start + 25)
            ]
            assert {response.status_code for response in await asyncio.gather(*batch)} == {200}

    memory = psutil.Process(process.pid).memory_info
    at_once(address, lambda client: some(client, 100))  # what is made once is made now
    before = memory().rss
    at_once(address, lambda client: some(client, 500))
    grown = (memory().rss - before) / 2**20
    assert grown < 40, f"{grown:.0f} MiB more after 500 requests"
