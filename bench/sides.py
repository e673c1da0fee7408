"""Who answers bench.cpu: the chat app and llama.cpp's server over HTTP, transformers and OpenVINO GenAI over a pipe."""

import asyncio
import json
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import httpx
import numpy as np
import pandas as pd
import psutil
import torch
from transformers import PreTrainedTokenizerBase

from bench.chat_server import ROOT, answers, chat_server, wait_until
from chatapp.engine.decoder import MAX_ROWS, usable_cpus
from stages.common.artifacts import read_json, read_parquet
from stages.common.chat import Chat, end_ids
from stages.common.exported import score_logits
from stages.common.gguf_file import load_weights, write_gguf
from stages.common.halves import judging
from stages.common.model_files import load_tokenizer
from stages.common.models import load_model
from stages.common.scoring import perplexity_of, score
from stages.gguf import BATCH, COLUMNS, MERGED, TOKENIZED

KINDS = ("Q8_0", "Q4_K_M", "Q4_1")
CONTEXT = 2048  # tokens of a conversation
PEER = Path(__file__).with_name("peer.py")
Messages = list[dict[str, str]]


class Clients(Protocol):
    def ask(self, conversations: Sequence[Messages], tokens: int) -> list[list[float]]:
        """Seconds from a request to each token of its greedy answer, for conversations that are sent at once."""


@dataclass
class Side:
    """One that answers: the bytes of its model, and the perplexity of it on the half of the held-out conversations that
    judges."""

    name: str
    clients: Clients
    process: psutil.Process
    bytes: int
    perplexity: float
    turns: list[dict[str, float]] = field(default_factory=list)

    def memory(self) -> float:
        """Bytes that it holds now."""
        return float(self.process.memory_info().rss)


@dataclass
class Http:
    """Clients of a server with OpenAI's API. `fields`: how it is told to decode without penalties."""

    address: str
    fields: dict[str, Any]

    def ask(self, conversations: Sequence[Messages], tokens: int) -> list[list[float]]:
        async def all_at_once() -> list[list[float]]:
            limits = httpx.Limits(max_connections=None)
            async with httpx.AsyncClient(base_url=self.address, timeout=600, limits=limits) as client:
                return await asyncio.gather(*(self._ask(client, each, tokens) for each in conversations))

        return asyncio.run(all_at_once())

    async def _ask(self, client: httpx.AsyncClient, messages: Messages, tokens: int) -> list[float]:
        body = {"messages": messages, "max_tokens": tokens, "temperature": 0, "stream": True, **self.fields}
        began, pieces = time.perf_counter(), []
        async with client.stream("POST", "/v1/chat/completions", json=body) as response:
            response.raise_for_status()
            async for piece in response.aiter_raw():  # read later, because the server computes on the same CPUs
                pieces.append((time.perf_counter() - began, piece))
        return times_of(pieces)


def times_of(pieces: Sequence[tuple[float, bytes]]) -> list[float]:
    """When each event with a text was complete, in a stream of pieces. llama.cpp's first event has no text."""
    found, rest = [], b""
    for at, piece in pieces:
        *complete, rest = (rest + piece).split(b"\n\n")
        for event in complete:
            said = event.removeprefix(b"data: ")
            if said.startswith(b"{") and any(choice["delta"].get("content") for choice in json.loads(said)["choices"]):
                found.append(at)
    return found


class Piped:
    """Clients of bench/peer.py, which reads token ids."""

    def __init__(self, process: subprocess.Popen, tokenizer: PreTrainedTokenizerBase) -> None:
        self.process = process
        self._chat, self._ends = Chat.of(tokenizer), end_ids(tokenizer)

    def ask(self, conversations: Sequence[Messages], tokens: int) -> list[list[float]]:
        prompts = [self._chat.ids(messages) for messages in conversations]
        return self._request({"prompts": prompts, "tokens": tokens, "ends": self._ends})

    def perplexity(self, rows: pd.DataFrame) -> float:
        with tempfile.TemporaryDirectory() as folder:
            path = f"{folder}/logits.npy"

            def logits(ids: list[int]) -> np.ndarray:
                return np.load(self._request({"ids": ids, "to": path}))

            return perplexity_of(score_logits(logits, rows, "scoring"))

    def _request(self, asked: dict[str, Any]) -> Any:
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(json.dumps(asked) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            sys.exit("error: bench/peer.py ended")  # it has printed the reason
        return json.loads(line)


@contextmanager
def chat_app() -> Iterator[Side]:
    quality = read_json(ROOT / "reports/exported.json")["tuned"]
    with chat_server(ROOT / "models/onnx") as (address, process):
        clients = Http(address, {"repetition_penalty": 1})
        yield Side("chat app", clients, psutil.Process(process.pid), quality["bytes"], quality["perplexity"])


@contextmanager
def llama_server(binaries: Path, kind: str, file: Path, perplexity: float) -> Iterator[Side]:
    """llama.cpp's server, with a slot for each of as many clients as the chat app answers at once."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["--parallel", str(MAX_ROWS), "--ctx-size", str(MAX_ROWS * CONTEXT), "--threads", str(usable_cpus())]
    command = [str(binaries / "llama-server"), "-m", str(file), "--port", str(port), "--jinja", "--no-webui", *options]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    address = f"http://127.0.0.1:{port}"
    try:
        wait_until(lambda: answers(address))
        held = psutil.Process(process.pid)
        yield Side(f"llama.cpp {kind}", Http(address, {}), held, file.stat().st_size, perplexity)
    finally:
        process.terminate()
        process.wait(30)


@contextmanager
def peer(python: Path | str, kind: str, folder: Path, tokenizer: PreTrainedTokenizerBase) -> Iterator[Piped]:
    """bench/peer.py with the model in `folder`, run by the interpreter `python`."""
    command = [str(python), str(PEER), kind, str(folder)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        yield Piped(process, tokenizer)
    finally:
        process.terminate()
        process.wait(30)


@contextmanager
def transformers_float32() -> Iterator[Side]:
    with peer(sys.executable, "transformers", MERGED, load_tokenizer(MERGED)) as piped:
        yield side_of(
            "transformers float32", piped, sum(path.stat().st_size for path in MERGED.glob("*.safetensors")) * 2
        )


@contextmanager
def openvino(python: Path, folder: Path) -> Iterator[Side]:
    """The tuned model in 4 bits, exported into `folder` by the optimum-cli that stands beside `python`."""
    command = [str(python.with_name("optimum-cli")), "export", "openvino", "--model", str(MERGED)]
    options = ["--task", "text-generation-with-past", "--weight-format", "int4", "--group-size", "64"]
    subprocess.run([*command, *options, str(folder)], check=True, capture_output=True)
    with peer(python, "openvino", folder, load_tokenizer(MERGED)) as piped:
        yield side_of("OpenVINO int4", piped, (folder / "openvino_model.bin").stat().st_size)


def side_of(name: str, piped: Piped, size: int) -> Side:
    return Side(name, piped, psutil.Process(piped.process.pid), size, piped.perplexity(held_out()))


def held_out() -> pd.DataFrame:
    return judging(read_parquet(TOKENIZED / "validation.parquet", COLUMNS))


def llama_files(binaries: Path, folder: Path) -> dict[str, tuple[Path, float]]:
    """The tuned model as GGUF in each of KINDS, by llama.cpp's own tool, and the perplexity of its weights."""
    rows, tokenizer = held_out(), load_tokenizer(MERGED)
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
