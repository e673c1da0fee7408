"""Conversations, how an engine answers them, and what is trained on in them."""

from collections.abc import Sequence

from chatapp.engine import Chunk, Engine, Sampling


def chat(*texts: str, system: str | None = "You are a helpful assistant.") -> list[dict]:
    """A conversation of these texts, the user's first."""
    turns = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
    return ([{"role": "system", "content": system}] if system else []) + turns


def answer(engine: Engine, messages: list[dict[str, str]], **sampling) -> tuple[str, list[Chunk]]:
    """The engine's greedy answer of at most 24 tokens, and its chunks; `sampling` may change that."""
    chunks = list(engine.stream(messages, Sampling(**{"temperature": 0, "max_tokens": 24, **sampling})))
    return "".join(chunk.text for chunk in chunks), chunks


def answer_spans(mask: Sequence[int]) -> list[tuple[int, int]]:
    """The (start, end) of each run of ones: the answers that are trained on, in order."""
    edges = [i for i in range(len(mask) + 1) if (mask[i] if i < len(mask) else 0) != (mask[i - 1] if i else 0)]
    return list(zip(edges[::2], edges[1::2], strict=True))
