"""End an answer at the first of the client's stop sequences. The sequence itself is not part of the answer."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

from chatapp.engine import Chunk, TokenLogprob


def until_stop(chunks: Iterator[Chunk], stops: Sequence[str]) -> Iterator[Chunk]:
    """`chunks` up to a stop sequence. Text that may be the beginning of one is held back until the next chunk.

    Log probabilities stay with the text that their tokens began.
    """
    held = ""
    begun: list[tuple[int, tuple[TokenLogprob, ...]]] = []  # where in `held` the text of these tokens begins
    for chunk in chunks:
        begun.append((len(held), chunk.logprobs))
        held += chunk.text
        ends = [at for stop in stops if (at := held.find(stop)) >= 0]
        if ends:
            logprobs = _together(each for at, each in begun if at < min(ends))
            yield replace(chunk, text=held[: min(ends)], finish_reason="stop", logprobs=logprobs)
            return
        keep = 0 if chunk.finish_reason else max((_begun(held, stop) for stop in stops), default=0)
        edge = len(held) - keep
        ready, held = held[:edge], held[edge:]
        if ready or chunk.finish_reason:
            logprobs = _together(each for at, each in begun if at < edge or chunk.finish_reason)
            begun = [(at - edge, each) for at, each in begun if at >= edge and not chunk.finish_reason]
            yield replace(chunk, text=ready, logprobs=logprobs)


def _together(parts: Iterator[tuple[TokenLogprob, ...]]) -> tuple[TokenLogprob, ...]:
    return tuple(each for part in parts for each in part)


def _begun(text: str, stop: str) -> int:
    """How many characters at the end of `text` are the beginning of `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
