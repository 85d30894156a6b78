"""What an engine refuses before it takes a request in."""

from __future__ import annotations

from collections.abc import Sequence

from paceline.engine.request import Request
from paceline.errors import PromptTooLongError, RequestError


def check_request(request: Request, longest: int, vocab_size: int, drafter_names: Sequence[str]) -> None:
    """Refuse what cannot run.

    Args:
        request: not taken in yet.
        longest: tokens of prompt and output that there is room for.
        vocab_size: tokens the target can emit.
        drafter_names: that a request may ask for.

    Raises:
        PromptTooLongError: no room for a single new token.
        RequestError: a token outside the vocabulary, an empty prompt, a salt that is no text, an unknown drafter, or a
            structured output without its constraint.
    """
    _check_salt(request.salt)
    if not request.token_ids:
        raise RequestError("is empty.", field="prompt", fix="Give at least one token.")
    if request.prompt_len >= longest:
        raise PromptTooLongError(
            f"has {request.prompt_len} tokens, and prompt and output together may have {longest}.",
            field="prompt",
            fix="Shorten the prompt; max_model_len and kv_cache_memory set the limit, up to the model's own.",
        )
    mentioned = {
        "prompt": request.token_ids,
        "logit_bias": request.params.logit_bias,
        "stop_token_ids": request.params.stop_token_ids,
        "visible_tokens": request.params.visible_tokens,
        "prediction": request.prediction_ids,
    }
    for field, tokens in mentioned.items():
        if any(not 0 <= t < vocab_size for t in tokens):
            raise RequestError(f"holds a token id outside 0..{vocab_size - 1}.", field=field)
    if request.params.structured is not None and request.constraint is None:
        raise RequestError("comes without its constraint.", field="structured_outputs")
    wish = request.params.speculation
    unknown = set(wish.drafters or ()) - set(drafter_names) if wish else set()
    if unknown:
        raise RequestError(
            f"this engine has no drafter {min(unknown)!r}.",
            field="speculation.drafters",
            fix=f"It has: {', '.join(drafter_names) or 'none'}.",
        )


def _check_salt(salt: object) -> None:
    valid = isinstance(salt, str)
    if isinstance(salt, str):
        try:
            salt.encode()
        except UnicodeEncodeError:
            valid = False
    if not valid:
        raise RequestError("must be valid Unicode text.", field="cache_salt")
