"""LoRA adapters: their configuration, a new one for training, and a trained one on its base."""

from pathlib import Path
from typing import Any

from peft import (
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    prepare_model_for_kbit_training,
)
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel, set_seed

from stages.common.errors import StageError, first_line
from stages.common.schema import TrainParams


def lora_config(params: TrainParams) -> LoraConfig:
    return LoraConfig(
        r=params.lora_r,
        lora_alpha=params.lora_alpha,
        lora_dropout=params.lora_dropout,
        target_modules=params.target_modules,
        use_rslora=params.use_rslora,
        use_dora=params.use_dora,
        init_lora_weights=params.init_lora_weights,
        bias="none",
        task_type="CAUSAL_LM",
    )


def add_adapter(model: PreTrainedModel, params: TrainParams) -> PeftModel:
    """Freeze `model` and put new LoRA matrices, in float32, on its target modules."""
    if params.load_in_4bit:
        # Norms and output layer in float32 under 16-bit training. The trainer turns on checkpointing itself.
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    set_seed(params.seed)
    return get_peft_model(model, lora_config(params))


def attach(model: PreTrainedModel, adapter: Path, base: Path) -> Any:
    """`model`, loaded from the folder `base`, with a trained adapter on it, not merged.

    Raises StageError when the adapter belongs to another model.
    """
    remedy = f"Delete {adapter} and run `dvc repro train`."
    weights = adapter / "adapter_model.safetensors"
    if not weights.is_file():
        raise StageError(f"{weights} is missing; pickled weights (.bin) are never loaded. {remedy}")
    try:
        with safe_open(weights, "pt") as file:
            saved = set(file.keys())
        attached = PeftModel.from_pretrained(model, adapter, local_files_only=True).eval()
    except (RuntimeError, ValueError, TypeError, KeyError, OSError, SafetensorError) as error:
        raise StageError(f"{adapter} does not fit {base} ({first_line(error)}). {remedy}") from error
    if lacking := sorted(set(get_peft_model_state_dict(attached)) ^ saved):  # PEFT would ignore the difference
        raise StageError(f"{adapter} does not fit {base} (only one of them has {lacking[0]}). {remedy}")
    return attached
