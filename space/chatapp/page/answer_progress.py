"""A growing answer with its speed, as the page shows it; and several answers that grow side by side."""

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
    """The states of an answer. The times are those at which its tokens were made, however slow a consumer is."""
    text, first = "", None
    for chunk in chunks:
        first = first or chunk
        text += chunk.text
        wrote, seconds = chunk.tokens - first.tokens, chunk.seconds - first.seconds
        speed = wrote / seconds if seconds else None
        yield Progress(text, chunk.tokens, first.seconds, speed, chunk.finish_reason, chunk.dropped_turns)


def side_by_side(streams: Mapping[str, Iterator[Progress]]) -> Iterator[dict[str, Progress]]:
    """Several answers, one piece of each at a time. Their models take turns by themselves."""
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
