"""Compare the decoding speed of the exported model with others: transformers on the merged model in float32, and where
the package xllamacpp is installed (`pip install xllamacpp`) llama.cpp on the GGUF files.

All answer the same prompts greedily, on the same CPUs and in turns, so that a busy machine slows all. The figures are
medians of tokens a second, without the first token. Run: `python -m bench.decode` (2 minutes); `--tokens`, `--repeats`
"""

import argparse
import importlib
import importlib.util
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.generation.streamers import BaseStreamer

from bench.chat_server import ROOT
from chatapp.engine import Engine, Sampling
from chatapp.engine.decoder import usable_cpus

PROMPTS = ("Tell me a story about a fox.", "How do I grow tomatoes?", "What makes a good friend?")


def exported(tokens: int) -> Callable[[str], float]:
    """A function that answers a prompt with the exported model and returns tokens a second."""
    engine = Engine(ROOT / "models/onnx/tuned")

    def answer(prompt: str) -> float:
        times = []
        greedy = Sampling(max_tokens=tokens, temperature=0, repetition_penalty=1)
        for chunk in engine.stream([{"role": "user", "content": prompt}], greedy):
            times.append((time.perf_counter(), chunk.tokens))
        (began, first), (ended, last) = times[0], times[-1]
        return (last - first) / (ended - began)

    return answer


class Clock(BaseStreamer):
    """Notes when each token comes."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: object) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def transformers_float32(tokens: int) -> Callable[[str], float]:
    """The same with transformers."""
    folder = ROOT / "models/merged"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def answer(prompt: str) -> float:
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        clock = Clock()
        with torch.no_grad():
            model.generate(**ids, max_new_tokens=tokens, do_sample=False, streamer=clock)
        times = clock.times[1:]  # the first one is the prompt's
        return (len(times) - 1) / (times[-1] - times[0])

    return answer


def llama_cpp(file: Path, tokens: int) -> Callable[[str], float]:
    """The same with llama.cpp, by its own clock."""
    library = importlib.import_module("xllamacpp")
    params = library.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel, params.use_jinja = str(file), 2048, 1, True
    params.cpuparams.n_threads = usable_cpus()
    server = library.Server(params)

    def answer(prompt: str) -> float:
        messages = [{"role": "user", "content": prompt}]
        reply = server.handle_chat_completions({"messages": messages, "max_tokens": tokens, "temperature": 0})
        return reply["timings"]["predicted_per_second"]

    return answer


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--repeats", type=int, default=2)
    chosen = parser.parse_args()
    ways = {"exported": exported(chosen.tokens), "transformers": transformers_float32(chosen.tokens)}
    if importlib.util.find_spec("xllamacpp"):
        for file in sorted((ROOT / "models/gguf").glob("*.gguf")):
            ways[f"llama.cpp {file.stem.removeprefix('tuned-')}"] = llama_cpp(file, chosen.tokens)
    speeds: dict[str, list[float]] = {name: [] for name in ways}
    for way in ways.values():  # the first answer is slower
        way("Hello!")
    for _ in range(chosen.repeats):
        for prompt in PROMPTS:
            for name, way in ways.items():
                speeds[name].append(way(prompt))
    medians = {name: statistics.median(values) for name, values in speeds.items()}
    for name, values in speeds.items():
        ratio = medians["exported"] / medians[name]
        speed = f"{medians[name]:7.1f} tokens/s ({min(values):.1f} to {max(values):.1f})"
        print(f"{name:16}{speed}, exported / it {ratio:.2f}")


if __name__ == "__main__":
    main()
