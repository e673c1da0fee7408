"""Model cards: Markdown templates with the front matter that the hub reads, filled with recorded figures."""

from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

TEMPLATE = Path(__file__).parent.parent / "cards/model.md"


def hub_datasets(datasets: list[dict[str, Any]]) -> list[str] | None:
    """The hub repositories among the data sets of source.json, each once; None when there is none."""
    return list(dict.fromkeys(d["hub"] for d in datasets if d["hub"])) or None


def model_card(
    training: dict[str, Any],
    base: dict[str, Any],
    datasets: list[dict[str, Any]],
    merge: dict[str, Any],
    repository: str | None = None,
) -> str:
    """The merged model's README: what training.json and the two source.json record, and merge's parameters.

    `repository`: the hub's repository in which the card will be; None in this project.
    """
    data = ModelCardData(
        license=base["license"] or "other",
        base_model=base["hub"],
        datasets=hub_datasets(datasets),
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["trl", "sft", "qlora"],
    )
    filled: dict[str, Any] = {"training": training, "base": base, "datasets": datasets, "merge": merge}
    filled["repository"] = repository
    return f"{ModelCard.from_template(data, template_path=str(TEMPLATE), **filled)}\n"
