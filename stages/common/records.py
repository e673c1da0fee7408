"""source.json, in which fetch records where a data set or a model came from: read and checked."""

from pathlib import Path
from typing import Any

from stages.common.artifacts import read_json
from stages.common.errors import StageError

KEYS = ("source", "revision", "hub", "license")


def read_source(path: Path) -> dict[str, Any]:
    """The record of a base model. Raises StageError when it is missing or not as fetch writes it."""
    source = read_json(path)
    _check([source], path)
    return dict(source)


def read_sources(path: Path) -> list[dict[str, Any]]:
    """The records of all data sets, in their order. Raises StageError, as read_source does."""
    sources = read_json(path)
    _check(sources, path)
    return list(sources)


def _check(sources: Any, path: Path) -> None:
    if not isinstance(sources, list) or not sources or not all(is_record(source) for source in sources):
        raise StageError(f"{path} is not as fetch writes it. Delete it and run `dvc repro`.")


def is_record(source: Any) -> bool:
    return isinstance(source, dict) and all(key in source for key in KEYS)
