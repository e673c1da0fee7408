"""Decoding speed of the exported model beside what a user would else run: transformers on the merged model in float32.

Both answer the same prompts greedily, on the same CPUs, in turns within one run, so that a busy machine slows both;
medians of tokens a second, first token left out. Run: `python -m bench.decode` (2 minutes); `--tokens`, `--repeats`
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "space"))  # the chat app is no package: it runs from its own folder

PROMPTS = ("Tell me a story about a fox.", "How do I grow tomatoes?", "What makes a good friend?")


def exported(tokens: int) -> Callable[[str], float]:
    """A function that answers a prompt by the exported model and returns tokens a second."""
    from engine import Engine, Sampling

    engine = Engine(ROOT / "models/onnx/tuned")

    def answer(prompt: str) -> float:
        times = []
        for chunk in engine.stream([{"role": "user", "content": prompt}], Sampling(max_tokens=tokens, temperature=0)):
            times.append((time.perf_counter(), chunk.tokens))
        (began, first), (ended, last) = times[0], times[-1]
        return (last - first) / (ended - began)

    return answer


def transformers_float32(tokens: int) -> Callable[[str], float]:
    """The same by transformers."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.generation.streamers import BaseStreamer

    folder = ROOT / "models/merged"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    class Clock(BaseStreamer):
        def __init__(self) -> None:
            self.times: list[float] = []

        def put(self, value: object) -> None:
            self.times.append(time.perf_counter())

        def end(self) -> None:
            pass

    def answer(prompt: str) -> float:
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        clock = Clock()
        with torch.no_grad():
            model.generate(**ids, max_new_tokens=tokens, do_sample=False, streamer=clock)
        times = clock.times[1:]  # the first is the prompt
        return (len(times) - 1) / (times[-1] - times[0])

    return answer


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--repeats", type=int, default=2)
    chosen = parser.parse_args()
    ways = {"exported": exported(chosen.tokens), "transformers": transformers_float32(chosen.tokens)}
    speeds: dict[str, list[float]] = {name: [] for name in ways}
    for way in ways.values():  # the first answer is slower
        way("Hello!")
    for _ in range(chosen.repeats):
        for prompt in PROMPTS:
            for name, way in ways.items():
                speeds[name].append(way(prompt))
    medians = {name: statistics.median(values) for name, values in speeds.items()}
    for name, values in speeds.items():
        print(f"{name:14}{medians[name]:7.1f} tokens/s (from {min(values):.1f} to {max(values):.1f})")
    print(f"ratio         {medians['exported'] / medians['transformers']:7.1f}")


if __name__ == "__main__":
    main()
