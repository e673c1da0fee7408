"""The chat engine: one exported model, its answers as streams. What the page, the API, the terminal and benchmarks use.

engine = Engine(Path("models/onnx/tuned"))
for chunk in engine.stream([{"role": "user", "content": "Hello!"}]):
    print(chunk.text, end="", flush=True)
"""

import json
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnxruntime_genai as og
from prompt import Message, PromptBuilder
from prompt_cache import PromptCache, tokens_in_step
from sampling import Sampling, choose
from text_stream import TextStream

__all__ = ["Chunk", "Engine", "Sampling", "usable_cpus"]

FILES = (
    "model.onnx",
    "genai_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "card.json",
)
# Of a model's context, what is used: to read more takes a CPU minutes, and it would not stay within a Space's memory.
LONGEST_CONTEXT = 4096
CGROUP_CPU_LIMIT = Path("/sys/fs/cgroup/cpu.max")
# Conversations are cut so that an answer has max_tokens left, but never more than this part of the context.
LARGEST_ROOM = 1 / 4


@dataclass(frozen=True)
class Chunk:
    """A piece of an answer; the last one, and only that, has a finish_reason."""

    text: str  # what is new; pieces joined are the answer
    tokens: int  # of the answer, generated so far
    finish_reason: Literal["stop", "length", "cancelled"] | None
    dropped_turns: int = 0  # oldest turns of the conversation that the model did not read
    prompt_tokens: int = 0  # of the prompt that it did read …
    reused_tokens: int = 0  # … and how many of these from its cache


def usable_cpus() -> int:
    """The CPUs that this process may use: by its affinity, and by the limit of the container it is in."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = CGROUP_CPU_LIMIT.read_text().split()
        cpus = min(cpus, max(1, int(quota) // int(period)))
    except (OSError, ValueError):  # no cgroup, or "max": no limit
        pass
    return cpus


class Engine:
    """One exported model in memory. Safe for threads: it gives one answer at a time, others wait.

    `folder` holds what the export stage wrote; `threads` is the number of CPUs to compute on (None: all that may be
    used). Raises FileNotFoundError when a file of the model is missing, ValueError when one is damaged.
    """

    card: dict[str, Any]
    context_length: int

    def __init__(self, folder: Path, threads: int | None = None) -> None:
        folder = Path(folder)
        for name in FILES:
            if not (folder / name).is_file():
                raise FileNotFoundError(f"{folder} holds no exported model: {name} is missing")
        try:
            self.card = json.loads((folder / "card.json").read_text(encoding="utf-8"))
            self._prompt = PromptBuilder(folder)
            settings = json.loads((folder / "genai_config.json").read_text(encoding="utf-8"))["model"]
            self.context_length = min(settings["context_length"], LONGEST_CONTEXT)
            ends = settings["eos_token_id"]
            self._ends = set(ends if isinstance(ends, list) else [ends])
            config = og.Config(str(folder))
            # Without an arena: it would hold on to what conversations of all lengths have needed.
            session = {"intra_op_num_threads": threads or usable_cpus(), "enable_cpu_mem_arena": False}
            config.overlay(json.dumps({"model": {"decoder": {"session_options": session}}}))
            model = og.Model(config)
        except Exception as error:  # the libraries have bare ones
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise ValueError(f"{folder} holds a damaged model ({reason})") from error
        size = sum(path.stat().st_size for path in folder.glob("model.onnx*"))
        self._cache = PromptCache(model, self.context_length, tokens_in_step(size))
        self._lock = threading.Lock()

    def prompt_ids(self, messages: list[Message]) -> list[int]:
        """The ids of a conversation up to where the answer begins, as in training; nothing is dropped."""
        return self._prompt.ids(messages)

    def stream(
        self, messages: list[Message], sampling: Sampling | None = None, cancel: threading.Event | None = None
    ) -> Iterator[Chunk]:
        """The answer to `messages` (role and content; the last is the user's), piece by piece.

        A conversation longer than the context loses its oldest turns. `cancel`, set from another thread, ends the
        answer at the next token, also while it waits for another answer or reads the prompt. The engine is free again
        when the last chunk was taken or the iterator is closed. Raises ValueError, before the first chunk, for messages
        that are no conversation or a last turn that is too long.
        """
        sampling = sampling or Sampling()
        room = min(sampling.max_tokens, max(1, int(self.context_length * LARGEST_ROOM)))
        ids, dropped = self._prompt.fit(messages, self.context_length, room)
        return self._answer(ids, dropped, sampling, cancel or threading.Event())

    def _answer(self, ids: list[int], dropped: int, sampling: Sampling, cancel: threading.Event) -> Iterator[Chunk]:
        cancelled = Chunk("", 0, "cancelled", dropped, len(ids))
        while not self._lock.acquire(timeout=0.05):
            if cancel.is_set():
                yield cancelled
                return
        try:
            most = min(sampling.max_tokens, self.context_length - len(ids))
            generator, reused = self._cache.prepare(ids, most, cancel)
            if generator is None:
                yield replace(cancelled, reused_tokens=reused)
                return
            text = TextStream(self._prompt.tokenizer)
            random = np.random.default_rng(sampling.seed)
            finish: Literal["stop", "length", "cancelled"] | None = None
            try:
                for tokens in range(most + 1):
                    if cancel.is_set():
                        finish = "cancelled"
                    elif tokens == most:
                        finish = "length"
                    else:
                        token = choose(generator.logits(), np.array(generator.ids), sampling, random)
                        finish = "stop" if token in self._ends else None
                    piece = text.finish() if finish else text.add(token)
                    if piece or finish:
                        yield Chunk(piece, tokens + (not finish), finish, dropped, len(ids), reused)
                    if finish:
                        return
                    generator.read([token])
            except Exception:
                generator = None  # what it has read is uncertain now
                raise
            finally:
                if generator is not None:
                    self._cache.keep(generator)
        finally:
            self._lock.release()
