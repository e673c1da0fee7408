"""The page's text about its models: their origin, their training, and their measurements.

The export stage writes a card beside each model (card.json). Facts that a card does not hold are left out.
"""

from collections.abc import Mapping
from html import escape
from pathlib import PurePosixPath
from typing import Any

Card = Mapping[str, Any]
MEASURED = {  # the keys of a card's `quality`, with their label and format
    "perplexity": ("perplexity", "{:.2f}"),
    "perplexity_before": ("perplexity before the export", "{:.2f}"),
    "token_accuracy": ("token accuracy", "{:.1%}"),
    "token_agreement": ("greedy tokens equal to those before the export", "{:.1%}"),
    "bytes": ("size, MB", "{:.0f}"),
}


def title(card: Card) -> str:
    """The base model's name, and the exported model's."""
    source = (card.get("base_model") or {}).get("source")
    return f"{_short(source)}, {card.get('name', 'tuned')}" if source else "Chat"


def subtitle(card: Card) -> str:
    data = " and ".join(_short(dataset["source"]) for dataset in card.get("datasets") or [])
    parts = [
        f"Fine-tuned by QLoRA on {data}" if data else "A language model",
        f"{card['export']['export_precision']} on a CPU" if card.get("export") else "on a CPU",
        "answers may be wrong",
    ]
    return " · ".join(parts)


def about(cards: Mapping[str, Card], commit: str = "") -> str:
    """One Markdown page of all cards, by the name of their model; the first is the tuned model's.

    `commit`: the project's commit that serves the models.
    """
    first = next(iter(cards.values()))
    origin = {**_origin(first), **({"Project's commit": _code(commit)} if commit else {})}
    parts = [_measured(cards), _table("Where it comes from", origin)]
    training = (first.get("training") or {}).get("params") or {}
    for heading, params in (("Training parameters", training), ("Export parameters", first.get("export") or {})):
        parts.append(_table(heading, {key: _code(value) for key, value in params.items()}, ("parameter", "value")))
    return "\n\n".join(filter(None, parts))


def _measured(cards: Mapping[str, Card]) -> str:
    held_out = next(iter(cards.values())).get("held_out")
    names = sorted(cards)
    rows = []
    for key, (label, form) in MEASURED.items():
        values = [(cards[name].get("quality") or {}).get(key) for name in names]
        if any(value is not None for value in values):
            scale = 1e6 if key == "bytes" else 1
            shown = ["–" if value is None else form.format(value / scale) for value in values]
            rows.append(f"| {label} | {' | '.join(shown)} |")
    if not rows:
        return ""
    data = (
        f" on {held_out['conversations']} held-out conversations, {held_out['supervised_tokens']} tokens"
        if held_out
        else ""
    )
    head = [f"| | {' | '.join(names)} |", "| --- |" + " --- |" * len(names)]
    return "\n".join([f"### Measured{data}", "", *head, *rows])


def _origin(card: Card) -> dict[str, str]:
    training = card.get("training") or {}
    origin: dict[str, str] = {}
    datasets = card.get("datasets") or []
    names = ["Data"] if len(datasets) == 1 else [f"Data {number}" for number in range(1, len(datasets) + 1)]
    for label, source in [("Base model", card.get("base_model") or {}), *zip(names, datasets, strict=True)]:
        if source:
            origin[label] = _code(source.get("source"))
            origin[f"{label}: version"] = _code(source.get("revision") or "the file in the project's repository")
            origin[f"{label}: licence"] = escape(str(source.get("license") or "not stated"))
    if training:
        origin["Trained on"] = (
            f"{training.get('train_conversations')} conversations, "
            f"{training.get('train_supervised_tokens')} assistant tokens"
        )
    if card.get("system_prompt"):
        origin["System prompt"] = escape(card["system_prompt"])
    return origin


def _table(heading: str, rows: Mapping[str, str], columns: tuple[str, str] = ("", "")) -> str:
    if not rows:
        return ""
    lines = [f"### {heading}", "", f"| {columns[0]} | {columns[1]} |", "| --- | --- |"]
    return "\n".join([*lines, *(f"| {key} | {value} |" for key, value in rows.items())])


def _code(value: Any) -> str:
    text = ", ".join(map(str, value)) if isinstance(value, list) else "–" if value is None else str(value)
    return "`" + text.replace("`", "'").replace("|", "\\|") + "`" if text else "–"


def _short(source: str) -> str:
    """`owner/phi-2` → `phi-2`; a file's name up to its first dot."""
    return PurePosixPath(source).name.partition(".")[0]
