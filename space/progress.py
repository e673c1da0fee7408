"""An answer as it grows, with its speed: what the page shows. Also two answers that grow side by side."""

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from engine import Chunk


@dataclass(frozen=True)
class Progress:
    """All of an answer so far."""

    text: str
    tokens: int
    first_after: float  # seconds until its first piece: the model read the conversation
    tokens_per_second: float | None  # speed of writing since then; None until there is one
    finish_reason: Literal["stop", "length", "cancelled"] | None
    dropped_turns: int  # oldest turns of the conversation that the model did not read


def progress(chunks: Iterator[Chunk]) -> Iterator[Progress]:
    """Only the time inside of `chunks` counts: what its consumer does between two of them does not."""
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
    """Several answers that grow in turns, a piece of each at a time: none has the processor at another's cost."""
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
