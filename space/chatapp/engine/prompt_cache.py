"""Generators that stay in memory after their answer: a follow-up question then reads only the new messages."""

import threading
from collections.abc import Sequence

import onnxruntime_genai as og

from chatapp.engine.generators import JsonGenerator, KeptGenerator

# Tokens read in one step. A generator keeps the logits of its longest step in memory, so steps are short.
MAX_STEP = 32
MIN_STEP = 16
# A step ends within a second, because an answer can be cancelled only between steps. Two cores read about 60 tokens a
# second with a model of 1 GB.
TOKENS_TIMES_BYTES = 32e9
# Tokens that a new generator has room for: at least these, and at least twice the conversation's length.
MIN_ROOM = 128


def tokens_in_step(model_bytes: int) -> int:
    """How many tokens a model of this size reads in one step.

    The model's size decides, not its speed: the same conversation is always read in the same steps, so that it gives
    the same bits on every machine.
    """
    return int(min(MAX_STEP, max(MIN_STEP, TOKENS_TIMES_BYTES // max(1, model_bytes))))


class PromptCache:
    """The generators of the last conversations. Together they have room for about one context of the model.

    Threads must not share it; the engine's lock guards it.
    """

    def __init__(self, model: og.Model, context_length: int, step: int = MAX_STEP) -> None:
        self._model = model
        self._context_length = context_length
        self._step = step
        self._kept: list[KeptGenerator] = []  # the last used one is last

    def prepare(
        self, ids: Sequence[int], room: int, cancel: threading.Event, json_object: bool = False
    ) -> tuple[KeptGenerator | None, int]:
        """A generator that has read `ids` and has room for `room` more, and how many of `ids` it reused.

        The generator is None when `cancel` was set before everything was read. With `json_object` it is a new one that
        writes a JSON object; CannotConstrain is raised when that is not possible.
        """
        generator, reused = self._new_json(len(ids) + room) if json_object else self._take(ids, len(ids) + room)
        generator.rewind(reused)
        generator.prompt = len(ids)
        while (start := len(generator.ids)) < len(ids):
            if cancel.is_set():
                self.keep(generator)
                return None, reused
            generator.read(ids[start : start + self._step])
        return generator, reused

    def keep(self, generator: KeptGenerator) -> None:
        """Put a generator back after its answer. A generator that failed is not put back."""
        if generator.reusable:
            self._kept.append(generator)

    def _take(self, ids: Sequence[int], needed: int) -> tuple[KeptGenerator, int]:
        """Take the generator that has read the most of `ids`, or make a new one."""
        common = [kept.in_common(ids) if kept.room >= needed else 0 for kept in self._kept]
        best = max(range(len(common)), key=lambda i: (common[i], i), default=None)
        # A generator that shares only the system message belongs to another conversation: leave it there.
        if best is not None and 2 * common[best] > self._kept[best].prompt:
            return self._kept.pop(best), common[best]
        room = MIN_ROOM
        while room < 2 * needed:
            room *= 2
        room = min(room, self._context_length)
        self._make_space(room)
        return KeptGenerator(self._model, room), 0

    def _new_json(self, room: int) -> tuple[KeptGenerator, int]:
        self._make_space(room)
        return JsonGenerator(self._model, room), 0

    def _make_space(self, room: int) -> None:
        while self._kept and sum(kept.room for kept in self._kept) + room > self._context_length:
            del self._kept[0]
