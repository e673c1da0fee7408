"""The schema of params.yaml: every hyperparameter of every stage, its type, its bounds and what it means.

Only the schema lives here. Stages read their values with `load_params(stage)`, which checks the whole file and then
shows the stage just the keys that its entry in dvc.yaml declares, so that DVC's idea of what a stage depends on is
always true.
"""

from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from stages.common.errors import StageError
from stages.common.sources import as_list, parse_sources

PARAMS = Path("params.yaml")
DVC_YAML = Path("dvc.yaml")

Positive = Annotated[int, Field(gt=0)]
Dtype = Literal["float32", "bfloat16", "float16"]


class Params(BaseModel):
    """All of params.yaml. The order is the order of the stages; each description is the setting's documentation."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    # fetch
    base_model: str = Field(description="base model: `owner/name` of the hub, `pypi:…` or `file:…`")
    base_model_revision: str | None = Field(description="its exact version: commit hash, or `sha256:…`")
    dataset: str | Annotated[list[str], Field(min_length=1)] = Field(
        description="conversations: `owner/name` of the hub (or a file of it), `pypi:…` or `file:…`; or a list of such"
    )
    dataset_revision: str | list[str | None] | None = Field(
        description="its exact version (a list for a list); null for a file in `data/local/`, which DVC watches"
    )

    # prepare
    dataset_weights: Annotated[list[Annotated[float, Field(gt=0, le=100)]], Field(min_length=1)] | None = Field(
        description="how often each data set's training conversations are used: 1 once, 0.5 half of them, 2 all twice; "
        "null uses all once"
    )
    max_bad_rows: float = Field(
        ge=0, le=1, description="share of rows that may be no messages; they are skipped and counted, more stop prepare"
    )
    threads: Literal["best", "all"] = Field(description="`best`: the best-ranked path of each tree; `all`: every path")
    tree_states: list[str] = Field(description="states of trees to keep; an empty list keeps all")
    languages: list[str] = Field(description="languages to keep, as the data names them; an empty list keeps all")
    min_quality: Annotated[float, Field(ge=0, le=1)] | None = Field(
        description="drop answers whose quality label is lower"
    )
    max_toxicity: Annotated[float, Field(ge=0, le=1)] | None = Field(
        description="drop messages whose toxicity is higher"
    )
    allow_synthetic: bool = Field(description="keep messages that a model or an author made up")
    require_review: bool = Field(description="drop messages that reviewers rejected")
    min_turns: Positive = Field(description="drop conversations with fewer question-answer turns")
    max_turns: Positive | None = Field(description="cut conversations after so many turns; null keeps all")
    max_similarity: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        description="drop conversations that share more of their word triples with one before; null drops none"
    )
    validation_fraction: float = Field(
        gt=0, le=0.5, description="share of trees held out, if the data has no such split"
    )
    split_seed: int = Field(ge=0, description="seed of that split")
    system_prompt: str = Field(description="system message put before every conversation; empty for none")

    # tokenize
    chat_template: str = Field(
        pattern=r"^[\w-]+$",
        description="a file of `stages/templates/` (`chatml`, `phi2`), or `model` for the base model's own",
    )
    max_length: int = Field(
        ge=16, description="tokens a conversation may have; longer ones lose whole turns from the end"
    )

    # train
    load_in_4bit: bool = Field(description="quantise the frozen base model to 4 bits (QLoRA)")
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = Field(description="4-bit number format")
    bnb_4bit_use_double_quant: bool = Field(description="quantise the quantisation constants too")
    attn_implementation: Literal["sdpa", "eager", "flash_attention_2"] = Field(description="attention kernel")
    lora_r: Positive = Field(description="rank of the LoRA matrices")
    lora_alpha: Positive = Field(description="LoRA scale; updates are multiplied by lora_alpha / lora_r")
    lora_dropout: float = Field(ge=0, lt=1, description="dropout on the input of the LoRA matrices")
    target_modules: list[str] = Field(min_length=1, description="projection layers that get LoRA matrices")
    per_device_train_batch_size: Positive = Field(description="conversations in a forward pass")
    gradient_accumulation_steps: Positive = Field(description="forward passes in an optimiser step")
    max_steps: Positive = Field(description="optimiser steps")
    optim: Literal[
        "paged_adamw_32bit",
        "paged_adamw_8bit",
        "adamw_torch",
        "adamw_torch_fused",
        "adamw_bnb_8bit",
        "adafactor",
        "sgd",
    ] = Field(description="optimiser")
    learning_rate: float = Field(gt=0, le=1, description="peak learning rate")
    lr_scheduler_type: Literal["cosine", "linear", "constant", "constant_with_warmup", "polynomial", "inverse_sqrt"] = (
        Field(description="learning rate after the warm-up")
    )
    warmup_ratio: float = Field(ge=0, lt=1, description="share of max_steps over which the learning rate rises")
    weight_decay: float = Field(ge=0, le=1, description="decoupled weight decay")
    max_grad_norm: float = Field(gt=0, description="gradients are clipped to this norm")
    fp16: bool = Field(description="train in float16 mixed precision (GPU only)")
    bf16: bool = Field(description="train in bfloat16 mixed precision; neither: float32")
    gradient_checkpointing: bool = Field(
        description="recompute activations in the backward pass: less memory, more time"
    )
    train_sampling_strategy: Literal["random", "sequential", "group_by_length"] = Field(
        description="order of conversations; `group_by_length` pads least"
    )
    logging_steps: Positive = Field(description="steps between two points of the loss curve")
    save_steps: Positive = Field(description="steps between two checkpoints, from which a killed run goes on")
    save_total_limit: Positive = Field(description="checkpoints kept while training")
    eval_steps: Positive = Field(description="steps between two measurements of the held-out loss")
    per_device_eval_batch_size: Positive = Field(description="conversations in a forward pass of an evaluation")
    seed: int = Field(ge=0, description="seed of the LoRA matrices, the data order, the dropout and the bootstrap")

    # merge
    merge_base: Literal["dequantized", "original"] = Field(
        description="merge into the base as training saw it (`dequantized`) or as it was fetched (`original`)"
    )
    merge_dtype: Dtype = Field(description="number format of the merged model's weights")
    merge_max_logit_diff: float = Field(
        gt=0, description="mean absolute difference of logits to the unmerged model above which merge fails"
    )

    # evaluate
    eval_dtype: Dtype = Field(description="number format in which base and tuned model are compared")
    bootstrap_samples: int = Field(ge=100, description="resamples behind the 95 % interval")
    sample_prompts: list[str] = Field(min_length=1, description="prompts of the sample answers, base beside tuned")
    stop_prompts: int = Field(
        ge=0, description="held-out prompts added to them to measure how often answers end by themselves"
    )
    max_new_tokens: Positive = Field(description="tokens after which an answer is cut")

    # export
    export_precision: Literal["int4", "int8", "fp16", "fp32"] = Field(
        description="number format of the exported weights"
    )
    export_method: Literal["default", "rtn", "k_quant"] = Field(
        description="how int4 and int8 weights are rounded (onnxruntime's names)"
    )
    export_block_size: Literal[16, 32, 64, 128] = Field(description="weights that share a scale in int4 and int8")
    export_symmetric: bool = Field(description="quantise around zero; if not, each block has a zero point of its own")
    export_accuracy_level: Literal[1, 4] = Field(
        description="activations of int4 and int8 layers: 1 keeps float32, 4 rounds them to int8, which is faster"
    )
    export_int8_layers: list[
        Literal["qkv_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "fc1", "fc2", "lm_head"]
    ] = Field(description="layers that have 8 bits where export_precision is int4")
    export_max_perplexity_increase: float = Field(
        gt=0, description="share by which perplexity may rise against the merged model before export fails"
    )
    export_base: bool = Field(description="export the base model, too, to show it beside the tuned one")


def contradictions(values: dict[str, Any]) -> list[str]:
    """The rules over several keys that `values` breaks, one line each; a rule needs all of its keys to be there."""
    problems = []

    def have(*keys: str) -> bool:
        return all(key in values for key in keys)

    for key in ("base_model", "dataset"):
        if have(key, f"{key}_revision"):
            try:
                parse_sources(values[key], values[f"{key}_revision"])
            except ValueError as error:
                name = f"{key}_revision" if "revision" in str(error) else key
                problems.append(f"{name}: {values[name]!r}: {error}")
    if have("dataset", "dataset_weights") and values["dataset_weights"] is not None:
        weights, sources = len(values["dataset_weights"]), len(as_list(values["dataset"]))
        if weights != sources:
            problems.append(f"dataset_weights: {weights} for {sources} data sets: give one for each, or null")
    if have("fp16", "bf16") and values["fp16"] and values["bf16"]:
        problems.append("fp16, bf16: both true: set one of them to false")
    if have("min_turns", "max_turns") and values["max_turns"] is not None and values["max_turns"] < values["min_turns"]:
        problems.append(f"max_turns: {values['max_turns']}: must be at least min_turns, {values['min_turns']}")
    for key, why in (("logging_steps", "the loss curve would be empty"), ("save_steps", "nothing would be saved")):
        if have(key, "max_steps") and values[key] > values["max_steps"]:
            problems.append(f"{key}: {values[key]}: must be at most max_steps, {values['max_steps']}, or {why}")
    if have("merge_base", "load_in_4bit") and values["merge_base"] == "dequantized" and not values["load_in_4bit"]:
        problems.append("merge_base: 'dequantized': needs load_in_4bit: true; use original")
    for key in ("target_modules", "languages", "tree_states", "sample_prompts", "export_int8_layers"):
        if have(key) and len(set(values[key])) < len(values[key]):
            problems.append(f"{key}: {values[key]!r}: names something twice; it must have each once")
    return problems


def read_params(path: Path = PARAMS) -> Params:
    """Read and check a parameter file. Raises StageError that lists every problem, one line each."""
    try:
        # YAML 1.2, as DVC writes it: 1e-05 is a number there and a string to YAML 1.1 readers.
        content = YAML(typ="safe").load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise StageError(f"{path} is missing. `make recipe NAME=smollm2-cpu` puts a recipe there.") from None
    except (YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise StageError(
            f"{path}{where} is not valid YAML: {problem}. Mend it; see recipes/ for whole files."
        ) from None
    if not isinstance(content, dict):
        raise StageError(f"{path} must hold `key: value` lines; see recipes/ for whole files.")
    problems, failed = [], set()
    try:
        params = Params.model_validate(content)
    except ValidationError as error:
        problems = _explain(error.errors())
        failed = {problem["loc"][0] for problem in error.errors()}
    problems += contradictions({key: value for key, value in content.items() if key not in failed})
    if problems:
        raise StageError(f"{path}: " + "\n       ".join(problems))
    return params


def _explain(errors: list[Any]) -> list[str]:
    """One line for each wrong value: its key, the value and what is allowed (each form of it that was tried)."""
    lines: dict[tuple[str, str], list[str]] = {}
    for error in errors:
        name, *inside = error["loc"]
        key = ".".join([name, *(str(part) for part in inside if isinstance(part, int))])
        value = f" {error['input']!r}:"
        match error["type"]:
            case "missing":
                value, allowed = "", "is missing; every key must be there"
            case "extra_forbidden":
                value, allowed = "", "is not a parameter; see the table of parameters in README.md"
            case "string_pattern_mismatch":
                allowed = f"must match {error['ctx']['pattern']}"
            case _:
                allowed = error["msg"].replace("Input should be", "must be").replace("List should", "must")
        lines.setdefault((key, value), []).append(allowed)
    return [f"{key}:{value} {' or '.join(dict.fromkeys(allowed))}" for (key, value), allowed in lines.items()]


def declared_keys(stage: str) -> list[str]:
    """The keys under `params:` of a stage in dvc.yaml."""
    return list(YAML(typ="safe").load(DVC_YAML.read_text(encoding="utf-8"))["stages"][stage]["params"])


def load_params(stage: str) -> SimpleNamespace:
    """The checked values of the keys that `stage` declares in dvc.yaml, as attributes; no others."""
    params = read_params()
    return SimpleNamespace(**{key: getattr(params, key) for key in declared_keys(stage)})
