"""What a training step or an evaluation holds in memory beyond weights: traced, and timed on one real batch.

The trace runs on fake tensors, operation by operation, with two and four layers, and is extended to the model's own
number: all layers have the same shape. Nothing is loaded for it. All sizes are bytes.
"""

import time
import weakref
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from peft import get_peft_model
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PretrainedConfig, PreTrainedModel
from trl.trainer.utils import add_fused_lm_head

from stages.common.adapters import add_adapter, lora_config
from stages.common.errors import StageError, first_line
from stages.common.memory import dtype_bytes
from stages.common.model_files import empty_model, linear_layers
from stages.common.models import load_model, quantization_config, torch_dtype, training_dtype
from stages.common.schema import TrainParams


class LiveBytes:
    """Counts the bytes of the storages that operations make, while they live; `peak` is the largest count."""

    def __init__(self) -> None:
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


def _extended(config: PretrainedConfig, peak: Callable[[int], int]) -> int:
    """`peak(layers)` at the model's own number of layers, from two and four."""
    try:
        two, four = peak(2), peak(4)
    except Exception as error:  # a model's own code, on tensors without content
        raise StageError(
            f"base_model: the memory of this model's training cannot be planned ({first_line(error)}). "
            "Its stages can run: run `make all`, and watch the memory."
        ) from error
    return round(two + (four - two) / 2 * (config.num_hidden_layers - 2))


def use_training_head(model: PreTrainedModel) -> None:
    """Give a model the output layer with which SFTTrainer trains it: it never holds all logits."""
    add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))


def training_loss(model: Any, ids: Any) -> Any:
    """The loss of a batch (conversations, tokens), all supervised, as SFTTrainer computes it.

    `model` has the training head, with or without an adapter over it.
    """
    return model(input_ids=ids, attention_mask=ids.new_ones(ids.shape), labels=ids, fused_lm_head=True).loss


def checkpoint_activations(model: Any) -> None:
    """Recompute activations in the backward pass, as the trainer does for `gradient_checkpointing`."""
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()


def step_bytes(config: PretrainedConfig, params: TrainParams, tokens: int, on_gpu: bool = False) -> int:
    """Peak memory of a forward and a backward pass of SFTTrainer beyond weights: activations and gradients.

    The batch is padded to `tokens`. `on_gpu`: with the output layer's fused kernels, which work in place.
    """
    mixed_precision = training_dtype(params.fp16, params.bf16) != "float32"
    # FlashAttention needs the memory of sdpa's fused kernels, and runs only on a GPU.
    attention = "eager" if params.attn_implementation == "eager" else "sdpa"

    def peak(layers: int) -> int:
        model = empty_model(config, layers, attention)
        if mixed_precision:  # as 4-bit weights are dequantised; otherwise the trace would see autocast copy them
            for module in linear_layers(model).values():
                module.to(torch.bfloat16)
        use_training_head(model)
        model = get_peft_model(model, lora_config(params), low_cpu_mem_usage=True)
        with FakeTensorMode(allow_non_fake_inputs=True):
            model.to_empty(device="cpu")
            model.train()
            if params.gradient_checkpointing:
                checkpoint_activations(model)
            ids = torch.zeros(params.per_device_train_batch_size, tokens, dtype=torch.long)
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


def _forward_bytes(
    config: PretrainedConfig, batch_size: int, tokens: int, forward: Callable[[PreTrainedModel, torch.Tensor], None]
) -> int:
    """Peak memory of `forward` without gradients beyond weights; it gets the model and ids of (batch_size, tokens)."""

    def peak(layers: int) -> int:
        model = empty_model(config, layers)
        with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
            model.to_empty(device="cpu")
            ids = torch.zeros(batch_size, tokens, dtype=torch.long)
            live = LiveBytes()
            live.ignore([*model.parameters(), *model.buffers()])
            with live.mode:
                forward(model, ids)
        return live.peak

    return _extended(config, peak)


def scoring_bytes(config: PretrainedConfig, batch_size: int, tokens: int) -> int:
    """Peak memory of `scoring.score` beyond weights, for a batch padded to `tokens`, all of them supervised."""

    def forward(model: PreTrainedModel, ids: torch.Tensor) -> None:
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits.float()
        torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids, reduction="none").double()
        logits.argmax(dim=-1)

    return _forward_bytes(config, batch_size, tokens, forward)


def answering_bytes(config: PretrainedConfig, batch_size: int, tokens: int, dtype: str) -> int:
    """Peak memory of `generation.greedy_answers` beyond weights: prompts and answers of `tokens` together.

    Keys and values of all tokens are held, and those of one layer twice, while a step adds to them.
    """

    def forward(model: PreTrainedModel, ids: torch.Tensor) -> None:
        model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False, logits_to_keep=1)

    heads = config.num_key_value_heads or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    layer = 2 * batch_size * tokens * heads * size * dtype_bytes(dtype)
    return _forward_bytes(config, batch_size, tokens, forward) + (config.num_hidden_layers + 1) * layer


def seconds_of_a_batch(base: Path, params: TrainParams, tokens: int) -> float:
    """Seconds of a forward and backward pass here, over a training batch padded to `tokens`; the second one counts."""
    dtype = torch_dtype(training_dtype(params.fp16, params.bf16))
    quantization = quantization_config(params, dtype)
    model = load_model(base, dtype, quantization=quantization, attn_implementation=params.attn_implementation)
    use_training_head(model)
    model = add_adapter(model, params).train()
    if params.gradient_checkpointing:
        checkpoint_activations(model)
    ids = torch.zeros(params.per_device_train_batch_size, tokens, dtype=torch.long, device=model.device)
    seconds = 0.0
    for _ in range(2):
        started = time.perf_counter()
        with torch.autocast(model.device.type, dtype, enabled=dtype != torch.float32):
            loss = training_loss(model, ids)
        loss.backward()
        if model.device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - started
    return seconds
