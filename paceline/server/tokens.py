"""Single tokens as text and bytes, for log-probabilities and /tokenize."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

from paceline.engine.types import TokenLogprobs
from paceline.server.protocol.chat import ContentLogprob, TokenLogprob

_LOWEST = -9999.0
"""Stands for minus infinity, which JSON cannot carry."""


class TokenTexts:
    """What each token stands for.

    Args:
        tokenizer: a `transformers` tokenizer.
        vocab_size: tokens the model can emit; those beyond the tokenizer's stand for nothing.
    """

    def __init__(self, tokenizer: Any, vocab_size: int) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._lock = threading.Lock()
        self._bytes: list[bytes] | None = None

    def load(self) -> list[bytes]:
        """Read the whole vocabulary once (a second or so); later calls return at once."""
        with self._lock:
            if self._bytes is None:
                from xgrammar import TokenizerInfo

                info = TokenizerInfo.from_huggingface(self._tokenizer, vocab_size=self._vocab_size)
                self._bytes = list(info.decoded_vocab)
            return self._bytes

    def bytes_of(self, token: int) -> bytes:
        """The token's bytes."""
        known = self.load()
        return known[token] if token < len(known) else b""

    def text_of(self, token: int) -> str:
        """The token's text; a part of a character is spelled out, so that different tokens have different texts."""
        raw = self.bytes_of(token)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)

    def content(self, logprobs: Sequence[TokenLogprobs]) -> list[ContentLogprob]:
        """Chat completions' form."""
        return [
            ContentLogprob(
                **self._one(item.token_id, item.logprob).model_dump(),
                top_logprobs=[self._one(token, value) for token, value in item.top],
            )
            for item in logprobs
        ]

    def _one(self, token: int, logprob: float) -> TokenLogprob:
        return TokenLogprob(
            token=self.text_of(token), logprob=finite(logprob), bytes=list(self.bytes_of(token)) or None
        )

    def top(self, item: TokenLogprobs) -> dict[str, float]:
        """Text completions' form of the alternatives: the likeliest tokens and the chosen one. Of tokens with the same
        text the likeliest counts."""
        found: dict[str, float] = {}
        for token, value in (*item.top, (item.token_id, item.logprob)):
            found.setdefault(self.text_of(token), finite(value))
        return found


def finite(logprob: float) -> float:
    """A number that JSON can carry."""
    return max(logprob, _LOWEST)
