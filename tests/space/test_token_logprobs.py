"""The log probabilities of tokens, and the bytes of single tokens."""

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models

from chatapp.engine.token_logprobs import TokenBytes, token_logprob


@pytest.fixture(scope="module")
def tokenizer(tiny_llama) -> Tokenizer:
    return Tokenizer.from_file(str(tiny_llama / "tokenizer.json"))


def test_the_bytes_of_tokens_are_the_bytes_of_the_text(tokenizer):
    texts = TokenBytes(tokenizer)
    for text in ("What is the capital of France?", " Größe: 日本語 🦜🏽\n\ta\x00", "<|im_end|>"):
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        assert b"".join(texts.of(token) for token in ids) == text.encode()
    assert texts.of(10**6) == b""


def test_sentencepiece_tokens_have_bytes_too():
    vocabulary = {"<unk>": 0, "\u2581Paris": 1, "<0xC3>": 2, "<0xA9>": 3}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    texts = TokenBytes(tokenizer)
    assert b"".join(texts.of(token) for token in (1, 2, 3)).decode() == " Paris\u00e9"


def test_logprobs_are_the_log_softmax_and_the_most_likely_come_first(tokenizer):
    texts = TokenBytes(tokenizer)
    logits = np.full(tokenizer.get_vocab_size(), -np.inf, dtype=np.float32)
    logits[10:14] = np.log([0.1, 0.5, 0.15, 0.25]) + 3
    found = token_logprob(logits, 10, 3, texts)
    assert found.token == texts.of(10) and found.logprob == pytest.approx(np.log(0.1), abs=1e-6)
    assert [each.token for each in found.top] == [texts.of(token) for token in (11, 13, 12)]
    assert [each.logprob for each in found.top] == pytest.approx(np.log([0.5, 0.25, 0.15]), abs=1e-6)
    assert token_logprob(logits, 5, 0, texts).logprob == -9999.0 and token_logprob(logits, 5, 0, texts).top == ()
