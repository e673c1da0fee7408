"""Loading models and tokenizers the same way in every stage, on a GPU or a CPU."""

import copy
import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.common.artifacts import read_json
from stages.common.errors import StageError, first_line, is_disk_full

if TYPE_CHECKING:
    import torch
    from transformers import BitsAndBytesConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


def quantization_config(quant_type: str, double_quant: bool, compute_dtype: "torch.dtype") -> "BitsAndBytesConfig":
    """The 4-bit configuration of QLoRA (https://arxiv.org/abs/2305.14314)."""
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quant_type,
        bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_compute_dtype=compute_dtype,
    )


def load_model(
    folder: Path,
    dtype: "torch.dtype",
    *,
    quantization: "BitsAndBytesConfig | None" = None,
    attn_implementation: str = "sdpa",
    use_gpu: bool = True,
) -> "PreTrainedModel":
    """A causal language model from a folder of safetensors, on the GPU if there is one and `use_gpu`.

    `dtype` is that of the weights that are not quantised. Raises StageError when the folder is no such model.
    """
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    check_weights(folder)
    try:
        with _pages_given_back():
            model, loaded = AutoModelForCausalLM.from_pretrained(
                folder,
                output_loading_info=True,
                dtype=dtype,
                quantization_config=quantization,
                attn_implementation=attn_implementation,
                device_map={"": 0} if use_gpu and torch.cuda.is_available() else None,
                use_safetensors=True,
                trust_remote_code=False,
                local_files_only=True,
            )
    except (OSError, ValueError, RuntimeError, ImportError, SafetensorError) as error:
        if is_disk_full(error):
            raise
        raise StageError(
            f"{folder} cannot be loaded as a causal language model ({first_line(error)}). "
            "Delete it and run `dvc repro`, or choose another base_model."
        ) from error
    if missing := sorted(loaded["missing_keys"]):  # transformers would go on with random numbers in their place
        raise StageError(
            f"{folder}: {len(missing)} weights are missing, the first {missing[0]}. Delete it and run `dvc repro`."
        )
    for module in model.modules():
        # On a CPU with AVX-512 BF16, bitsandbytes would repack the weights at the first evaluation, for good, into a
        # form without autograd: the training after it would silently lose its gradients.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


@contextmanager
def _pages_given_back() -> Iterator[None]:
    """Let glibc map large blocks one by one meanwhile: freed, they are the system's again at once.

    It would else keep those of converting and quantising weights, 3 to 4 GiB for phi-2. See mallopt(3).
    """
    trim_threshold, mmap_threshold = -1, -3  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
    try:
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(mmap_threshold, 1 << 20)
    except (OSError, AttributeError):  # another C library
        yield
        return
    try:
        yield
    finally:
        libc.mallopt(mmap_threshold, 32 << 20)  # where glibc's own, growing thresholds end
        libc.mallopt(trim_threshold, 64 << 20)
        libc.malloc_trim(0)


def load_tokenizer(folder: Path) -> "PreTrainedTokenizerBase":
    """The tokenizer in a folder. Raises StageError when there is none that can be read."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises bare Exceptions
        raise StageError(
            f"{folder} holds no tokenizer that can be read ({first_line(error)}). "
            "Delete it and run `dvc repro`, or choose another base_model."
        ) from error


def load_config(folder: Path) -> "PretrainedConfig":
    """The configuration of the text model in a folder. Raises StageError when there is none of a known type."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # a configuration's own checks raise what they like
        raise StageError(
            f"{folder} holds no model of a known type ({first_line(error)}). "
            "Choose a base_model that transformers knows: code of a model's repository is never run."
        ) from error
    return config.get_text_config()


def empty_model(
    config: "PretrainedConfig", layers: int | None = None, attn_implementation: str = "sdpa"
) -> "PreTrainedModel":
    """The model that a configuration describes, in float32 but without memory for its weights (meta device).

    `layers` gives it another number of layers. Raises StageError when it is no causal language model.
    """
    import torch
    from transformers import AutoModelForCausalLM

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
        raise StageError(f"base_model: no causal language model that is known ({first_line(error)}).") from None


def check_weights(folder: Path) -> None:
    """Raise StageError unless all safetensors files in `folder`, and all that an index names, are whole and fit.

    Reads the files' headers only: names and shapes of the weights, which must be those of the configuration.
    """
    from safetensors import SafetensorError, safe_open

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
                            f"{file}: {name} is of shape {found}, by config.json {shapes[name]}: they are of two "
                            "models. Put files of one model there."
                        )
        except FileNotFoundError:
            raise StageError(f"{file} is missing, though the model's index names it. Put all shards there.") from None
        except (SafetensorError, OSError) as error:
            raise StageError(f"{file} is damaged ({first_line(error)}). Put a whole one there.") from error


def linear_layers(model: "PreTrainedModel") -> dict[str, "torch.nn.Module"]:
    """A model's linear layers but the output layer, by name: what a 4-bit load quantises and LoRA can adapt."""
    import torch
    from transformers.pytorch_utils import Conv1D  # GPT-2's linear layer, its weight transposed

    output = model.get_output_embeddings()
    return {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear | Conv1D) and m is not output}


def check_targets(config: "PretrainedConfig", target_modules: list[str]) -> None:
    """Raise StageError, naming what would fit, when the model has no linear layer of such a name.

    Looks at the configuration only; no weights are loaded.
    """
    names = list(dict.fromkeys(name.rpartition(".")[2] for name in linear_layers(empty_model(config))))
    if wrong := [target for target in target_modules if target not in names]:
        raise StageError(f"target_modules: the base model has no {', '.join(wrong)}. Choose from {', '.join(names)}.")


def torch_dtype(name: str) -> "torch.dtype":
    """`float32`, `bfloat16` or `float16` as torch's type."""
    import torch

    dtype: Any = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype
