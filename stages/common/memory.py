"""How much memory a model needs, from its configuration alone: nothing is loaded, downloaded or allocated.

Weights are counted on PyTorch's meta device. What a training step or an evaluation holds beyond them is traced on fake
tensors, operation by operation, with two and four layers, and extended to the model's own number: its layers are
alike. All sizes are bytes.
"""

import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from stages.common.errors import StageError, first_line
from stages.common.models import empty_model, linear_layers

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

GIB = 1024**3

# Measured on a CPU with `python -m bench.plan` and `python -m bench.phi2_full_size`; see README.md.
# Python with torch, transformers, trl and datasets, before any weight is loaded.
LIBRARIES = int(0.85 * GIB)
# Pages that the allocator holds for each byte of tensors that live at the peak of a step.
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


def dtype_bytes(name: str) -> int:
    """Bytes a weight of a number format, by its PyTorch name."""
    return {"float32": 4, "bfloat16": 2, "float16": 2}[name]


def shape_of(config: "PretrainedConfig", target_modules: list[str], lora_r: int) -> Shape:
    """Count a model's weights, tied ones once, and those of LoRA matrices of rank `lora_r` on its target modules."""
    model = empty_model(config)
    linear = {name: module.get_parameter("weight") for name, module in linear_layers(model).items()}
    adapted = [weight for name, weight in linear.items() if name.rpartition(".")[2] in target_modules]
    return Shape(
        parameters=sum(p.numel() for p in model.parameters()),
        quantised=sum(weight.numel() for weight in linear.values()),
        largest_linear=max((weight.numel() for weight in linear.values()), default=0),
        adapter=lora_r * sum(sum(weight.shape) for weight in adapted),  # two matrices of rank `lora_r` each
    )


def quantised_bytes(weights: int, double_quant: bool) -> int:
    """4-bit weights with a float32 scale for 64 of them; with double quantisation an 8-bit scale, and a float32 for 256
    of those (Dettmers et al., QLoRA, 2023, section 3)."""
    scales = weights / 64 * (1 + 4 / 256) if double_quant else weights / 64 * 4
    return round(weights / 2 + scales)


class LiveBytes:
    """A context in which the storages that operations make are counted while they live; `peak` is the most at once."""

    def __init__(self) -> None:
        from torch.utils._python_dispatch import TorchDispatchMode

        self.now = self.peak = 0
        self.known: set[int] = set()
        outer = self

        class Mode(TorchDispatchMode):
            def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                result = function(*args, **(kwargs or {}))
                outer.see(result)
                return result

        self.mode = Mode()

    def see(self, result: Any) -> None:
        import torch
        from torch.utils._pytree import tree_leaves

        for leaf in tree_leaves(result):
            if not isinstance(leaf, torch.Tensor):
                continue
            storage = leaf.untyped_storage()
            key = storage._cdata
            if key not in self.known:
                self.known.add(key)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self.forget, key, storage.nbytes())

    def ignore(self, tensors: Any) -> None:
        """Do not count these tensors' storages: weights, which are counted elsewhere."""
        self.known |= {tensor.untyped_storage()._cdata for tensor in tensors}

    def forget(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size


def _extended(config: "PretrainedConfig", peak: Any) -> int:
    """`peak(layers)` at the model's own number of layers, from two and four."""
    try:
        two, four = peak(2), peak(4)
    except Exception as error:  # a model's own code, on tensors without content
        raise StageError(
            f"base_model: what a step of this model holds cannot be planned ({first_line(error)}). Its stages can run."
        ) from error
    return round(two + (four - two) / 2 * (config.num_hidden_layers - 2))


def use_training_head(model: "PreTrainedModel") -> None:
    """Give a model the output layer with which SFTTrainer trains it: it never holds all logits at once."""
    from trl.trainer.utils import add_fused_lm_head

    add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))


def training_loss(model: Any, ids: Any) -> Any:
    """The loss of a batch (conversations, tokens), all supervised, as SFTTrainer computes it.

    `model` has the training head, with or without an adapter over it.
    """
    return model(input_ids=ids, attention_mask=ids.new_ones(ids.shape), labels=ids, fused_lm_head=True).loss


def step_bytes(
    config: "PretrainedConfig",
    *,
    target_modules: list[str],
    lora_r: int,
    lora_dropout: float,
    batch_size: int,
    tokens: int,
    gradient_checkpointing: bool,
    mixed_precision: bool,
    attn_implementation: str = "sdpa",
    on_gpu: bool = False,
) -> int:
    """What a forward and a backward pass of SFTTrainer hold at most beyond weights: activations and gradients.

    Of `batch_size` conversations padded to `tokens`; `mixed_precision` computes in a 16-bit format. `on_gpu`: with the
    output layer's fused kernels, which work in place.
    """
    from contextlib import ExitStack
    from unittest.mock import patch

    import torch
    from peft import LoraConfig, get_peft_model
    from torch._subclasses.fake_tensor import FakeTensorMode

    # FlashAttention holds what sdpa's fused kernels hold, and runs nowhere but on a GPU.
    attention = "eager" if attn_implementation == "eager" else "sdpa"

    def peak(layers: int) -> int:
        model = empty_model(config, layers, attention)
        if mixed_precision:  # as 4-bit weights are dequantised; else autocast would be seen to copy them
            for module in linear_layers(model).values():
                module.to(torch.bfloat16)
        use_training_head(model)
        lora = LoraConfig(r=lora_r, lora_dropout=lora_dropout, target_modules=target_modules, task_type="CAUSAL_LM")
        model = get_peft_model(model, lora, low_cpu_mem_usage=True)
        with FakeTensorMode(allow_non_fake_inputs=True):
            model.to_empty(device="cpu")
            model.train()
            if gradient_checkpointing:
                model.gradient_checkpointing_enable()
                model.enable_input_require_grads()
            ids = torch.zeros(batch_size, tokens, dtype=torch.long)
            live = LiveBytes()
            live.ignore([*model.parameters(), *model.buffers()])
            with live.mode, ExitStack() as kernels:
                if on_gpu:
                    for name in ("_forward_tile", "_backward_tile"):
                        kernels.enter_context(patch(f"trl.kernels.chunked_logprob.{name}", lambda *_, **__: None))
                with torch.autocast("cpu", torch.bfloat16, enabled=mixed_precision):
                    loss = training_loss(model, ids)
                loss.backward()
        return live.peak

    return _extended(config, peak)


def scoring_bytes(config: "PretrainedConfig", batch_size: int, tokens: int) -> int:
    """What `scoring.score` holds at most beyond weights for a batch padded to `tokens`, all of them supervised."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    def peak(layers: int) -> int:
        model = empty_model(config, layers)
        with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
            model.to_empty(device="cpu")
            ids = torch.zeros(batch_size, tokens, dtype=torch.long)
            live = LiveBytes()
            live.ignore([*model.parameters(), *model.buffers()])
            with live.mode:
                logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits.float()
                torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids, reduction="none").double()
                logits.argmax(dim=-1)
        return live.peak

    return _extended(config, peak)


def check_room(what: str, needed: int, there: int, where: str, mend: str) -> None:
    """Raise StageError when `what` needs more bytes than there are; `mend` says what to do then."""
    if needed > there:
        raise StageError(f"{what} {needed / GIB:.1f} GiB, and {where} has {there / GIB:.1f} GiB. {mend}")


def weight_bytes(shape: Shape, dtype: str, load_in_4bit: bool, double_quant: bool) -> int:
    """What a loaded model's weights hold, in `dtype`, on a CPU or a GPU.

    Beside 4-bit weights the others are float32: prepare_model_for_kbit_training makes them so.
    """
    if load_in_4bit:
        return shape.unquantised * 4 + quantised_bytes(shape.quantised, double_quant)
    return shape.parameters * dtype_bytes(dtype)


def load_peak(shape: Shape, dtype: str, file_dtype: str | None, load_in_4bit: bool, double_quant: bool) -> int:
    """Resident peak of loading on a CPU: the libraries, the mapped weight files and the weights made from them.

    The system can take mapped pages away: without `file_dtype` they are left out, which gives the least that is needed.
    Files in the very format that is asked for are used as they are mapped.
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
