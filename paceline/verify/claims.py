"""What a draft says of itself, checked before a rule relies on it.

A rule that weighs draft probabilities is exact only if the draft tells the truth about them. What can be seen is
refused here: a law that could not have drawn its token, siblings of different laws, draws without replacement that
repeat, a kind of draw that the rule was not made for.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from paceline.engine.draft_tree import DraftTree, Origin
from paceline.engine.sampling import Law
from paceline.errors import RuleViolation


def check_claims(rule: str, tree: DraftTree, branches: Origin | None) -> None:
    """Refuse a draft under which the rule would be biased.

    Args:
        rule: its name, for the message.
        tree: the draft.
        branches: how the siblings of a drawn tree must have been drawn; None: the rule walks chains only.

    Raises:
        RuleViolation: the draft's shape or claim does not fit.
    """
    if branches is None and not tree.is_chain():
        raise RuleViolation(f"{rule} walks a chain, and this draft branches.", field="tree")
    if not tree.sampled:
        if tree.laws is not None:
            raise RuleViolation("the draft claims to be chosen but carries laws.", field="laws")
        return
    if tree.laws is None or len(tree.laws) != len(tree):
        raise RuleViolation("the draft claims to be sampled but carries no law per token.", field="laws")
    for children in tree.children():
        if len(children) > 1 and tree.origin is not branches:
            raise RuleViolation(f"{rule} is not exact for siblings drawn {_HOW[tree.origin]}.", field="origin")
        _check_siblings([int(tree.tokens[c]) for c in children], [tree.laws[c] for c in children], tree.origin)


_HOW = {Origin.INDEPENDENT: "with replacement", Origin.DISTINCT: "without replacement", Origin.CHOSEN: "by choice"}


def _check_siblings(tokens: Sequence[int], laws: Sequence[Law], origin: Origin) -> None:
    if origin is Origin.DISTINCT and len(set(tokens)) < len(tokens):
        raise RuleViolation("siblings drawn without replacement repeat a token.", field="tokens")
    if any(not _same(law, laws[0]) for law in laws[1:]):
        raise RuleViolation("siblings carry different draft laws.", field="laws")
    drawable = [laws[0].can_draw(token) for token in tokens]
    for i, token in enumerate(tokens):
        if drawable[i] and not all(drawable[:i]):
            raise RuleViolation(f"token {token} stands behind tokens that its law cannot draw.", field="tokens")
        if not drawable[i] and (origin is Origin.INDEPENDENT or i < np.count_nonzero(laws[0].weights())):
            raise RuleViolation(f"token {token} cannot have been drawn from its draft law.", field="laws")


def _same(a: Law, b: Law) -> bool:
    if a is b:
        return True
    same_ids = (a.ids is None) == (b.ids is None) and (a.ids is None or np.array_equal(a.ids, b.ids))  # type: ignore[arg-type]
    return same_ids and np.array_equal(a.logits, b.logits)
