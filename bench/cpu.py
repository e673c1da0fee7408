"""The chat app beside llama.cpp's server, with the same tuned model: speed, first words, many clients, memory.

Both are asked over HTTP, as clients do, and take turns on the same CPUs; the figures are medians. Answers are greedy,
without penalties. It writes bench/results/cpu.json and the table in docs/measurements.md, which also says how to build
llama.cpp for this machine. Run: `python -m bench.cpu BUILD/bin` (15 minutes; needs the outputs of `make all`)
"""

import argparse
import asyncio
import json
import random
import socket
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import httpx
import psutil
import torch

from bench.chat_server import ROOT, answers, chat_server, wait_until
from bench.machine import processor, publish
from chatapp.engine.decoder import MAX_ROWS, usable_cpus
from stages.common.artifacts import read_json, read_parquet, write_json
from stages.common.gguf_file import load_weights, write_gguf
from stages.common.halves import judging
from stages.common.model_files import load_tokenizer
from stages.common.models import load_model
from stages.common.scoring import perplexity_of, score
from stages.gguf import BATCH, COLUMNS, MERGED, TOKENIZED

RESULTS = ROOT / "bench/results/cpu.json"
KINDS = ("Q8_0", "Q4_K_M", "Q4_1")
CONTEXT = 2048  # tokens of a conversation
QUESTION = "Tell me a story about a fox."
LENGTHS = (64, 512)  # of answers, in tokens
PROMPTS = (50, 500, 1500)  # about so many words of one token each
CLIENTS = (8, 32)
CLIENT_TOKENS = 64
WORDS = ("fox", "egg", "tree", "river", "stone", "bread", "cloud", "light", "house", "road")
Messages = list[dict[str, str]]


@dataclass
class Server:
    """A server with OpenAI's API. `fields`: how it is told to decode greedily and without penalties."""

    name: str
    address: str
    process: psutil.Process
    fields: dict[str, Any]
    bytes: int
    perplexity: float
    turns: list[dict[str, float]] = field(default_factory=list)

    def ask(self, conversations: Sequence[Messages], tokens: int) -> list[list[float]]:
        """Seconds from a request to each token of its answer, for conversations that are sent at once."""

        async def all_at_once() -> list[list[float]]:
            limits = httpx.Limits(max_connections=None)
            async with httpx.AsyncClient(base_url=self.address, timeout=600, limits=limits) as client:
                return await asyncio.gather(*(self._ask(client, each, tokens) for each in conversations))

        return asyncio.run(all_at_once())

    async def _ask(self, client: httpx.AsyncClient, messages: Messages, tokens: int) -> list[float]:
        body = {"messages": messages, "max_tokens": tokens, "temperature": 0, "stream": True, **self.fields}
        began, found = time.perf_counter(), []
        async with client.stream("POST", "/v1/chat/completions", json=body) as response:
            response.raise_for_status()
            async for line in response.aiter_lines():
                if line.startswith("data: {") and said_in(json.loads(line.removeprefix("data: "))):
                    found.append(time.perf_counter() - began)
        return found

    def memory(self) -> float:
        """Bytes that it holds now."""
        return float(self.process.memory_info().rss)


def said_in(event: dict[str, Any]) -> str:
    """The text of a streamed event. llama.cpp's first one has none."""
    return "".join(choice["delta"].get("content") or "" for choice in event["choices"])


def said(text: str) -> Messages:
    return [{"role": "user", "content": text}]


def words(count: int, seed: object) -> str:
    """A text that no server has read before."""
    drawn = random.Random(repr(seed))
    return " ".join(drawn.choice(WORDS) for _ in range(count))


def turn(server: Server, number: int) -> dict[str, float]:
    """All measurements of a server once. Times in seconds, speeds in tokens a second."""
    found: dict[str, float] = {}
    for length in LENGTHS:
        (times,) = server.ask([said(f"{QUESTION} Number {number}.")], length)
        found[f"speed_{length}"] = (len(times) - 1) / (times[-1] - times[0])
    for length in PROMPTS:
        question = said(words(length, (number, length)))
        found[f"first_{length}"] = server.ask([question], 8)[0][0]
        if length == 500:
            more = [*question, {"role": "assistant", "content": "A fox."}, *said("And then?")]
            found["follow_up"] = server.ask([more], 8)[0][0]
    for count in CLIENTS:
        began = time.perf_counter()
        times_of = server.ask(
            [said(f"{QUESTION} Its name is {words(3, (number, n))}.") for n in range(count)], CLIENT_TOKENS
        )
        found[f"speed_of_{count}"] = sum(map(len, times_of)) / (time.perf_counter() - began)
        found[f"last_first_of_{count}"] = max(times[0] for times in times_of)
    return found


# Servers ----------------------------------------------------------------------------------------------------------


@contextmanager
def llama_server(binaries: Path, file: Path) -> Iterator[tuple[str, psutil.Process]]:
    """llama.cpp's server, with a slot for each of as many clients as the chat app answers at once."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["--parallel", str(MAX_ROWS), "--ctx-size", str(MAX_ROWS * CONTEXT), "--threads", str(usable_cpus())]
    command = [str(binaries / "llama-server"), "-m", str(file), "--port", str(port), "--jinja", "--no-webui", *options]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_until(lambda: answers(f"http://127.0.0.1:{port}"))
        yield f"http://127.0.0.1:{port}", psutil.Process(process.pid)
    finally:
        process.terminate()
        process.wait(30)


def write_files(binaries: Path, folder: Path) -> dict[str, tuple[Path, float]]:
    """The tuned model as GGUF in each of KINDS, by llama.cpp's own tool, and the perplexity of its weights on the
    half of the held-out conversations that judges."""
    rows, tokenizer = judging(read_parquet(TOKENIZED / "validation.parquet", COLUMNS)), load_tokenizer(MERGED)
    model = load_model(MERGED, torch.float32, use_gpu=False).eval()
    write_gguf(model, tokenizer, folder / "F16.gguf", "F16")
    found = {}
    for kind in KINDS:
        path = folder / f"{kind}.gguf"
        command = [str(binaries / "llama-quantize"), str(folder / "F16.gguf"), str(path), kind]
        subprocess.run(command, check=True, capture_output=True)
        load_weights(model, path)
        found[kind] = path, perplexity_of(score(model, rows, BATCH, tokenizer.pad_token_id))
    return found


def bytes_a_second() -> float:
    """How fast all cores together read memory: a sum over 1 GB, the best of 5."""
    numbers, times = torch.ones(250_000_000), []
    for _ in range(5):
        began = time.perf_counter()
        numbers.sum()
        times.append(time.perf_counter() - began)
    return 1e9 / min(times)


# Results ----------------------------------------------------------------------------------------------------------


def summary(servers: Sequence[Server], bandwidth: float) -> dict[str, Any]:
    sides = {}
    for server in servers:
        medians = {key: statistics.median(turn[key] for turn in server.turns) for key in server.turns[0]}
        limits = {"bytes": server.bytes, "perplexity": server.perplexity, "limit": bandwidth / server.bytes}
        sides[server.name] = {**limits, **medians, "memory": server.memory()}
    return {
        "machine": processor(),
        "onnxruntime": version("onnxruntime"),
        "turns": len(servers[0].turns),
        "bytes_a_second": bandwidth,
        "sides": sides,
    }


# What a row of the table says: a key of a side, the unit in which it is shown, its format.
ROWS = {
    "model, MB": ("bytes", 1e-6, ".0f"),
    "perplexity, judging half": ("perplexity", 1, ".2f"),
    "memory limit of one answer, tokens/s": ("limit", 1, ".0f"),
    **{f"one answer of at most {n} tokens, tokens/s": (f"speed_{n}", 1, ".0f") for n in LENGTHS},
    **{f"first word after about {n:,} tokens, s": (f"first_{n}", 1, ".2f") for n in PROMPTS},
    "follow-up to 500 tokens, s": ("follow_up", 1, ".2f"),
    **{f"{n} clients, tokens/s in all": (f"speed_of_{n}", 1, ".0f") for n in CLIENTS},
    **{f"{n} clients, last first word, s": (f"last_first_of_{n}", 1, ".2f") for n in CLIENTS},
    "memory afterwards, MB": ("memory", 1e-6, ".0f"),
}


def table(results: dict[str, Any]) -> str:
    sides = results["sides"]
    lines = [
        f"{results['machine']}; onnxruntime {results['onnxruntime']}; medians of {results['turns']} turns; memory is "
        f"read at {results['bytes_a_second'] / 1e9:.1f} GB/s, the limit of one answer is that by the model's bytes.\n",
        f"| | {' | '.join(sides)} |",
        f"| --- |{' --- |' * len(sides)}",
    ]
    for label, (key, unit, form) in ROWS.items():
        lines.append(f"| {label} | {' | '.join(format(side[key] * unit, form) for side in sides.values())} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("binaries", type=Path, help="folder of llama-server and llama-quantize")
    parser.add_argument("--turns", type=int, default=5)
    chosen = parser.parse_args()
    exported = read_json(ROOT / "reports/exported.json")["tuned"]
    bandwidth = bytes_a_second()
    with ExitStack() as stack:
        files = write_files(chosen.binaries, Path(stack.enter_context(tempfile.TemporaryDirectory())))
        address, process = stack.enter_context(chat_server(ROOT / "models/onnx"))
        greedy = {"repetition_penalty": 1}
        ours = Server(
            "chat app", address, psutil.Process(process.pid), greedy, exported["bytes"], exported["perplexity"]
        )
        servers = [ours]
        for kind, (path, perplexity) in files.items():
            place = stack.enter_context(llama_server(chosen.binaries, path))
            servers.append(Server(f"llama.cpp {kind}", *place, {}, path.stat().st_size, perplexity))
        for server in servers:
            server.ask([said("Hello!")], 8)  # the first answer is slower
        for number in range(chosen.turns):
            for server in servers:
                server.turns.append(turn(server, number))
                print(f"turn {number + 1} of {chosen.turns}: {server.name}: {server.turns[-1]}", flush=True)
        results = summary(servers, bandwidth)
    write_json(RESULTS, results)
    publish("bench.cpu", table(results))


if __name__ == "__main__":
    main()
