"""RAPID's knowledge transfer (2502.20330): a declared target transform, which is then sampled exactly.

With z the target's logits, p = softmax(z), and q the softmax of the draft model's logits, both at temperature 1 and
before any sampling option, the declared target is softmax(z') with

    z' = z - strength * m * (p - q),   m = 1 where q >= 0.1 max q, else 0,

a gradient step of KL(q || p) towards the draft model, over the tokens it finds likely. Sampling options apply to z' as
they would to z; at temperature 0 the text is the argmax of z'. Log-probabilities of the output are those of z'; those
of the prompt stay the model's own. What the draft model reads is part of the definition, and depends on the prompt: a
prompt that holds the beginning of an answer declares another law than the answer's own continuation.

(The paper's release moves the law at drafted positions only, and recovers and goes on from others, so that its output
follows none of them. Here the law is z' at every position, with draft nodes or without.) So q is needed after the root
and after every verified node, whoever drafted it: one forward of the draft model a step, in which the row after the
draft's last token is new and the others are made again.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from paceline.draft.draft_model import DraftModel
from paceline.draft.retrieved import RetrievedText
from paceline.draft.tree_rows import read_ahead, tree_rows
from paceline.engine.draft_tree import DraftTree
from paceline.engine.request import Request
from paceline.engine.types import DraftBatch, ScheduledBatch, TargetScores
from paceline.errors import PacelineError, PromptTooLongError

_LIKELY = 0.1
"""Share of the draft's largest probability from which a token's logit is moved."""


def transferred(target: torch.Tensor, draft: torch.Tensor, strength: float) -> torch.Tensor:
    """The declared target's logits.

    Args:
        target: the target's own.  # [n, vocab]
        draft: the draft model's at the same places, -inf for tokens that it cannot say.  # [n, vocab]
        strength: the paper's eta; at 0 the target stays what it is.
    """
    p, q = target.softmax(dim=-1), draft.softmax(dim=-1)
    likely = q >= _LIKELY * q.amax(dim=-1, keepdim=True)
    return target - strength * torch.where(likely, p - q, torch.zeros_like(p))


class KnowledgeTransfer:
    """Makes the declared target's logits out of the target's.

    Args:
        draft: the draft model, whose cache is shared with the drafter.
        reading: what it reads.
        strength: above 0.
    """

    def __init__(self, draft: DraftModel, reading: RetrievedText, strength: float) -> None:
        self.name = f"rapid:transfer={strength:g}"
        self.strength = strength
        self._draft = draft
        self._reading = reading

    def apply(self, batch: ScheduledBatch, drafts: DraftBatch, scores: TargetScores) -> TargetScores:
        """Scores of the declared target for every sampling request; `errors` says for which there are none."""
        errors: dict[str, Exception] = {}
        places: dict[Request, slice] = {}
        trees: list[tuple[Request, DraftTree]] = []
        for item, tree, row in zip(batch.sampling, drafts.trees, scores.first_row, strict=True):
            error = self._error(item.request)
            if error is not None:
                errors[item.request.id] = error
                continue
            places[item.request] = slice(row, row + 1 + len(tree))
            trees.append((item.request, tree))
        logits = scores.logits.to(torch.float32, copy=True)
        for request, rows in tree_rows(self._draft, trees):
            mine = places[request]
            logits[mine] = transferred(logits[mine], torch.from_numpy(rows).to(logits.device), self.strength)
        seconds = self._draft.runner.last_seconds if trees else 0.0  # of the last forward: a text is read only once
        read_ahead(self._draft, [item.request for item in batch.items if not item.samples])
        return replace(scores, logits=logits, errors=errors, transform=self.name, transform_seconds=seconds)

    def room(self, request: Request) -> int:
        """Draft nodes whose rows fit behind what is read of the request."""
        return max(self._draft.max_model_len - len(self._reading.tokens(request)), 0)

    def _error(self, request: Request) -> PacelineError | None:
        """Why the declared target has no law here."""
        length = len(self._reading.tokens(request))
        failed = self._reading.error(request)
        if failed is not None:
            return PacelineError(f"retrieval failed, and without it {self.name} has no law: {failed}")
        if length > self._draft.max_model_len:
            return PromptTooLongError(
                f"and output take {length} tokens of the draft model of {self.name}, which reads "
                f"{self._draft.max_model_len}.",
                field="prompt",
                fix="Ask for fewer tokens, or serve with a smaller budget or a draft model of longer context.",
            )
        return None
