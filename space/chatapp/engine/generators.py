"""Generators of onnxruntime-genai: one for any text, and one that writes only a JSON object."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnxruntime_genai as og

from chatapp.engine.sampling import Sampling, choose, scores

# RFC 8259 in the form that llguidance reads. White space and numbers are bounded: otherwise a model could write them
# until its answer is cut.
JSON_OBJECT = r"""
start: object
object: "{" ws? (pair ("," ws? pair)*)? "}"
array: "[" ws? (value ("," ws? value)*)? "]"
pair: STRING ws? ":" ws? value
value: (object | array | STRING | NUMBER | "true" | "false" | "null") ws?
ws: WS
WS: /[ \n\t]{1,16}/
NUMBER: /-?(0|[1-9][0-9]{0,15})(\.[0-9]{1,15})?([eE][+-]?[0-9]{1,2})?/
STRING: /"([^"\\\x00-\x1f\x7f]|\\(["\\\/bfnrt]|u[0-9a-fA-F]{4}))*"/
"""


class CannotConstrain(ValueError):
    """onnxruntime-genai cannot constrain this model's answers."""


class KeptGenerator:
    """A generator with the ids that it has read. The first `prompt` of these ids were the last prompt."""

    reusable = True  # for another answer

    def __init__(self, model: og.Model, room: int) -> None:
        self._generator = self._made(model, room)
        self.room = room
        self.ids: list[int] = []
        self.prompt = 0

    def _made(self, model: og.Model, room: int) -> Any:
        params = og.GeneratorParams(model)
        params.set_search_options(max_length=room, batch_size=1)
        return og.Generator(model, params)

    def in_common(self, ids: Sequence[int]) -> int:
        """How many of the first `ids` were read already. The last one never counts, because reading it gives logits."""
        longest = min(len(self.ids), len(ids) - 1)
        return next((i for i in range(longest) if self.ids[i] != ids[i]), longest)

    def rewind(self, length: int) -> None:
        """Forget all ids after the first `length`."""
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

    def choose(self, logits: np.ndarray, sampling: Sampling, random: np.random.Generator) -> int:
        """The id of the next token, by these logits. Give it to `read` to go on."""
        return choose(logits, self.ids, sampling, random, self.prompt)


class JsonGenerator(KeptGenerator):
    """A generator of one answer that is a JSON object, and then of an end token.

    Its grammar begins at the first token that it chooses itself and cannot begin again. Raises CannotConstrain where
    onnxruntime-genai does not know the model's tokenizer.
    """

    reusable = False

    def _made(self, model: og.Model, room: int) -> Any:
        params = og.GeneratorParams(model)
        params.set_search_options(max_length=room, batch_size=1, do_sample=False)
        params.set_guidance("lark_grammar", JSON_OBJECT)
        try:
            return og.Generator(model, params)
        except RuntimeError as error:
            reason = next(iter(str(error).splitlines()), "no reason given")
            raise CannotConstrain(f"this model's answers cannot be constrained to JSON ({reason})") from None

    def read(self, ids: Sequence[int]) -> None:
        if len(self.ids) < self.prompt:
            super().read(ids)
        else:  # `choose` has appended it
            self.ids.extend(ids)

    def choose(self, logits: np.ndarray, sampling: Sampling, random: np.random.Generator) -> int:
        scored = scores(logits, self.ids, sampling, random, self.prompt)
        self._generator.set_logits(scored[np.newaxis, np.newaxis])
        self._generator.generate_next_token()  # the grammar forbids tokens here, and sees only what is chosen here
        return int(self._generator.get_next_tokens()[0])
