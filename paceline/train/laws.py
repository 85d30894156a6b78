"""Next-token laws of target and student: the two halves of a forward, and how far two laws are apart.

The head is run apart from the body because logits are large (49,152 numbers a position): only some positions' at a time
are in memory. Shapes: N positions, V vocabulary, D hidden size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import log_softmax

from paceline.errors import UnsupportedModelError


def divergence(
    target: torch.Tensor, student: torch.Tensor, tv_weight: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Loss, sum min(p, q) and whether the likeliest tokens agree, by position.  # [N, V], [N, V] -> [N] each"""
    log_p = log_softmax(target.float(), dim=-1)
    log_q = log_softmax(student.float(), dim=-1)
    p = log_p.exp()
    overlap = torch.minimum(p, log_q.exp()).sum(dim=-1)
    # A token that the target forbids outright (-inf) has p log p = 0.
    kl = torch.where(p > 0, p * (log_p - log_q), 0.0).sum(dim=-1)
    loss = (1.0 - tv_weight) * kl + tv_weight * (1.0 - overlap)
    return loss, overlap.detach(), target.argmax(dim=-1) == student.argmax(dim=-1)


def body(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    """Hidden states after the final norm.  # [rows, length] -> [rows, length, D]"""
    hidden: torch.Tensor = model.base_model(input_ids=tokens, use_cache=False).last_hidden_state
    return hidden


def head(model: Any, hidden: torch.Tensor) -> torch.Tensor:
    """Logits of hidden states, with what some families do to them.  # [N, D] -> [N, V]"""
    logits: torch.Tensor = model.get_output_embeddings()(hidden)
    scaling = getattr(model.config, "logits_scaling", None)  # Granite
    if scaling:
        logits = logits / scaling
    factor = getattr(model.config, "logit_scale", None)  # Cohere
    if factor:
        logits = logits * factor
    cap = getattr(model.config, "final_logit_softcapping", None)  # Gemma 2
    return torch.tanh(logits / cap) * cap if cap else logits


@torch.no_grad()
def check_head(model: Any, device: torch.device) -> None:
    """Refuse a target whose logits are not `head(body(...))`; training would learn the wrong law.

    Raises:
        UnsupportedModelError: they are not.
    """
    tokens = torch.arange(3, 11, device=device)[None]
    whole = model(input_ids=tokens, use_cache=False).logits.float()
    parts = head(model, body(model, tokens)).float()
    if not torch.allclose(whole, parts, rtol=1e-2, atol=1e-2 * float(whole.abs().max())):
        raise UnsupportedModelError(
            f"{model.config.model_type} does something to its logits that training does not know.", field="model"
        )
