"""The log probability of each token of an answer, and of the most likely tokens in its place."""

import math
import re
from dataclasses import dataclass

import numpy as np
from tokenizers import Tokenizer

MIN_LOGPROB = -9999.0  # OpenAI's value for a token that is practically impossible; JSON has no infinity
BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")  # of SentencePiece's byte fallback
SPACE = "\u2581"  # SentencePiece writes it for a space


@dataclass(frozen=True)
class TokenLogprob:
    """A token's bytes, which may be a part of a character, and its natural log probability.

    The probability is the model's own, before penalties, temperature, top-k and top-p.
    """

    token: bytes
    logprob: float
    top: tuple["TokenLogprob", ...] = ()  # the most likely tokens in its place, most likely first


class TokenBytes:
    """The bytes of single tokens."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._added = tokenizer.get_added_tokens_decoder()
        decoder = tokenizer.decoder
        self._byte_of = byte_alphabet() if decoder and b"ByteLevel" in decoder.__getstate__() else None

    def of(self, token: int) -> bytes:
        if token in self._added:
            return self._added[token].content.encode()
        text = self._tokenizer.id_to_token(token) or ""  # a row of the output layer without a token has no text
        if self._byte_of is not None and all(character in self._byte_of for character in text):
            return bytes(self._byte_of[character] for character in text)
        if match := BYTE_TOKEN.fullmatch(text):
            return bytes([int(match[1], 16)])
        return text.replace(SPACE, " ").encode()


def byte_alphabet() -> dict[str, int]:
    """The byte of each character in a byte-level vocabulary: GPT-2's `bytes_to_unicode`, the other way round."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {chr(byte): byte for byte in shown} | {chr(256 + i): byte for i, byte in enumerate(hidden)}


def token_logprob(logits: np.ndarray, token: int, top: int, texts: TokenBytes) -> TokenLogprob:
    """The log probability of `token`, and of the `top` most likely tokens. `logits` has shape (vocabulary,)."""
    wide = logits.astype(np.float64)
    wide -= wide.max()
    logprobs = wide - math.log(np.exp(wide).sum())

    def of(index: int) -> TokenLogprob:
        return TokenLogprob(texts.of(index), max(MIN_LOGPROB, float(logprobs[index])))

    best = np.argpartition(logprobs, -top)[-top:] if 0 < top < len(logprobs) else np.arange(min(top, len(logprobs)))
    most_likely = best[np.lexsort((best, -logprobs[best]))]
    said = of(token)
    return TokenLogprob(said.token, said.logprob, tuple(of(int(index)) for index in most_likely))
