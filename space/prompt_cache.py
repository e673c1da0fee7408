"""Generators that are kept after their answer, so that a follow-up reads only what is new in the conversation."""

import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnxruntime_genai as og

# Tokens read in one step at most: each generator goes on holding the logits of its longest step.
LONGEST_STEP = 32
SHORTEST_STEP = 16
# A step reads few enough tokens to be stopped within a second: two cores read some 60 of a model of 1 GB.
TOKENS_TIMES_BYTES = 32e9
# A generator is made with room for at least so many tokens, and for the conversation to grow to twice its length.
LEAST_ROOM = 128


def tokens_in_step(model_bytes: int) -> int:
    """How many tokens a model of this size reads at a time, between two looks at whether it shall stop.

    By its size, not its speed: the same conversation is always read in the same steps, and gives the same bits.
    """
    return int(min(LONGEST_STEP, max(SHORTEST_STEP, TOKENS_TIMES_BYTES // max(1, model_bytes))))


class KeptGenerator:
    """A generator and the ids that it has read (prompt and answer); `prompt` of them were the last prompt's."""

    def __init__(self, model: og.Model, room: int) -> None:
        params = og.GeneratorParams(model)
        params.set_search_options(max_length=room, batch_size=1)
        self._generator = og.Generator(model, params)
        self.room = room
        self.ids: list[int] = []
        self.prompt = 0

    def in_common(self, ids: Sequence[int]) -> int:
        """How many ids at the beginning of `ids` have been read already; at most all but the last, to have logits."""
        most = min(len(self.ids), len(ids) - 1)
        return next((i for i in range(most) if self.ids[i] != ids[i]), most)

    def rewind(self, length: int) -> None:
        if length < len(self.ids):
            self._generator.rewind_to(length)
            del self.ids[length:]

    def read(self, ids: Sequence[int]) -> None:
        self._generator.append_tokens(np.array(ids, dtype=np.int32))
        self.ids.extend(ids)

    def logits(self) -> np.ndarray:
        """Logits of the next token, of shape (vocabulary,)."""
        logits: Any = self._generator.get_logits()
        return logits[0, -1]


class PromptCache:
    """The generators of the last conversations; together they have room for about one full context of the model.

    Not safe for threads: the engine's lock guards it.
    """

    def __init__(self, model: og.Model, context_length: int, step: int = LONGEST_STEP) -> None:
        self._model = model
        self._context_length = context_length
        self._step = step
        self._kept: list[KeptGenerator] = []  # the last used one is last

    def prepare(self, ids: Sequence[int], room: int, cancel: threading.Event) -> tuple[KeptGenerator | None, int]:
        """A generator that has read `ids` and has `room` for more, and how many it had read before.

        The generator is None when `cancel` was set while it read.
        """
        generator, reused = self._take(ids, len(ids) + room)
        generator.rewind(reused)
        generator.prompt = len(ids)
        while (start := len(generator.ids)) < len(ids):
            if cancel.is_set():
                self.keep(generator)
                return None, reused
            generator.read(ids[start : start + self._step])
        return generator, reused

    def keep(self, generator: KeptGenerator) -> None:
        """Put a generator back after its answer; one that failed is just not put back."""
        self._kept.append(generator)

    def _take(self, ids: Sequence[int], needed: int) -> tuple[KeptGenerator, int]:
        """Take out the generator that has read most of `ids`, or make one."""
        common = [kept.in_common(ids) if kept.room >= needed else 0 for kept in self._kept]
        best = max(range(len(common)), key=lambda i: (common[i], i), default=None)
        # Another conversation with the same system message is better left as it is.
        if best is not None and 2 * common[best] > self._kept[best].prompt:
            return self._kept.pop(best), common[best]
        room = LEAST_ROOM
        while room < 2 * needed:
            room *= 2
        room = min(room, self._context_length)
        while self._kept and sum(kept.room for kept in self._kept) + room > self._context_length:
            del self._kept[0]
        return KeptGenerator(self._model, room), 0
