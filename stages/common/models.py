"""Loading models the same way in every stage, on a GPU or a CPU, in 4 bits or not."""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel
from transformers.utils import logging

from stages.common.errors import StageError, first_line, is_disk_full
from stages.common.model_files import check_weights
from stages.common.schema import QuantizationParams


def quantization_config(params: QuantizationParams, compute_dtype: torch.dtype) -> BitsAndBytesConfig | None:
    """The 4-bit configuration of QLoRA (https://arxiv.org/abs/2305.14314); None where the parameters ask for none."""
    if not params.load_in_4bit:
        return None
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=params.bnb_4bit_quant_type,
        bnb_4bit_use_double_quant=params.bnb_4bit_use_double_quant,
        bnb_4bit_compute_dtype=compute_dtype,
    )


def load_model(
    folder: Path,
    dtype: torch.dtype,
    *,
    quantization: BitsAndBytesConfig | None = None,
    attn_implementation: str = "sdpa",
    use_gpu: bool = True,
) -> PreTrainedModel:
    """A causal language model from a folder of safetensors, on the GPU if there is one and `use_gpu`.

    `dtype` is that of the weights that are not quantised. Raises StageError when the folder is no such model.
    """
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
    if missing := sorted(loaded["missing_keys"]):  # transformers would put random numbers in their place
        raise StageError(
            f"{folder}: {len(missing)} weights are missing, the first {missing[0]}. Delete it and run `dvc repro`."
        )
    for module in model.modules():
        # On a CPU with AVX-512 BF16, bitsandbytes would repack the weights at the first evaluation into a form without
        # autograd, and keep them so. The training after it would silently lose its gradients.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


@contextmanager
def _pages_given_back() -> Iterator[None]:
    """Let glibc map each large block by itself during the block, so that freed memory returns to the system.

    Otherwise glibc would keep the memory of converting and quantising weights, 3 to 4 GiB for phi-2. See mallopt(3).
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
        libc.mallopt(mmap_threshold, 32 << 20)  # the maxima of glibc's own, growing thresholds
        libc.mallopt(trim_threshold, 64 << 20)
        libc.malloc_trim(0)


def torch_dtype(name: str) -> torch.dtype:
    """`float32`, `bfloat16` or `float16` as torch's type."""
    dtype: Any = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype


def training_dtype(fp16: bool, bf16: bool) -> str:
    """The number format of training's matrix products: float16, bfloat16, or float32 when neither is asked for."""
    return "float16" if fp16 else "bfloat16" if bf16 else "float32"
