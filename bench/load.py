"""Put the chat app under load: many clients at once, clients that leave, hostile requests, memory over 500 requests.

It starts the app on loopback with the exported models and prints the figures. It fails when a client gets neither an
answer nor "busy", when a hostile request gets no 4xx, when a client that left holds the model for more than a second,
or when memory keeps growing. Run: `python -m bench.load`
"""

import argparse
import asyncio
import json
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil

from bench.chat_server import chat_server, idle, wait_until

MODELS = Path("models/onnx")
PROMPT = "Explain in two sentences why the sky is blue."
URL = "/v1/chat/completions"
MAX_HELD = 1.0  # seconds that the model works on for a client that left
MAX_GROWTH = 40  # MiB of memory over 500 requests
HOSTILE = {
    "no JSON": b"{",
    "nested 200,000 deep": b"[" * 200_000,
    "wrong types": b'{"messages": [{"role": "user", "content": 5}]}',
    "an empty question": b'{"messages": [{"role": "user", "content": " "}]}',
    "a question of 900,000 letters": json.dumps({"messages": [{"role": "user", "content": "a" * 900_000}]}).encode(),
    "10^30 tokens asked for": b'{"messages": [{"role": "user", "content": "x"}], "max_tokens": 1' + b"0" * 30 + b"}",
    "a body of 5 MB": b" " * 5_000_000,
}


@dataclass(frozen=True)
class Answer:
    status: int
    seconds: float  # until it was complete
    first: float  # seconds until its first word
    tokens: int


async def ask(client: httpx.AsyncClient, key: object, prompt: str, max_tokens: int) -> Answer:
    """Ask for one streamed answer, as a client with its own key."""
    body = {
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": max_tokens,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    began, first, tokens = time.monotonic(), 0.0, 0
    async with client.stream("POST", URL, json=body, headers={"Authorization": f"Bearer {key}"}) as response:
        async for line in response.aiter_lines():
            if '"content"' in line and not first:
                first = time.monotonic() - began
            if '"usage"' in line:
                tokens = json.loads(line.removeprefix("data: "))["usage"]["completion_tokens"]
    return Answer(response.status_code, time.monotonic() - began, first, tokens)


async def at_once(address: str, clients: int, max_tokens: int) -> tuple[list[Answer], float]:
    """Let `clients` ask at once; return their answers and the seconds until the last one."""
    async with connected(address) as client:
        began = time.monotonic()
        answers = await asyncio.gather(*(ask(client, key, PROMPT, max_tokens) for key in range(clients)))
        return answers, time.monotonic() - began


async def many(address: str, requests: int) -> None:
    """Send `requests`, 25 at a time."""
    async with connected(address) as client:
        for i in range(0, requests, 25):
            await asyncio.gather(*(ask(client, n, f"{n}: {'word ' * (n % 40)}", 8) for n in range(i, i + 25)))


async def leave(address: str, streams: bool) -> None:
    """Ask for a long answer, and disconnect when the model works on it."""
    async with connected(address) as client:
        body = {"messages": [{"role": "user", "content": PROMPT}], "max_tokens": 1000, "stream": streams}
        task = asyncio.create_task(client.send(client.build_request("POST", URL, json=body), stream=True))
        while not (await client.get("/health")).json()["running"]:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.3)
        if task.done():
            await task.result().aclose()
        task.cancel()


async def attack(address: str) -> dict[str, int]:
    """Send all hostile requests at once; return their status by name."""
    async with connected(address) as client:
        headers = {"Content-Type": "application/json"}
        sent = await asyncio.gather(*(client.post(URL, content=body, headers=headers) for body in HOSTILE.values()))
        return {name: response.status_code for name, response in zip(HOSTILE, sent, strict=True)}


def connected(address: str) -> httpx.AsyncClient:
    return httpx.AsyncClient(base_url=address, timeout=600, limits=httpx.Limits(max_connections=None))


def under_load(address: str, numbers: list[int], tokens: int) -> Iterator[str]:
    """Print a table with a row for each number of clients at once; yield what went wrong."""
    print("| clients at once | answered | busy | tokens/s in all | first word, s (median, last) | all done, s |")
    print("| --- | --- | --- | --- | --- | --- |")
    for clients in numbers:
        answers, seconds = asyncio.run(at_once(address, clients, tokens))
        good = [answer for answer in answers if answer.status == 200 and answer.tokens]
        busy = sum(answer.status == 429 for answer in answers)
        if len(good) + busy < clients:
            yield f"{clients - len(good) - busy} of {clients} clients got neither an answer nor 'busy'"
        first = [answer.first for answer in good]
        speed = sum(answer.tokens for answer in good) / seconds
        waits = f"{statistics.median(first):.1f}, {max(first):.1f}" if first else "–"
        print(f"| {clients} | {len(good)} | {busy} | {speed:.0f} | {waits} | {seconds:.1f} |", flush=True)


def with_clients_that_leave(address: str) -> Iterator[str]:
    freed = []
    for n in range(20):
        asyncio.run(leave(address, streams=n % 2 == 0))
        freed.append(wait_until(lambda: idle(address)))
    print(f"\n20 clients that disconnected: the model was free after at most {max(freed):.2f} s")
    if max(freed) > MAX_HELD:
        yield f"a client that disconnected held the model for {max(freed):.2f} s"


def under_attack(address: str) -> Iterator[str]:
    statuses = asyncio.run(attack(address))
    print("Hostile requests: " + ", ".join(f"{name}: {status}" for name, status in statuses.items()))
    yield from (f"{name}: status {status}" for name, status in statuses.items() if not 400 <= status < 500)


def memory_growth(address: str, process_id: int) -> Iterator[str]:
    def memory() -> float:
        return psutil.Process(process_id).memory_info().rss / 2**20

    held = [memory()]
    print(f"Memory, MiB: {held[0]:.0f} so far", end="", flush=True)
    for _ in range(3):  # after the second 500 requests, the caches are full
        asyncio.run(many(address, 500))
        held.append(memory())
        print(f", {held[-1]:.0f} after 500 more requests", end="", flush=True)
    print()
    if held[3] - held[2] > MAX_GROWTH:
        yield f"500 requests took {held[3] - held[2]:.0f} MiB more"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--models", type=Path, default=MODELS, help=f"folder of exported models (default: {MODELS})")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 32, 128], help="numbers of clients at once")
    parser.add_argument("--tokens", type=int, default=64, help="length of their answers (default: 64)")
    chosen = parser.parse_args()
    with chat_server(chosen.models) as (address, process):
        asyncio.run(at_once(address, 1, 8))  # warm up
        wrong = [
            *under_load(address, chosen.clients, chosen.tokens),
            *with_clients_that_leave(address),
            *under_attack(address),
            *memory_growth(address, process.pid),
        ]
    if wrong:
        sys.exit("\n".join(f"error: {line}" for line in wrong))


if __name__ == "__main__":
    main()
