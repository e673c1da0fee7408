"""A stage's typed parameters, for tests: a recipe's values with changes."""

from typing import Any, TypeVar

from stages.common.params import read_values
from stages.common.schema import ExportParams, Section, TrainParams
from tests.support.project import ROOT

AnySection = TypeVar("AnySection", bound=Section)

# What trains a tiny model in four steps.
TINY_TRAINING = {
    "max_steps": 4,
    "eval_steps": 1,
    "logging_steps": 1,
    "save_steps": 2,
    "learning_rate": 0.01,
    "max_grad_norm": 1.0,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "warmup_ratio": 0.0,
}


def section(kind: type[AnySection], recipe: str = "smollm2-cpu", **changes: Any) -> AnySection:
    """The values of a recipe that belong to one stage, some of them changed, checked as the stage would."""
    values = read_values(ROOT / f"recipes/{recipe}.yaml") | changes
    return kind.model_validate({key: values[key] for key in kind.model_fields} | changes)


def train_params(recipe: str = "smollm2-cpu", **changes: Any) -> TrainParams:
    return section(TrainParams, recipe, **changes)


def export_params(recipe: str = "smollm2-cpu", **changes: Any) -> ExportParams:
    return section(ExportParams, recipe, **changes)
