"""Reading params.yaml: every value is checked, and every problem is reported at once, one line each.

A stage reads its own section, `load_params(TrainParams)`, and nothing else: a type checker sees a misspelt key, and a
test compares each section with the stage's `params:` in dvc.yaml.
"""

import difflib
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from stages.common.errors import StageError
from stages.common.experiments import check_sources
from stages.common.schema import FetchModelParams, FetchParams, Params, PrepareParams, Section
from stages.common.sources import FileSource, as_list, parse_source, parse_sources

PARAMS = Path("params.yaml")
TEMPLATES = Path("stages/templates")
CHANGE_THE_BASE = ("pissa", "olora")  # starts of LoRA that take a part of the base weights into the adapter

AnySection = TypeVar("AnySection", bound=Section)


def _sources(values: dict[str, Any], key: str) -> str | None:
    try:
        parse_sources(values[key], values[f"{key}_revision"])
    except ValueError as error:
        name = f"{key}_revision" if "revision" in str(error) else key
        return f"{name}: {values[name]!r}: {error}"
    return None


def _weights(values: dict[str, Any]) -> str | None:
    weights, sources = values["dataset_weights"], len(as_list(values["dataset"]))
    if weights is not None and len(weights) != sources:
        return f"dataset_weights: {len(weights)} for {sources} data sets: give one for each, or null"
    return None


def _turns(values: dict[str, Any]) -> str | None:
    lowest, highest = values["min_turns"], values["max_turns"]
    if highest is not None and highest < lowest:
        return f"max_turns: {highest}: must be at least min_turns, {lowest}"
    return None


def _template(values: dict[str, Any]) -> str | None:
    name = values["chat_template"]
    names = [path.stem for path in sorted(TEMPLATES.glob("*.jinja"))]
    if name == "model" or name in names:
        return None
    return f"chat_template: {name!r}: {TEMPLATES}/{name}.jinja does not exist; use one of: {', '.join(names)}, model"


def _steps(values: dict[str, Any], key: str, why: str) -> str | None:
    if values["max_steps"] is not None and values[key] > values["max_steps"]:
        return f"{key}: {values[key]}: must be at most max_steps, {values['max_steps']}, or {why}"
    return None


def _length(values: dict[str, Any]) -> str | None:
    if (values["max_steps"] is None) == (values["num_train_epochs"] is None):
        return "max_steps, num_train_epochs: one of them is a number, and the other null"
    return None


def _best(values: dict[str, Any]) -> str | None:
    if values["load_best_model_at_end"] and values["save_steps"] % values["eval_steps"]:
        return (
            f"load_best_model_at_end: save_steps, {values['save_steps']}, must be a multiple of eval_steps, "
            f"{values['eval_steps']}, or the best adapter may not be saved"
        )
    return None


def _patience(values: dict[str, Any]) -> str | None:
    if values["early_stopping_patience"] is not None and not values["load_best_model_at_end"]:
        return "early_stopping_patience: needs load_best_model_at_end: true; the last adapter is not the best"
    return None


def _start(values: dict[str, Any]) -> str | None:
    if values["init_lora_weights"] in CHANGE_THE_BASE:
        return (
            f"init_lora_weights: {values['init_lora_weights']!r}: takes a part of the base weights into the adapter, "
            "which fits neither 4 bits nor a merge into the base as it was fetched; use true, gaussian or orthogonal"
        )
    return None


def _merge_base(values: dict[str, Any]) -> str | None:
    if values["merge_base"] == "dequantized" and not values["load_in_4bit"]:
        return "merge_base: 'dequantized': needs load_in_4bit: true; use original"
    return None


def _rounding(values: dict[str, Any]) -> str | None:
    if values["export_method"] == "gptq" and values["export_precision"] != "int4":
        return f"export_method: 'gptq': needs export_precision: int4; for {values['export_precision']} use rtn"
    if values["export_method"] != "gptq" and values["export_bits"] is not None:
        return f"export_bits: {values['export_bits']}: needs export_method: gptq; null leaves it to export_int8_layers"
    return None


def _precision(values: dict[str, Any]) -> str | None:
    return "fp16, bf16: both true: set one of them to false" if values["fp16"] and values["bf16"] else None


def _distinct(values: dict[str, Any], key: str) -> str | None:
    if len(set(values[key])) < len(values[key]):
        return f"{key}: {values[key]!r}: names something twice; it must have each once"
    return None


# The rules over several keys, or over what a key names: the keys, and a function that says how `values` break it.
Rule = tuple[tuple[str, ...], Callable[[dict[str, Any]], str | None]]
RULES: list[Rule] = [
    (("base_model", "base_model_revision"), lambda values: _sources(values, "base_model")),
    (("dataset", "dataset_revision"), lambda values: _sources(values, "dataset")),
    (("dataset", "dataset_weights"), _weights),
    (("fp16", "bf16"), _precision),
    (("min_turns", "max_turns"), _turns),
    (("chat_template",), _template),
    (("max_steps", "num_train_epochs"), _length),
    (("load_best_model_at_end", "save_steps", "eval_steps"), _best),
    (("early_stopping_patience", "load_best_model_at_end"), _patience),
    (("init_lora_weights",), _start),
    (("logging_steps", "max_steps"), lambda values: _steps(values, "logging_steps", "the loss curve would be empty")),
    (("save_steps", "max_steps"), lambda values: _steps(values, "save_steps", "nothing would be saved")),
    (("merge_base", "load_in_4bit"), _merge_base),
    (("target_modules",), lambda values: _distinct(values, "target_modules")),
    (("gguf_types",), lambda values: _distinct(values, "gguf_types")),
    (("languages",), lambda values: _distinct(values, "languages")),
    (("tree_states",), lambda values: _distinct(values, "tree_states")),
    (("sample_prompts",), lambda values: _distinct(values, "sample_prompts")),
    (("export_method", "export_precision", "export_bits"), _rounding),
    (("export_int8_layers",), lambda values: _distinct(values, "export_int8_layers")),
]


def contradictions(values: dict[str, Any]) -> list[str]:
    """One line for each rule that `values` break. A rule whose keys are not all there is left out."""
    broken = (rule(values) for keys, rule in RULES if all(key in values for key in keys))
    return [line for line in broken if line]


def read_values(path: Path) -> dict[str, Any]:
    """The keys and values of a YAML file, unchecked. Raises StageError when there is no such mapping."""
    text = ""
    try:
        text = path.read_text(encoding="utf-8")
        # YAML 1.2, as DVC writes it: 1e-05 is a number there and a string to YAML 1.1 readers.
        content = YAML(typ="safe").load(text)
    except FileNotFoundError:
        raise StageError(f"{path} is missing. `make recipe NAME=smollm2-cpu` writes it.") from None
    except (YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        if mark and text.splitlines()[mark.line : mark.line + 1] and text.splitlines()[mark.line][:1].isspace():
            problem = "it is indented; each key, and each - of a list, stands at the beginning of its line"
        raise StageError(
            f"{path}{where} is not valid YAML: {problem}. Fix it; recipes/ holds complete files."
        ) from None
    if not isinstance(content, dict):
        raise StageError(f"{path} must hold `key: value` lines; recipes/ holds complete files.")
    return content


def read_params(path: Path = PARAMS) -> Params:
    """Read and check a parameter file. Raises StageError that lists every problem, one line each."""
    content = read_values(path)
    problems: list[str] = []
    failed: set[Any] = set()
    try:
        params = Params.model_validate(content)
    except ValidationError as error:
        problems = _explain(error.errors())
        failed = {problem["loc"][0] for problem in error.errors()}
    problems += [f"{key}: is missing; {_remedy(key)}" for key in Params.model_fields if key not in content]
    problems += contradictions({key: value for key, value in content.items() if key not in failed})
    if problems:
        raise StageError(f"{path}: " + "\n       ".join(problems))
    return params


def _remedy(key: str) -> str:
    """How to get a key that params.yaml lacks."""
    if Params.model_fields[key].is_required():
        return "copy its line from recipes/smollm2-cpu.yaml"
    return "`make docs` adds it with its default"


def _explain(errors: list[Any]) -> list[str]:
    """One line for each wrong value: its key, the value and what is allowed (each form of it that was tried)."""
    lines: dict[tuple[str, str], list[str]] = {}
    for error in errors:
        name, *inside = error["loc"]
        key = ".".join([str(name), *(str(part) for part in inside if isinstance(part, int))])
        value = f" {error['input']!r}:"
        match error["type"]:
            case "missing":  # reported with those that have a default
                continue
            case "extra_forbidden":
                near = difflib.get_close_matches(str(name), Params.model_fields, n=1)
                meant = f"did you mean {near[0]}?" if near else "docs/parameters.md lists all"
                value, allowed = "", f"is not a parameter; {meant}"
            case "string_pattern_mismatch":
                allowed = f"must match {error['ctx']['pattern']}"
            case _:
                allowed = error["msg"].replace("Input should be", "must be").replace("List should", "must")
        lines.setdefault((key, value), []).append(allowed)
    return [f"{key}:{value} {' or '.join(dict.fromkeys(allowed))}" for (key, value), allowed in lines.items()]


def section_of(values: dict[str, Any], section: type[AnySection]) -> AnySection:
    """The keys of `section` among `values`, checked. Raises pydantic's ValidationError."""
    return section.model_validate({key: values[key] for key in section.model_fields if key in values})


def local_paths(params: Params, section: type[Section] = Params) -> list[Path]:
    """The relative paths of data sets and base model that are local files or folders, as far as the stage with this
    section depends on them."""
    sources = []
    if section is not FetchModelParams:
        sources += parse_sources(params.dataset, params.dataset_revision)
    if section not in (FetchParams, PrepareParams):
        sources.append(parse_source(params.base_model, params.base_model_revision))
    return [s.path for s in sources if isinstance(s, FileSource) and not s.path.is_absolute()]


def load_params(section: type[AnySection]) -> AnySection:
    """A stage's parameters from params.yaml, after a check of the complete file: a wrong value of a later stage also
    stops the first stage that runs, and so does a local source that an experiment's own folder lacks."""
    params = read_params()
    check_sources(local_paths(params, section))
    return section_of(params.model_dump(), section)
