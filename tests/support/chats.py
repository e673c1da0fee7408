"""Conversations for the engine."""


def chat(*texts: str, system: str | None = "You are a helpful assistant.") -> list[dict]:
    """A conversation of these texts, the user's first."""
    turns = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
    return ([{"role": "system", "content": system}] if system else []) + turns
