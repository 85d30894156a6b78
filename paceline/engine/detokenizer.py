"""Tokens to text, one token at a time, with stop strings.

Text is released only when it can no longer become part of a stop string or of an unfinished character, so what was
streamed is never taken back.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tokenizers.decoders import DecodeStream

_PRIMING = 6
"""Prompt tokens that prime the decoder: enough for a character of several byte tokens."""


class Detokenizer:
    """The text of one request.

    Args:
        tokenizer: a `transformers` tokenizer with a fast backend.
        stop: strings that end the text.
        prompt_ids: the prompt. Its end primes the decoder, since some tokenizers drop a space at the very start.
        visible: special tokens whose text is kept.
    """

    def __init__(
        self,
        tokenizer: Any,
        stop: Sequence[str] = (),
        prompt_ids: Sequence[int] = (),
        visible: Sequence[int] = (),
    ) -> None:
        self._tokenizer = tokenizer
        self._backend = tokenizer.backend_tokenizer
        self._visible = {token: str(tokenizer.convert_ids_to_tokens(token)) for token in visible}
        self._stream = DecodeStream(skip_special_tokens=True)
        self._prompt_end = list(prompt_ids[-_PRIMING:])
        for token in self._prompt_end:
            self._stream.step(self._backend, token)
        self._stop = tuple(stop)
        self._longest = max((len(s) for s in stop), default=0)
        self._text = ""
        self._released = 0

    @property
    def released(self) -> str:
        """Everything released so far."""
        return self._text[: self._released]

    def push(self, token: int, *, check_stop: bool = True) -> tuple[str, bool]:
        """Add a token.

        Returns:
            The text it releases, and whether a stop string is complete (the text then ends before it).
        """
        before = len(self._text)
        said = self._stream.step(self._backend, token) or ""
        if self._visible:
            said = self._visible.get(token, said)
        self._text += said
        if not self._stop:
            self._released = len(self._text)
            return said, False
        if check_stop:
            # Only what this token completes: an earlier end (before `min_tokens`) was passed and stays passed.
            hits = [at for s in self._stop if (at := self._text.find(s, max(0, before - len(s) + 1))) >= 0]
            if hits:
                self._text = self._text[: max(min(hits), self._released)]
                return self._release(len(self._text)), True
        return self._release(len(self._text) - self._held()), False

    def flush(self, output_ids: Sequence[int]) -> str:
        """Release what was held back, at the end of a request that no stop string ended."""
        before = self._tokenizer.decode(self._prompt_end, skip_special_tokens=True)
        both = self._tokenizer.decode([*self._prompt_end, *output_ids], skip_special_tokens=True)
        full = both.removeprefix(before)
        if both.startswith(before) and full.startswith(self.released):
            self._text = full
        return self._release(len(self._text))

    def _release(self, end: int) -> str:
        piece = self._text[self._released : end]
        self._released = max(self._released, end)
        return piece

    def _held(self) -> int:
        """Length of the longest end of the text that begins a stop string."""
        for length in range(min(self._longest - 1, len(self._text)), 0, -1):
            tail = self._text[-length:]
            if any(s.startswith(tail) for s in self._stop):
                return length
        return 0
