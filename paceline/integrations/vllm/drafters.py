"""Drafters of ours for vLLM's method `custom_class`: cross-request suffix decoding, and Token Recycling.

    --speculative-config '{"method": "custom_class", "model": "paceline.integrations.vllm.SuffixProposer",
                           "num_speculative_tokens": 8}'

What vLLM gives such a class limits them: no request ids (`rows.py`), so no tenant salt either, and all requests of a
server share one structure unless `suffix_tokens` is 0; no scores, so Token Recycling recycles what was committed, not
the target's other likely tokens; chains only.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from paceline.draft.base import DraftContext, Drafter
from paceline.draft.recycling import WIDTH, RecyclingDrafter
from paceline.draft.suffix import SuffixDrafter
from paceline.engine.types import Observation
from paceline.integrations.vllm.asking import BOARD
from paceline.integrations.vllm.options import Options
from paceline.integrations.vllm.rows import Row, Rows

logger = logging.getLogger("vllm.paceline")


class _Proposer:
    """What the two have in common.

    Args:
        vllm_config: vLLM's.

    Raises:
        ConfigError: an option under `additional-config` is wrong.
    """

    def __init__(self, vllm_config: Any) -> None:
        self._most = int(vllm_config.speculative_config.num_speculative_tokens)
        self._longest = int(vllm_config.model_config.max_model_len)
        self._drafter = self._make(vllm_config, Options.read(vllm_config.additional_config))
        self._rows = Rows()
        self._failed = False
        BOARD.drafter = True

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """There is none."""

    def propose(
        self,
        sampled_token_ids: Sequence[Sequence[int]],
        num_tokens_no_spec: NDArray[np.int32],
        token_ids_cpu: NDArray[np.int32],
        slot_mappings: object = None,  # noqa: ARG002
    ) -> list[list[int]]:
        """Draft tokens for every row; none where there is no guess, or where the scheduler asks for none.

        An exception is logged once, and nobody gets drafts in that step.
        """
        length = self._most if BOARD.length is None else min(BOARD.length, self._most)
        if not length:
            return [[] for _ in sampled_token_ids]
        started = perf_counter()
        try:
            drafts = self._propose(length, sampled_token_ids, num_tokens_no_spec, token_ids_cpu)
        except Exception:
            if not self._failed:
                logger.exception("Paceline's drafter failed; further errors are not logged")
            self._failed = True
            drafts = [[] for _ in sampled_token_ids]
        BOARD.seconds += perf_counter() - started
        return drafts

    def _propose(
        self, length: int, sampled: Sequence[Sequence[int]], counts: NDArray[np.int32], tokens: NDArray[np.int32]
    ) -> list[list[int]]:
        rows, ended = self._rows.read(sampled, counts, tokens)
        for request in ended:
            self._drafter.forget(request)
        drafts: list[list[int]] = []
        for row in rows:
            room = 0 if row is None else min(length, self._longest - len(row.tokens) - 1)
            if row is None or room < 1:
                drafts.append([])
                continue
            self._observe(row)
            (proposal,) = self._drafter.propose([DraftContext(row.request, room)])
            drafts.append(proposal.tokens.tolist())
        return drafts

    def _make(self, vllm_config: Any, options: Options) -> Drafter:
        raise NotImplementedError

    def _observe(self, row: Row) -> None:
        """Learn from a row's new tokens."""


class SuffixProposer(_Proposer):
    """Suffix decoding over the request's own text and what other requests were answered (`paceline.draft.suffix`)."""

    def _make(self, vllm_config: Any, options: Options) -> Drafter:  # noqa: ARG002
        return SuffixDrafter(tokens=options.suffix_tokens, chain=True)


class RecyclingProposer(_Proposer):
    """Token Recycling of committed tokens: after each token, what came after it last (`paceline.draft.recycling`)."""

    def _make(self, vllm_config: Any, options: Options) -> Drafter:  # noqa: ARG002
        return RecyclingDrafter(vocab_size=int(vllm_config.model_config.get_vocab_size()), chain=True)

    def _observe(self, row: Row) -> None:
        newest = np.array(row.tokens[-row.fresh - 1 :], dtype=np.int64)
        if len(newest) < 2:
            return
        followers = np.full((len(newest) - 1, WIDTH), -1, dtype=np.int64)
        followers[:, 0] = newest[1:]
        self._drafter.observe(Observation(row.request, tuple(row.tokens[-row.fresh :]), newest[:-1], followers))
