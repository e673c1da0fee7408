"""End an answer at the first of the client's stop sequences. The sequence itself is not part of the answer."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

from chatapp.engine import Chunk


def until_stop(chunks: Iterator[Chunk], stops: Sequence[str]) -> Iterator[Chunk]:
    """`chunks` up to a stop sequence. Text that may be the beginning of one is held back until the next chunk."""
    held = ""
    for chunk in chunks:
        held += chunk.text
        ends = [at for stop in stops if (at := held.find(stop)) >= 0]
        if ends:
            yield replace(chunk, text=held[: min(ends)], finish_reason="stop")
            return
        keep = 0 if chunk.finish_reason else max((_begun(held, stop) for stop in stops), default=0)
        ready, held = held[: len(held) - keep], held[len(held) - keep :]
        if ready or chunk.finish_reason:
            yield replace(chunk, text=ready)


def _begun(text: str, stop: str) -> int:
    """How many characters at the end of `text` are the beginning of `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
