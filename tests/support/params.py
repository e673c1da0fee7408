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

# Another valid value of each key, by the stages that a change of it must rerun first, written again by hand.
OTHER_VALUES: dict[str, dict[str, Any]] = {
    "fetch": {
        "dataset": "file:data/local/other.jsonl",
        "dataset_revision": "sha256:" + "0" * 64,
    },
    "fetch_model": {
        "base_model": "file:models/local/other",
        "base_model_revision": "sha256:" + "0" * 64,
    },
    "prepare": {
        "dataset_weights": [0.5],
        "max_bad_rows": 0.5,
        "unsupported_rows": "skip",
        "threads": "all",
        "tree_states": [],
        "languages": ["de"],
        "detect_languages": True,
        "min_quality": 0.5,
        "max_toxicity": 0.5,
        "allow_synthetic": False,
        "require_review": False,
        "min_turns": 2,
        "max_turns": 3,
        "max_similarity": 0.8,
        "validation_fraction": 0.3,
        "split_seed": 7,
    },
    "prepare evaluate": {"system_prompt": "Be brief."},
    "tokenize": {"chat_template": "model", "max_length": 64, "truncation_side": "left"},
    "train": {
        "load_in_4bit": False,
        "bnb_4bit_quant_type": "fp4",
        "bnb_4bit_use_double_quant": False,
        "attn_implementation": "eager",
        "lora_r": 4,
        "lora_alpha": 8,
        "lora_dropout": 0.2,
        "target_modules": ["q_proj"],
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 3,
        "max_steps": 5,
        "optim": "adamw_torch",
        "learning_rate": 1e-4,
        "lr_scheduler_type": "linear",
        "warmup_ratio": 0.5,
        "weight_decay": 0.1,
        "max_grad_norm": 1.0,
        "fp16": True,
        "bf16": True,
        "gradient_checkpointing": True,
        "train_sampling_strategy": "random",
        "logging_steps": 2,
        "save_steps": 1,
        "save_total_limit": 1,
        "eval_steps": 1,
        "dequantize_once": False,
        "use_rslora": True,
        "use_dora": True,
        "init_lora_weights": "gaussian",
        "neftune_noise_alpha": 5.0,
        "num_train_epochs": 2.0,
        "load_best_model_at_end": True,
        "early_stopping_patience": 2,
        "report_to": "tensorboard",
        "padding_free": True,
    },
    "train evaluate": {"per_device_eval_batch_size": 2, "seed": 7},
    "merge": {"merge_base": "dequantized", "merge_dtype": "bfloat16", "merge_max_logit_diff": 1.0},
    "evaluate": {
        "eval_dtype": "float16",
        "bootstrap_samples": 300,
        "answer_batch_size": 2,
        "sample_prompts": ["Hello?"],
    },
    "evaluate export": {"stop_prompts": 1, "max_new_tokens": 4, "repetition_penalty": 1.3},
    "export": {
        "export_precision": "fp32",
        "export_method": "k_quant",
        "export_block_size": 64,
        "export_symmetric": True,
        "export_accuracy_level": 1,
        "export_int8_layers": [],
        "export_bits": 5.5,
        "export_calibration_tokens": 100,
        "export_base": False,
    },
    "export gguf": {"export_max_perplexity_increase": 0.5},
    "gguf": {"gguf_types": ["F16"]},
}


def section(kind: type[AnySection], recipe: str = "smollm2-cpu", **changes: Any) -> AnySection:
    """The values of a recipe that belong to one stage, some of them changed, checked as the stage would."""
    values = read_values(ROOT / f"recipes/{recipe}.yaml") | changes
    return kind.model_validate({key: values[key] for key in kind.model_fields} | changes)


def train_params(recipe: str = "smollm2-cpu", **changes: Any) -> TrainParams:
    return section(TrainParams, recipe, **changes)


def export_params(recipe: str = "smollm2-cpu", **changes: Any) -> ExportParams:
    return section(ExportParams, recipe, **changes)
