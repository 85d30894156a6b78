"""Training runs whole documents without a paged cache, so through the library's own attention."""

from __future__ import annotations

from typing import Any


def use_library_attention(model: Any) -> str:
    """Let a loaded model attend by SDPA, or by the library's plain code where SDPA lacks what the model needs
    (Gemma 2's capped scores); returns which."""
    name = "sdpa" if model._supports_sdpa else "eager"
    model.set_attn_implementation(name)
    return name
