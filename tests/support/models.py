"""Tiny models and tokenizers, made on the spot: no test needs a network or a downloaded model."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    PreTrainedTokenizerFast,
)

CORPUS = [
    "What is the capital of France? Paris is the capital of France.",
    "Instruct: Output: system user assistant You are a helpful assistant.",
    "How do I boil an egg so that the yolk stays soft? Six minutes in boiling water.",
    "0 1 2 3 4 5 6 7 8 9 10 17 23 + - * / = ? ! . , ; : ' \" ( ) [ ] { }",
]


def byte_level_bpe(special: list[str], vocab_size: int = 600):
    """A GPT-2-style byte-level BPE tokenizer trained on a few sentences, with these special tokens first."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def save_llama(folder: Path) -> Path:
    """A tiny Llama with ChatML's special tokens, as SmolLM2 has them (its padding token is its end token)."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=byte_level_bpe(["<|endoftext|>", "<|im_start|>", "<|im_end|>"]),
        unk_token="<|endoftext|>",
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
    )
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_phi(folder: Path) -> Path:
    """A tiny Phi whose tokenizer, as phi-2's, has one special token (also its end) and no padding token."""
    end = "<|endoftext|>"
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=byte_level_bpe([end]), unk_token=end, bos_token=end, eos_token=end
    )
    config = PhiConfig(
        vocab_size=len(tokenizer) + 8,  # phi-2's embedding has spare rows, too
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,  # half of a head's 32 numbers are rotated: no fewer would do for the exported model
        max_position_embeddings=512,
        bos_token_id=0,
        eos_token_id=0,
    )
    torch.manual_seed(0)
    PhiForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_gpt2(folder: Path, phi: Path) -> Path:
    """A GPT-2, whose linear layers keep their weights transposed (Conv1D), with the tokenizer of `phi`."""
    tokenizer = AutoTokenizer.from_pretrained(phi)
    torch.manual_seed(0)
    GPT2LMHeadModel(
        GPT2Config(
            vocab_size=len(tokenizer) + 8,
            n_embd=64,
            n_layer=2,
            n_head=2,
            n_positions=512,
            bos_token_id=0,
            eos_token_id=0,
        )
    ).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
