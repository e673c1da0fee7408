"""Answers that are one JSON object: llguidance says which tokens may come next."""

from collections.abc import Iterable
from functools import cached_property
from pathlib import Path

import llguidance
import numpy as np

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
    """llguidance cannot constrain this model's answers."""


class JsonConstraint:
    """The grammar's place in one answer."""

    def __init__(self, tokenizer: llguidance.LLTokenizer) -> None:
        self._matcher = llguidance.LLMatcher(tokenizer, llguidance.LLMatcher.grammar_from_lark(JSON_OBJECT))
        if problem := self._matcher.get_error():
            raise CannotConstrain(f"this model's answers cannot be constrained to JSON ({first_line(problem)})")

    def choose(self, scored: np.ndarray) -> int:
        """The allowed token with the best score of `scored`, shape (vocabulary,). It is a part of the answer now."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        allowed = np.unpackbits(bits, count=len(scored), bitorder="little").astype(bool)
        token = int(np.where(allowed, scored, -np.inf).argmax())
        self._matcher.consume_token(token)
        return token


class JsonGrammar:
    """Makes constraints for the model in `folder`. Threads may share it.

    Its `tokens` are as many as the logits of the model have. Raises CannotConstrain where llguidance cannot read the
    model's tokenizer.
    """

    def __init__(self, folder: Path, tokens: int, end_ids: Iterable[int]) -> None:
        self._path = folder / "tokenizer.json"
        self._tokens = tokens
        self._end_ids = sorted(end_ids)

    def begin(self) -> JsonConstraint:
        return JsonConstraint(self._tokenizer)

    @cached_property
    def _tokenizer(self) -> llguidance.LLTokenizer:
        try:
            return llguidance.LLTokenizer(str(self._path), self._tokens, self._end_ids)
        except Exception as error:  # llguidance raises a bare one
            raise CannotConstrain(
                f"this model's answers cannot be constrained to JSON ({first_line(str(error))})"
            ) from None


def first_line(text: str) -> str:
    return next(iter(text.splitlines()), "no reason given")
