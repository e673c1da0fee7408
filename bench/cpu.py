"""The tuned model in the chat app, llama.cpp's server, transformers and OpenVINO GenAI: speed, many clients, memory.

All take turns on the same CPUs; the figures are medians. Answers are greedy, without penalties. It writes
bench/results/cpu.json and the table in docs/measurements.md, which also says how to build llama.cpp for this machine.
Run: `python -m bench.cpu BUILD/bin` (half an hour; needs the outputs of `make all`); `--openvino PYTHON` adds OpenVINO
"""

import argparse
import math
import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from typing import Any

from bench.chat_server import ROOT
from bench.machine import bytes_a_second, processor, publish
from bench.sides import Messages, Side, chat_app, llama_files, llama_server, openvino, transformers_float32
from stages.common.artifacts import write_json

RESULTS = ROOT / "bench/results/cpu.json"
QUESTION = "Tell me a story about a fox."
LENGTHS = (64, 512)  # of answers, in tokens
PROMPTS = (50, 500, 1500)  # about so many words of one token each
CLIENTS = (8, 32)
CLIENT_TOKENS = 64
WORDS = ("fox", "egg", "tree", "river", "stone", "bread", "cloud", "light", "house", "road")


def said(text: str) -> Messages:
    return [{"role": "user", "content": text}]


def words(count: int, seed: object) -> str:
    """A text that no server has read before."""
    drawn = random.Random(repr(seed))
    return " ".join(drawn.choice(WORDS) for _ in range(count))


def first_word(side: Side, messages: Messages) -> float:
    """Seconds until the first word of an answer; not a number where it has none."""
    (times,) = side.clients.ask([messages], 8)
    return times[0] if times else math.nan


def turn(side: Side, number: int) -> dict[str, float]:
    """All measurements of a server once. Times in seconds, speeds in tokens a second."""
    found: dict[str, float] = {}
    for length in LENGTHS:
        (times,) = side.clients.ask([said(f"{QUESTION} Number {number}.")], length)
        found[f"speed_{length}"] = (len(times) - 1) / (times[-1] - times[0])
    for length in PROMPTS:
        question = said(f"{words(length, (number, length))}. {QUESTION}")
        found[f"first_{length}"] = first_word(side, question)
        if length == 500:
            more = [*question, {"role": "assistant", "content": "A fox."}, *said(QUESTION)]
            found["follow_up"] = first_word(side, more)
    for count in CLIENTS:
        began = time.perf_counter()
        times_of = side.clients.ask(
            [said(f"{QUESTION} Its name is {words(3, (number, n))}.") for n in range(count)], CLIENT_TOKENS
        )
        found[f"speed_of_{count}"] = sum(map(len, times_of)) / (time.perf_counter() - began)
        found[f"last_first_of_{count}"] = max(times[0] for times in times_of if times)
    return found


# Results ----------------------------------------------------------------------------------------------------------


def median(values: Sequence[float]) -> float:
    """Of those that are numbers."""
    return statistics.median([value for value in values if not math.isnan(value)] or [math.nan])


def summary(sides: Sequence[Side], bandwidth: float) -> dict[str, Any]:
    found = {}
    for side in sides:
        medians = {key: median([turn[key] for turn in side.turns]) for key in side.turns[0]}
        limits = {"bytes": side.bytes, "perplexity": side.perplexity, "limit": bandwidth / side.bytes}
        found[side.name] = {**limits, **medians, "memory": side.memory()}
    return {
        "machine": processor(),
        "onnxruntime": version("onnxruntime"),
        "turns": len(sides[0].turns),
        "bytes_a_second": bandwidth,
        "sides": found,
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
    parser.add_argument("--openvino", type=Path, metavar="PYTHON", help="of an environment with OpenVINO GenAI")
    parser.add_argument("--turns", type=int, default=5)
    chosen = parser.parse_args()
    bandwidth = bytes_a_second()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        sides = [stack.enter_context(chat_app())]
        for kind, (path, perplexity) in llama_files(chosen.binaries, folder).items():
            sides.append(stack.enter_context(llama_server(chosen.binaries, kind, path, perplexity)))
        if chosen.openvino:
            sides.append(stack.enter_context(openvino(chosen.openvino, folder / "openvino")))
        sides.append(stack.enter_context(transformers_float32()))
        for side in sides:
            side.clients.ask([said("Hello!")], 8)  # the first answer is slower
        for number in range(chosen.turns):
            for side in sides:
                side.turns.append(turn(side, number))
                print(f"turn {number + 1} of {chosen.turns}: {side.name}: {side.turns[-1]}", flush=True)
        results = summary(sides, bandwidth)
    write_json(RESULTS, results)
    publish("bench.cpu", table(results))


if __name__ == "__main__":
    main()
