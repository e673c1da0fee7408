"""Reading dvc.lock: the stages of the last finished run, their outputs and their parameters."""

from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from stages.common.errors import StageError
from stages.common.params import PARAMS
from stages.common.pipeline import read_pipeline

LOCK = Path("dvc.lock")


def read_lock(folder: Path = Path()) -> dict[str, Any]:
    """The stages of a folder's dvc.lock, in the order of the pipeline; none where there is no such file."""
    path = folder / LOCK
    if not path.is_file():
        return {}
    try:
        stages = YAML(typ="safe").load(path.read_text(encoding="utf-8"))["stages"]
    except (YAMLError, ValueError, KeyError, TypeError):
        raise StageError(f"{path} is damaged. `git checkout {LOCK}`, then `dvc repro`.") from None
    return {name: stages[name] for name in read_pipeline(folder) if name in stages}


def outputs(stages: dict[str, Any]) -> dict[str, str]:
    """The md5 of every output, by path, in the order of the stages."""
    return {out["path"]: out["md5"] for stage in stages.values() for out in stage.get("outs", [])}


def parameters(stages: dict[str, Any]) -> dict[str, Any]:
    """The parameters of the recorded run. Those in params.yaml may be newer."""
    return {
        key: value for stage in stages.values() for key, value in stage.get("params", {}).get(str(PARAMS), {}).items()
    }
