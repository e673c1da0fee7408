"""transformers or OpenVINO GenAI, in a process that answers bench.cpu: a request a line on standard input, as JSON.

{"prompts": the token ids of each, "tokens": n, "ends": ids} is answered greedily, all prompts at once. The reply has
the seconds until each token of each answer. {"ids": …, "to": file} writes the logits after each token into the file.
It imports nothing of the project, because OpenVINO has an environment of its own.
"""

import argparse
import importlib
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np

CACHE_GB = 2  # for keys and values, as the chat app has
AT_ONCE = 32
Say = Callable[[int, int], None]  # gets the number of an answer, and its next token


class Peer(Protocol):
    def answer(self, prompts: list[list[int]], tokens: int, ends: list[int], say: Say) -> None:
        """Write greedy answers of at most so many tokens; `say` gets each token as soon as it is there."""

    def logits(self, ids: list[int]) -> np.ndarray:
        """Logits after each token, of shape (tokens, vocabulary)."""


class Transformers:
    """The model in float32. Prompts at once are one padded batch; nothing is kept from one request to the next."""

    def __init__(self, folder: Path) -> None:
        self._torch, library = importlib.import_module("torch"), importlib.import_module("transformers")
        self._model = library.AutoModelForCausalLM.from_pretrained(folder, dtype=self._torch.float32).eval()

    def answer(self, prompts: list[list[int]], tokens: int, ends: list[int], say: Say) -> None:
        longest = max(map(len, prompts))
        padded = self._torch.tensor([[ends[0]] * (longest - len(prompt)) + prompt for prompt in prompts])
        mask = self._torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        options = {"max_new_tokens": tokens, "do_sample": False, "eos_token_id": ends, "pad_token_id": ends[0]}
        self._model.generate(padded, attention_mask=mask, streamer=Streamer(say), **options)

    def logits(self, ids: list[int]) -> np.ndarray:
        with self._torch.no_grad():
            return self._model(self._torch.tensor([ids])).logits[0].numpy()


class Streamer:
    """What `generate` gives its tokens to: first those of the prompts, then one of each answer."""

    def __init__(self, say: Say) -> None:
        self._say = say
        self._begun = False

    def put(self, tokens: Any) -> None:
        if self._begun:
            for number, token in enumerate(tokens.flatten().tolist()):
                self._say(number, token)
        self._begun = True

    def end(self) -> None:
        pass


class OpenVino:
    """A model that optimum-cli has exported, in OpenVINO GenAI's pipeline for many clients, which keeps prefixes."""

    def __init__(self, folder: Path) -> None:
        self._openvino, self._genai = importlib.import_module("openvino"), importlib.import_module("openvino_genai")
        self._folder = folder
        scheduler = self._genai.SchedulerConfig()
        scheduler.enable_prefix_caching, scheduler.cache_size, scheduler.max_num_seqs = True, CACHE_GB, AT_ONCE
        self._pipeline = self._genai.ContinuousBatchingPipeline(folder, scheduler, "CPU")
        self._asked = 0

    def answer(self, prompts: list[list[int]], tokens: int, ends: list[int], say: Say) -> None:
        config = self._genai.GenerationConfig()
        config.max_new_tokens, config.do_sample, config.stop_token_ids = tokens, False, set(ends)
        config.set_eos_token_id(ends[0])
        handles = []
        for prompt in prompts:
            self._asked += 1
            handles.append(self._pipeline.add_request(self._asked, self._openvino.Tensor(np.array([prompt])), config))
        while self._pipeline.has_non_finished_requests():
            self._pipeline.step()
            for number, handle in enumerate(handles):
                while handle.can_read():
                    for output in handle.read().values():
                        for token in output.generated_ids:
                            say(number, token)

    def logits(self, ids: list[int]) -> np.ndarray:
        model = self._openvino.Core().compile_model(self._folder / "openvino_model.xml", "CPU")
        reads = {
            "input_ids": np.array([ids]),
            "attention_mask": np.ones((1, len(ids)), np.int64),
            "position_ids": np.arange(len(ids))[None],
            "beam_idx": np.zeros(1, np.int32),
        }
        return np.array(model(reads)["logits"][0])


PEERS: dict[str, Callable[[Path], Peer]] = {"transformers": Transformers, "openvino": OpenVino}


def times_of(peer: Peer, prompts: list[list[int]], tokens: int, ends: list[int]) -> list[list[float]]:
    """Seconds from now to each token of each answer. The one that ends an answer has no text, and does not count."""
    began = time.perf_counter()
    found: list[list[float]] = [[] for _ in prompts]

    def say(number: int, token: int) -> None:
        if token not in ends:
            found[number].append(time.perf_counter() - began)

    peer.answer(prompts, tokens, ends, say)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("peer", choices=list(PEERS))
    parser.add_argument("folder", type=Path)
    chosen = parser.parse_args()
    peer = PEERS[chosen.peer](chosen.folder)
    for line in sys.stdin:
        asked = json.loads(line)
        if "ids" in asked:
            np.save(asked["to"], peer.logits(asked["ids"]))
            print(json.dumps(asked["to"]), flush=True)
        else:
            print(json.dumps(times_of(peer, **asked)), flush=True)


if __name__ == "__main__":
    main()
