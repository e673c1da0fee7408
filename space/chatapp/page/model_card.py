"""The page's text about its models: their origin, their training, and their measurements.

The export stage writes a card beside each model (card.json). Facts that a card does not hold are left out.
"""

import re
from collections.abc import Mapping
from html import escape
from pathlib import PurePosixPath
from typing import Any

Card = Mapping[str, Any]
Evaluation = Mapping[str, Any]  # what the evaluate stage wrote: reports/evaluation.json
MEASURED = {  # the figures of each model, with their label and format
    "perplexity": ("perplexity", "{:.2f}"),
    "token_accuracy": ("token accuracy", "{:.1%}"),
    "megabytes": ("size, MB", "{:.0f}"),
}
PERPLEXITY = (
    "Perplexity: among how many equally likely tokens a model hesitates, on average, at each token of an answer. "
    "Lower is better."
)
FILE_TYPES = re.compile(r"(\.Q\d\w*)?\.(gguf|jsonl?|csv|parquet)(\.gz)?$", re.IGNORECASE)


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


def about(cards: Mapping[str, Card], commit: str = "", evaluation: Evaluation | None = None) -> str:
    """One Markdown page of all cards, by the name of their model; the first is the tuned model's.

    `commit`: the project's commit that serves the models. `evaluation`: the figures that the project reports, of base
    and tuned before the export; without them, the page shows those of the cards.
    """
    first = next(iter(cards.values()))
    origin = {**_origin(first), **({"Project's commit": _code(commit)} if commit else {})}
    training = (first.get("training") or {}).get("params") or {}
    parts = [
        _measured(cards, evaluation or {}),
        _section("Where it comes from", _table(origin)),
        _folded("Training parameters", _parameters(training)),
        _folded("Export parameters", _parameters(first.get("export") or {})),
    ]
    return "\n\n".join(filter(None, parts))


def _measured(cards: Mapping[str, Card], evaluation: Evaluation) -> str:
    """One set of figures: those that the project reports, or else those of the cards."""
    exported = {name: _figures(cards[name].get("quality") or {}) for name in sorted(cards)}
    if "tuned" in evaluation and "tuned" in exported:
        columns = {name: _figures(evaluation.get(name) or {}) for name in ("base", "tuned")}
        columns["tuned, exported"] = exported["tuned"]
        below = [PERPLEXITY, _difference(evaluation), "This page answers with the exported models."]
    else:
        columns, below = exported, [PERPLEXITY]
    rows = []
    for key, (label, form) in MEASURED.items():
        if any(key in figures for figures in columns.values()):
            shown = [form.format(figures[key]) if key in figures else "–" for figures in columns.values()]
            rows.append(f"| {label} | {' | '.join(shown)} |")
    if not rows:
        return ""
    held_out = evaluation.get("held_out") or next(iter(cards.values())).get("held_out")
    data = (
        f" on {held_out['conversations']} held-out conversations, {held_out['supervised_tokens']} tokens"
        if held_out
        else ""
    )
    head = [f"| | {' | '.join(columns)} |", "| --- |" + " --- |" * len(columns)]
    table = "\n".join([*head, *rows])
    return _section(f"Measured{data}", "\n\n".join(filter(None, [table, *below])))


def _figures(measured: Mapping[str, Any]) -> dict[str, float]:
    """Those of the figures that the page shows, and the size in MB."""
    figures = {key: measured[key] for key in MEASURED if measured.get(key) is not None}
    return figures | ({"megabytes": measured["bytes"] / 1e6} if measured.get("bytes") else {})


def _difference(evaluation: Evaluation) -> str:
    """The sentence about tuned against base, with its interval."""
    difference = evaluation.get("difference")
    if not difference:
        return ""
    low, high = difference["loss_ci95_low"], difference["loss_ci95_high"]
    verdict = "excludes zero" if difference["significant"] else "includes zero: no difference is shown"
    return (
        f"Difference of loss (the logarithm of perplexity), tuned minus base: {difference['loss']:+.3f}, "
        f"95 % interval [{low:+.3f}, {high:+.3f}]. The interval {verdict}."
    )


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


def _section(heading: str, text: str) -> str:
    return f"### {heading}\n\n{text}" if text else ""


def _folded(heading: str, text: str) -> str:
    """A section that opens with a click. Markdown inside HTML needs empty lines around it."""
    return f"<details><summary>{heading}</summary>\n\n{text}\n\n</details>" if text else ""


def _parameters(params: Mapping[str, Any]) -> str:
    return _table({key: _code(value) for key, value in params.items()}, ("parameter", "value"))


def _table(rows: Mapping[str, str], columns: tuple[str, str] = ("", "")) -> str:
    if not rows:
        return ""
    lines = [f"| {columns[0]} | {columns[1]} |", "| --- | --- |"]
    return "\n".join([*lines, *(f"| {key} | {value} |" for key, value in rows.items())])


def _code(value: Any) -> str:
    text = ", ".join(map(str, value)) if isinstance(value, list) else "–" if value is None else str(value)
    return "`" + text.replace("`", "'").replace("|", "\\|") + "`" if text else "–"


def _short(source: str) -> str:
    """`owner/Qwen2.5-0.5B` → `Qwen2.5-0.5B`; a file's name without its type."""
    return FILE_TYPES.sub("", PurePosixPath(source).name)
