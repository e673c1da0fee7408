"""What the plan's tests share: the recipes' parameters, their models' configurations, machines."""

import json

from transformers import PretrainedConfig

from commands.plan import configuration
from stages.common.machine import Machine
from stages.common.memory import GIB
from stages.common.schema import Params
from tests.support.params import section
from tests.support.project import ROOT

CONFIGS = sorted((ROOT / "recipes/configs").glob("*.json"))
REFERENCE = section(Params, "phi2-oasst1")
EMBEDDED = section(Params, "smollm2-cpu")
LAPTOP = Machine(cores=2, memory=8 * GIB, disk=100 * GIB, gpu=None)


def recorded_config(name: str) -> PretrainedConfig:
    """The configuration in recipes/configs/`name`.json, new each time: a test may change it."""
    return configuration(json.loads((ROOT / f"recipes/configs/{name}.json").read_text(encoding="utf-8"))["config"])
