"""Chunks of answers without a model."""

from chatapp.engine import Chunk


def chunks(*texts, finish="length"):
    return [
        Chunk(text, i + 1, finish if i + 1 == len(texts) else None, prompt_tokens=5) for i, text in enumerate(texts)
    ]
