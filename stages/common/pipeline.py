"""What dvc.yaml says of the stages: their names in order, their outputs, the code that each depends on."""

from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from stages.common.errors import StageError

DVC_YAML = Path("dvc.yaml")


def read_pipeline(folder: Path = Path()) -> dict[str, dict[str, Any]]:
    """The stages of a folder's dvc.yaml by name, in the order of the file. Raises StageError when there is none."""
    path = folder / DVC_YAML
    if not path.is_file():
        raise StageError(f"{path} is missing. Run this from the project's root.")
    return dict(YAML(typ="safe").load(path.read_text(encoding="utf-8"))["stages"])


def code_of(stage: str) -> list[Path]:
    """The source files and folders that a stage depends on."""
    return [Path(dep) for dep in read_pipeline()[stage]["deps"] if dep.startswith("stages/")]
