"""A growing answer with its speed, as the page shows it; and several answers that grow side by side."""

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from chatapp.engine import Chunk


@dataclass(frozen=True)
class Progress:
    """The complete answer so far."""

    text: str
    tokens: int
    first_after: float  # seconds until the first piece, in which the model read the conversation
    tokens_per_second: float | None  # speed since the first piece; None until there is a second one
    finish_reason: Literal["stop", "length", "cancelled"] | None
    dropped_turns: int  # oldest turns of the conversation that did not fit the context


def progress(chunks: Iterator[Chunk]) -> Iterator[Progress]:
    """The states of an answer. Only the time inside `chunks` counts, not the time of a slow consumer."""
    text, seconds, first_after, first_tokens = "", 0.0, 0.0, 0
    while True:
        began = time.perf_counter()
        chunk = next(chunks, None)
        seconds += time.perf_counter() - began
        if chunk is None:
            return
        if not first_after:
            first_after, first_tokens = seconds, chunk.tokens
        text += chunk.text
        wrote = chunk.tokens - first_tokens
        speed = wrote / (seconds - first_after) if wrote else None
        yield Progress(text, chunk.tokens, first_after, speed, chunk.finish_reason, chunk.dropped_turns)


def side_by_side(streams: Mapping[str, Iterator[Progress]]) -> Iterator[dict[str, Progress]]:
    """Several answers that grow in turns, one piece of each at a time: each has the same share of the processor."""
    growing = dict(streams)
    latest: dict[str, Progress] = {}
    while growing:
        for name, stream in list(growing.items()):
            piece = next(stream, None)
            if piece is None:
                del growing[name]
            else:
                latest[name] = piece
                yield dict(latest)
