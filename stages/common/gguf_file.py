"""GGUF, the file format of llama.cpp and Ollama: a Llama or Phi model with its tokenizer and chat template, and back.

Written with the `gguf` package (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md). Reading back gives the
weights as llama.cpp sees them, and the tokenizer that its metadata describes.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGUFReader, GGUFWriter
from gguf.constants import GGMLQuantizationType, LlamaFileType, TokenType
from gguf.quants import dequantize, quantize
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from stages.common.chat import Chat, end_ids, plain_template
from stages.common.errors import StageError

# How llama.cpp splits text before the merges (its name of the tokenizer), and the same in `tokenizers`.
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
SPLITS: dict[str, dict[str, Any]] = {
    "gpt-2": BYTES,
    "smollm": {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, BYTES]},
}
ARCHITECTURES = {"llama": gguf.MODEL_ARCH.LLAMA, "phi": gguf.MODEL_ARCH.PHI2}
SUFFIXES = (".weight", ".bias")
TIED = "lm_head.weight"  # llama.cpp takes the embeddings where the file has no output layer


def check_architecture(config: PretrainedConfig, where: Path) -> None:
    """Raise StageError when a model of this configuration cannot be written."""
    known = ", ".join(ARCHITECTURES)
    if config.model_type not in ARCHITECTURES:
        raise StageError(
            f"{where} is of the type {config.model_type}; GGUF files are made of {known}. Set gguf_types: []"
        )
    if config.rope_parameters.get("rope_type", "default") != "default":
        raise StageError(
            f"{where} scales rotary positions ({config.rope_parameters['rope_type']}), which the GGUF files made here "
            "cannot say. Set gguf_types: []"
        )


def split_of(tokenizer: PreTrainedTokenizerBase) -> str:
    """llama.cpp's name of how the tokenizer splits text. Raises StageError when it has none that is known."""
    description = json.loads(tokenizer.backend_tokenizer.to_str())
    plain = description["model"]["type"] == "BPE" and description["normalizer"] is None
    for name, split in SPLITS.items():
        if plain and _same(description["pre_tokenizer"], split):
            return name
    raise StageError(
        "the base model's tokenizer splits text in a way that has no name in GGUF files here. Set gguf_types: []"
    )


def _same(found: Any, expected: dict[str, Any]) -> bool:
    """Whether a pre-tokenizer does what `expected` says; trim_offsets changes no token."""
    if found is None or found["type"] != expected["type"]:
        return False
    if expected["type"] == "Sequence":
        parts = zip(found["pretokenizers"], expected["pretokenizers"], strict=False)
        return len(found["pretokenizers"]) == len(expected["pretokenizers"]) and all(_same(a, b) for a, b in parts)
    return all(found.get(key) == value for key, value in expected.items() if key != "trim_offsets")


def write_gguf(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, path: Path, kind: str) -> None:
    """Write a model and its tokenizer into one file: matrices in the format `kind` (F16, Q8_0, …), others float32."""
    config = model.config
    writer = GGUFWriter(path, gguf.MODEL_ARCH_NAMES[ARCHITECTURES[config.model_type]])
    _write_shape(writer, config)
    writer.add_file_type(LlamaFileType[f"MOSTLY_{kind}"])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    _write_tokenizer(writer, tokenizer, config.vocab_size)
    for name, values in _tensors(model):
        stored = GGMLQuantizationType.F32 if values.ndim == 1 else GGMLQuantizationType[kind]
        writer.add_tensor(name, quantize(values, stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _write_shape(writer: GGUFWriter, config: PretrainedConfig) -> None:
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.num_key_value_heads or heads)
    writer.add_vocab_size(config.vocab_size)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(int(size * config.rope_parameters.get("partial_rotary_factor", 1.0)))
    if config.model_type == "llama":
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    else:
        writer.add_layer_norm_eps(config.layer_norm_eps)


def _write_tokenizer(writer: GGUFWriter, tokenizer: PreTrainedTokenizerBase, size: int) -> None:
    """The tokens in the order of their ids; ids of the model that the tokenizer lacks are unused tokens."""
    description = json.loads(tokenizer.backend_tokenizer.to_str())
    tokens = [f"[PAD{i}]" for i in range(size)]
    types = [TokenType.UNUSED] * size
    for token, i in description["model"]["vocab"].items():
        tokens[i], types[i] = token, TokenType.NORMAL
    for added in description["added_tokens"]:
        tokens[added["id"]] = added["content"]
        types[added["id"]] = TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(split_of(tokenizer))
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    merges = description["model"]["merges"]
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    end, *_ = end_ids(tokenizer)
    writer.add_eos_token_id(end)
    writer.add_eot_token_id(end)
    for name in ("bos", "pad", "unk"):
        if (number := getattr(tokenizer, f"{name}_token_id")) is not None:
            getattr(writer, f"add_{name}_token_id")(number)
    writer.add_add_bos_token(False)  # the chat template writes it where the model wants one
    writer.add_chat_template(plain_template(str(tokenizer.chat_template)))


def _tensors(model: PreTrainedModel) -> Iterator[tuple[str, np.ndarray]]:
    """The weights in float32, by their names in GGUF."""
    config = model.config
    names = gguf.get_tensor_name_map(ARCHITECTURES[config.model_type], config.num_hidden_layers)
    for name, weight in model.state_dict().items():
        if name == TIED and config.tie_word_embeddings:
            continue
        renamed = names.get_name(name, try_suffixes=SUFFIXES)
        if renamed is None:
            raise StageError(f"GGUF has no place for the model's {name}. Set gguf_types: []")
        values = weight.detach().float().cpu().numpy()
        yield renamed, _interleave(values, name, config)


def _interleave(values: np.ndarray, name: str, config: PretrainedConfig, back: bool = False) -> np.ndarray:
    """Llama's q_proj and k_proj as GGUF has them: the two halves of each rotary pair side by side. `back`: undo it."""
    counts = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    part = name.split(".")[-2] if "." in name else ""
    if config.model_type != "llama" or part not in counts:
        return values
    pair = (counts[part], -1, 2) if back else (counts[part], 2, -1)
    return values.reshape(*pair, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)


def load_weights(model: PreTrainedModel, path: Path) -> None:
    """Give `model`, of the file's shape, the weights of a GGUF file, dequantised."""
    names = gguf.get_tensor_name_map(ARCHITECTURES[model.config.model_type], model.config.num_hidden_layers)
    tensors = {tensor.name: tensor for tensor in GGUFReader(path).tensors}
    for name, parameter in model.state_dict().items():
        if name == TIED and model.config.tie_word_embeddings:
            continue
        tensor = tensors[str(names.get_name(name, try_suffixes=SUFFIXES))]
        values = dequantize(tensor.data, tensor.tensor_type).reshape(parameter.shape)
        with torch.no_grad():
            parameter.copy_(torch.from_numpy(np.array(_interleave(values, name, model.config, back=True))))


def read_chat(path: Path) -> Chat:
    """The tokenizer and chat template of a GGUF file, as its metadata describes them."""
    fields = GGUFReader(path).fields

    def value(name: str) -> Any:
        return fields[f"tokenizer.{name}"].contents()

    tokens, types = value("ggml.tokens"), value("ggml.token_type")
    vocabulary = {token: i for i, token in enumerate(tokens) if types[i] != TokenType.UNUSED}
    merges = [tuple(merge.split(" ")) for merge in value("ggml.merges")]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False)
    digits = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), plain])
    tokenizer.pre_tokenizer = {"gpt-2": plain, "smollm": digits}[value("ggml.pre")]
    tokenizer.decoder = decoders.ByteLevel()
    for kind, add in (
        (TokenType.CONTROL, tokenizer.add_special_tokens),
        (TokenType.USER_DEFINED, tokenizer.add_tokens),
    ):
        add([AddedToken(tokens[i], normalized=False) for i, found in enumerate(types) if found == kind])
    special = {
        f"{name}_token": tokens[value(f"ggml.{name}_token_id")]
        for name in ("bos", "eos", "pad")
        if f"tokenizer.ggml.{name}_token_id" in fields
    }
    return Chat(tokenizer, value("chat_template"), special, f"the chat template of {path.name}")
