"""What the page tells of the model: where it comes from, and what was measured."""

from collections.abc import Mapping
from typing import Any


def title(card: Mapping[str, Any]) -> str:
    return str(card.get("title") or "Chat")


def about(cards: Mapping[str, Mapping[str, Any]]) -> str:
    """All cards as Markdown."""
    parts = []
    for name, card in cards.items():
        parts.append(f"## {name.capitalize()} model\n\n{_table(card)}")
    return "\n\n".join(parts)


def _table(card: Mapping[str, Any]) -> str:
    rows = [f"| {key} | {value} |" for key, value in card.items() if not isinstance(value, dict)]
    sections = [f"\n\n### {key}\n\n{_table(value)}" for key, value in card.items() if isinstance(value, dict)]
    return "\n".join(["| | |", "| --- | --- |", *rows]) + "".join(sections)
