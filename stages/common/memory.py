"""How much memory a model needs, from its configuration alone: nothing is loaded, downloaded or allocated.

Weights are counted on PyTorch's meta device; `commands/trace.py` adds what a training step holds beyond them. All sizes
are bytes.
"""

from dataclasses import dataclass

from peft import LoraConfig, get_peft_model
from transformers import PretrainedConfig

from stages.common.errors import StageError
from stages.common.model_files import empty_model, linear_layers

GIB = 1024**3

# Measured on a CPU with `python -m bench.plan` and `python -m bench.phi2_full_size`; see docs/measurements.md.
# Python with torch, transformers, trl and datasets, before any weight is loaded.
LIBRARIES = int(0.85 * GIB)
# Bytes that the allocator holds for each byte of tensors at the peak of a step.
FRAGMENTATION = 1.45
# What the builder holds for each byte of the model in float32: its copies, and the mapped weight files.
EXPORTING = 1.9
# A CUDA context and its libraries on the card (an assumption: no GPU figure here is measured).
CUDA_CONTEXT = int(0.6 * GIB)


@dataclass(frozen=True)
class Shape:
    """The numbers of weights of a causal language model, and of a LoRA adapter for it."""

    parameters: int
    quantised: int  # those that a 4-bit load quantises: all linear layers but the output layer
    largest_linear: int
    adapter: int

    @property
    def unquantised(self) -> int:
        return self.parameters - self.quantised


GGUF_BYTES = {"F16": 2.0, "Q8_0": 34 / 32, "Q5_1": 24 / 32, "Q5_0": 22 / 32, "Q4_1": 20 / 32, "Q4_0": 18 / 32}


def dtype_bytes(name: str) -> int:
    """Bytes a weight of a number format, by its PyTorch name."""
    return {"float32": 4, "bfloat16": 2, "float16": 2}[name]


def shape_of(config: PretrainedConfig, lora: LoraConfig | None = None) -> Shape:
    """Count a model's weights, tied ones once, and those that PEFT would add to it for this adapter."""
    model = empty_model(config)
    linear = {name: module.get_parameter("weight") for name, module in linear_layers(model).items()}
    parameters = sum(p.numel() for p in model.parameters())
    adapter = 0
    if lora is not None:
        adapted = get_peft_model(model, lora, low_cpu_mem_usage=True)
        adapter = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    return Shape(
        parameters=parameters,
        quantised=sum(weight.numel() for weight in linear.values()),
        largest_linear=max((weight.numel() for weight in linear.values()), default=0),
        adapter=adapter,
    )


def quantised_bytes(weights: int, double_quant: bool) -> int:
    """4-bit weights with a float32 scale for 64 of them; with double quantisation an 8-bit scale, and a float32 for 256
    of those (Dettmers et al., QLoRA, 2023, section 3)."""
    scales = weights / 64 * (1 + 4 / 256) if double_quant else weights / 64 * 4
    return round(weights / 2 + scales)


def check_room(what: str, needed: int, there: int, where: str, remedy: str) -> None:
    """Raise StageError when `what` needs more bytes than there are; `remedy` says what to do then."""
    if needed > there:
        raise StageError(f"{what} {needed / GIB:.1f} GiB, and {where} has {there / GIB:.1f} GiB. {remedy}")


def weight_bytes(shape: Shape, dtype: str, load_in_4bit: bool, double_quant: bool) -> int:
    """What a loaded model's weights hold, in `dtype`, on a CPU or a GPU.

    With 4-bit weights, prepare_model_for_kbit_training converts all others to float32.
    """
    if load_in_4bit:
        return shape.unquantised * 4 + quantised_bytes(shape.quantised, double_quant)
    return shape.parameters * dtype_bytes(dtype)


def load_peak(shape: Shape, dtype: str, file_dtype: str | None, load_in_4bit: bool, double_quant: bool) -> int:
    """Resident peak of loading on a CPU: the libraries, the mapped weight files and the weights made from them.

    The system can drop mapped pages. Without `file_dtype` they are not counted: the result is then a lower bound.
    Files that have the format `dtype` already are used as they are mapped.
    """
    mapped = shape.parameters * dtype_bytes(file_dtype) if file_dtype and (load_in_4bit or file_dtype != dtype) else 0
    if load_in_4bit:
        quantising = 2 * shape.largest_linear * dtype_bytes(dtype)  # the layer, converted, and its parts
        weights = shape.unquantised * dtype_bytes(dtype) + quantised_bytes(shape.quantised, double_quant)
        return LIBRARIES + mapped + weights + quantising
    return LIBRARIES + mapped + shape.parameters * dtype_bytes(dtype)


def adapter_bytes(shape: Shape, optim: str) -> int:
    """LoRA weights and gradients in float32, and the optimiser's state for them."""
    state = {"sgd": 0, "adafactor": 1, "paged_adamw_8bit": 2, "adamw_bnb_8bit": 2}.get(optim, 8)
    return shape.adapter * (4 + 4 + state)


def merge_bytes(shape: Shape, merge_base: str, double_quant: bool) -> int:
    """What merging holds: the model in float32 with its adapter, and beside it the 4-bit one if that is merged into."""
    merged = weight_bytes(shape, "float32", False, False) + shape.adapter * 4
    return merged + (weight_bytes(shape, "float32", True, double_quant) if merge_base == "dequantized" else 0)
