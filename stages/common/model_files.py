"""What a model's folder holds: configuration, tokenizer and weights, read and checked. No weight is loaded."""

import copy
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.pytorch_utils import Conv1D  # GPT-2's linear layer, its weight transposed

from stages.common.artifacts import read_json
from stages.common.errors import StageError, first_line


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer in a folder. Raises StageError when there is none that can be read."""
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises bare Exceptions
        raise StageError(
            f"{folder} holds no tokenizer that can be read ({first_line(error)}). "
            "Delete it and run `dvc repro`, or choose another base_model."
        ) from error


def load_config(folder: Path) -> PretrainedConfig:
    """The configuration of the text model in a folder. Raises StageError when there is none of a known type."""
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # a configuration's own checks raise any type
        raise StageError(
            f"{folder} holds no model of a known type ({first_line(error)}). "
            "Choose a base_model that transformers knows: code of a model's repository is never run."
        ) from error
    return config.get_text_config()


def empty_model(
    config: PretrainedConfig, layers: int | None = None, attn_implementation: str = "sdpa"
) -> PreTrainedModel:
    """The model that a configuration describes, in float32 but without memory for its weights (meta device).

    `layers` gives it another number of layers. Raises StageError when it is no causal language model.
    """
    config = copy.deepcopy(config)
    if layers is not None:
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[:layers]
        config.num_hidden_layers = layers
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(
                config, dtype=torch.float32, attn_implementation=attn_implementation
            )
    except ValueError as error:
        raise StageError(
            f"base_model: no causal language model that is known ({first_line(error)}). "
            "Choose a base_model that transformers loads as one."
        ) from None


def check_weights(folder: Path) -> None:
    """Raise StageError unless all safetensors files in `folder`, and all that an index names, are complete and fit.

    Reads only the files' headers. Names and shapes of the weights must be those of the configuration.
    """
    files = set(folder.glob("*.safetensors"))
    for index in folder.glob("*.safetensors.index.json"):
        files |= {folder / str(name) for name in read_json(index, ["weight_map"])["weight_map"].values()}
    shapes = {name: list(weight.shape) for name, weight in empty_model(load_config(folder)).state_dict().items()}
    for file in sorted(files):
        try:
            with safe_open(file, "pt") as weights:
                for name in weights.keys():
                    found = weights.get_slice(name).get_shape()
                    if found != shapes.get(name, found):
                        raise StageError(
                            f"{file}: {name} is of shape {found}, by config.json {shapes[name]}: they belong to two "
                            "models. Put files of one model there."
                        )
        except FileNotFoundError:
            raise StageError(f"{file} is missing, though the model's index names it. Put all shards there.") from None
        except (SafetensorError, OSError) as error:
            raise StageError(f"{file} is damaged ({first_line(error)}). Put a complete file there.") from error


def linear_layers(model: PreTrainedModel) -> dict[str, torch.nn.Module]:
    """A model's linear layers but the output layer, by name: what a 4-bit load quantises and LoRA can adapt."""
    output = model.get_output_embeddings()
    return {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear | Conv1D) and m is not output}


def check_targets(config: PretrainedConfig, target_modules: list[str]) -> None:
    """Raise StageError, naming what would fit, when the model has no linear layer of such a name.

    Looks at the configuration only; no weights are loaded.
    """
    names = list(dict.fromkeys(name.rpartition(".")[2] for name in linear_layers(empty_model(config))))
    if wrong := [target for target in target_modules if target not in names]:
        raise StageError(f"target_modules: the base model has no {', '.join(wrong)}. Choose from {', '.join(names)}.")
