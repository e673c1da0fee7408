"""Report what a run would need, before anything is downloaded: memory of each stage, disk, tokens, time.

Reads params.yaml and the base model's configuration: that of models/base/ or recipes/configs/, otherwise its
config.json alone from the hub. Writes nothing. Exits with 1, and names the nearest change that fits, when this machine
cannot do what the parameters ask. Run: `make plan`
"""

import math
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PretrainedConfig

from commands.needs import Need, Peak, disk, needs, peaks, smaller
from commands.trace import seconds_of_a_batch
from stages.common import memory
from stages.common.adapters import lora_config
from stages.common.artifacts import read_json, read_parquet
from stages.common.errors import StageError, first_line
from stages.common.hub import HubDownload
from stages.common.machine import Machine, check_machine, this_machine
from stages.common.memory import GIB
from stages.common.model_files import check_targets
from stages.common.params import read_params
from stages.common.schema import Params
from stages.common.sources import FileSource, HubSource, as_list, parse_source

BASE = Path("models/base")
RAW_SOURCE = Path("data/raw/source.json")
TOKENIZED = Path("data/tokenized")
CONFIGS = Path("recipes/configs")


@dataclass(frozen=True)
class Found:
    """A base model's config.json, where it was found, the bytes of its download (None: those of its weights), and
    whether the model is fetched already."""

    config: dict[str, Any]
    where: str
    download: int | None
    fetched: bool = False


def find_config(base_model: str, revision: str | None) -> Found:
    """The configuration of a base model, from the nearest place that has it."""
    fetched = BASE / "source.json"
    if fetched.is_file() and (source := read_json(fetched))["source"] == base_model and source["revision"] == revision:
        return Found(read_json(BASE / "config.json"), str(BASE), 0, fetched=True)
    for path in sorted(CONFIGS.glob("*.json")):
        known = read_json(path)
        if (known["base_model"], known["base_model_revision"]) == (base_model, revision):
            return Found(known["config"], str(path), known.get("download_bytes"))
    source = parse_source(base_model, revision)
    if isinstance(source, FileSource) and (source.path / "config.json").is_file():
        return Found(read_json(source.path / "config.json"), str(source.path), 0)
    if isinstance(source, HubSource) and source.file is None:
        return Found(HubDownload(source, "model").config(), "the hub (config.json alone)", None)
    raise StageError(
        f"the configuration of {base_model} is inside its package. Run `dvc repro fetch_model`, then `make plan`."
    )


def configuration(values: dict[str, Any]) -> PretrainedConfig:
    """A config.json as a model's configuration. Raises StageError for a type that transformers does not know."""
    values = dict(values)
    try:
        config = AutoConfig.for_model(values.pop("model_type"), **values)
    except (KeyError, ValueError, TypeError) as error:
        raise StageError(
            f"base_model: no model of a known type ({first_line(error)}). Choose a base_model that transformers knows."
        ) from None
    return config.get_text_config()


@dataclass(frozen=True)
class Tokenized:
    """Counts of the conversations in data/tokenized/; lengths in tokens."""

    conversations: int  # in train
    longest: int  # of either split
    batch: int  # what conversations of a training batch are padded to, on average
    held_out_tokens: int


def tokenized(params: Params) -> Tokenized | None:
    """data/tokenized/, if it was made from the data and with the parameters that the plan is for."""
    recorded = TOKENIZED / "params.json"
    if not recorded.is_file() or any(getattr(params, k, v) != v for k, v in read_json(recorded).items()):
        return None
    sources = zip(as_list(params.dataset), as_list(params.dataset_revision), strict=True)
    if not RAW_SOURCE.is_file() or [(s["source"], s["revision"]) for s in read_json(RAW_SOURCE)] != list(sources):
        return None
    train, held_out = (read_parquet(TOKENIZED / f"{split}.parquet")["length"] for split in ("train", "validation"))
    if params.train_sampling_strategy == "group_by_length":
        train = train.sort_values()
    size = params.per_device_train_batch_size
    padded = [max(train.iloc[start : start + size]) for start in range(0, len(train), size)]
    longest = max(train.max(), held_out.max())
    return Tokenized(len(train), int(longest), round(sum(padded) / len(padded)), int(held_out.sum()))


def red(text: str) -> str:
    return f"\033[31m{text}\033[0m" if sys.stdout.isatty() and "NO_COLOR" not in os.environ else text


def fits(needed: int, there: int) -> str:
    return "fits" if needed <= there else red(f"TOO MUCH: there are {there / GIB:.1f} GiB")


@dataclass(frozen=True)
class Plan:
    """What a run is planned from: its parameters, the model's configuration, this machine, and the conversations if
    they are there."""

    params: Params
    found: Found
    config: PretrainedConfig
    machine: Machine
    data: Tokenized | None

    @property
    def tokens(self) -> int:
        """Tokens of the longest conversation."""
        return self.data.longest if self.data else self.params.max_length

    @property
    def batch(self) -> int:
        """Conversations in an optimiser step."""
        return self.params.per_device_train_batch_size * self.params.gradient_accumulation_steps


def make_plan() -> Plan:
    params, machine = read_params(), this_machine()
    found = find_config(params.base_model, params.base_model_revision)
    config = configuration(found.config)
    check_targets(config, params.target_modules)
    return Plan(params, found, config, machine, tokenized(params) if found.fetched else None)


def steps_of(plan: Plan) -> int | None:
    """How many steps the training takes; None where passes are asked for, and the conversations are not there yet."""
    if plan.params.max_steps is not None:
        return plan.params.max_steps
    if plan.data is None or plan.params.num_train_epochs is None:
        return None
    return math.ceil(plan.params.num_train_epochs * math.ceil(plan.data.conversations / plan.batch))


def report_run(plan: Plan) -> None:
    """Print what would be trained, on what, here."""
    params, machine, data = plan.params, plan.machine, plan.data
    gpu = f"{machine.gpu_name} with {machine.gpu / GIB:.1f} GiB" if machine.gpu else "no GPU"
    print(
        f"Plan for {params.base_model}\non {', '.join(as_list(params.dataset))} (configuration from {plan.found.where})"
    )
    here = f"{machine.cores} cores, {machine.memory / GIB:.1f} GiB of memory, {gpu}, {machine.disk / GIB:.0f} GiB free"
    print(f"Here: {here}\n")
    shape = memory.shape_of(plan.config, lora_config(params))
    share = 100 * shape.adapter / shape.parameters
    print(f"  weights    {shape.parameters:,} in the base, {shape.adapter:,} ({share:.2f} %) in the LoRA adapter")
    if (steps := steps_of(plan)) is None:
        print(f"  training   {params.num_train_epochs:g} passes over the conversations that tokenize keeps")
        return
    seen = steps * plan.batch
    print(f"  training   {steps} steps, {seen:,} conversations, at most {seen * params.max_length:,} tokens")
    if data:
        print(
            f"             {seen / data.conversations:.1f} passes over data/tokenized: {data.conversations:,} "
            f"conversations, {data.longest} tokens at most, {data.batch} in a batch on average"
        )


def report_memory(plan: Plan, planned: dict[str, Peak]) -> list[str]:
    """Print each stage's peak; return a line for each that does not fit."""
    print("\n  peak memory, GiB")
    found: list[Need] = needs(planned, plan.machine)
    for need in found:
        print(f"  {need.stage:10} {need.needed / GIB:5.1f}   {fits(need.needed, need.there)}{need.where}")
    if plan.params.fp16 and plan.machine.gpu is None and (card := planned["train"].gpu):
        print(f"  {'':10} {card / GIB:5.1f}   what train would take of a GPU (by formula, unmeasured)")
    return [
        f"{need.stage}: needs {need.needed / GIB:.1f} GiB{need.where}, {need.there / GIB:.1f} are there"
        for need in found
        if not need.fits
    ]


def report_disk(plan: Plan) -> list[str]:
    """Print what would be written; return a line when there is too little room for it."""
    sizes = disk(plan.config, plan.params, plan.found.download, plan.found.fetched)
    needed, free = sum(sizes.values()), plan.machine.disk
    parts = ", ".join(f"{name} {size / GIB:.1f}" for name, size in sizes.items())
    print(f"\n  disk, GiB  {needed / GIB:5.1f}   {fits(needed, free)}")
    print(f"             ({parts}; the data set not counted)")
    if needed <= free:
        return []
    more = f"{(needed - free) / GIB:.1f}"
    return [f"disk: needs {needed / GIB:.1f} GiB, {free / GIB:.1f} are free: free {more} more"]


def report_time(plan: Plan) -> None:
    """Time one batch and print what steps and evaluations would take; without conversations, how to get there."""
    data, params, steps = plan.data, plan.params, steps_of(plan)
    if data is None or steps is None or "--no-probe" in sys.argv:
        print("\n  time       measured once the conversations are there (dvc repro tokenize)")
        return
    print("\n  time       measuring one batch …", end="\r", flush=True)
    seconds = seconds_of_a_batch(BASE, params, data.batch)
    # An evaluation is one forward pass. A step takes three times as long, or four with recomputed activations.
    part = seconds / (4 if params.gradient_checkpointing else 3)
    evaluations = 1 + steps // params.eval_steps
    scored = evaluations * data.held_out_tokens / (params.per_device_train_batch_size * data.batch)
    training = steps * params.gradient_accumulation_steps * seconds
    print(
        f"  time       {describe(training)} of training steps, {describe(scored * part)} of {evaluations} "
        f"evaluations, at the {seconds:.1f} s measured for a batch here"
    )


def main() -> None:
    plan = make_plan()
    report_run(plan)
    problems = report_memory(plan, peaks(plan.config, plan.params, plan.tokens)) + report_disk(plan)
    try:
        check_machine(plan.params.fp16, plan.params.bf16, plan.params.attn_implementation)
    except StageError as error:
        problems.append(f"train: {error}")
    if problems:
        print()
        raise StageError("\n       ".join([*problems, *nearest(plan.config, plan.params, plan.machine, plan.tokens)]))
    report_time(plan)


def describe(seconds: float) -> str:
    hours = seconds / 3600
    return f"about {hours:.1f} hours" if hours >= 1 else f"about {max(1, round(60 * hours))} minutes"


def nearest(config: PretrainedConfig, params: Params, machine: Machine, tokens: int) -> list[str]:
    """The smallest change of parameters with which this machine can run them, as a line; otherwise the small recipe."""
    needed: dict[str, Any] = {}
    if machine.gpu is None:
        if params.fp16:
            needed["fp16"] = False
        if params.attn_implementation == "flash_attention_2":
            needed["attn_implementation"] = "sdpa"
    elif params.bf16:
        try:
            check_machine(params.fp16, params.bf16, params.attn_implementation)
        except StageError:
            needed |= {"bf16": False, "fp16": True}

    def fit(changes: list[dict[str, Any]]) -> bool:
        changed = params.model_copy(update={key: value for change in changes for key, value in change.items()})
        return all(n.fits for n in needs(peaks(config, changed, min(tokens, changed.max_length)), machine))

    changes = [needed]
    candidates = smaller(params)
    while not fit(changes):
        if (change := next(candidates, None)) is None:
            return ["No smaller setting of this model fits. Take the small recipe: make recipe NAME=smollm2-cpu"]
        changes = [other for other in changes if other.keys() != change.keys()] + [change]
    for change in changes[1:-1]:  # an earlier change may not be needed with the last one
        without = [other for other in changes if other is not change]
        if fit(without):
            changes = without
    said = ", ".join(f"{key}: {str(value).lower()}" for change in changes for key, value in change.items())
    return [f"The nearest change that fits: {said}"] if said else []
