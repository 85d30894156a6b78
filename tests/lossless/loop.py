"""What the loop tests share: tiny models on disk and in memory, many runs of one prompt, and the exact joint law."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fakes
import numpy as np
import torch
from lossless.reference import Floats, chi_square, model_rows, slow_law
from scipy import stats

from paceline import LLM, SamplingParams
from paceline.model.loader import LoadedModel

VOCAB = 8
PROMPT = [3, 4, 5, 3, 4]
"""Its ending occurs before, so that prompt lookup drafts in the very first step."""
MAX_TOKENS = 3
"""The first step may look two tokens ahead: both tokens that are tested can come from one draft, or from two steps."""
SHAPE: dict[str, Any] = {"vocab_size": VOCAB, "num_hidden_layers": 1, "initializer_range": 0.2}
FALSE_ALARM = 1e-6
"""Odds that one chi-square fails although the law is right."""
_SAMPLES = 128
# 100 requests: a draft model reads at most 512 prompt tokens in a step, and all of them shall draft in the first one.
_WIDE = {"max_num_seqs": 100, "max_num_batched_tokens": 4096, "kv_cache_memory": 64 << 20}


@dataclass(frozen=True)
class Tiny:
    """A target, its twin for the reference, and a draft model that agrees with it about two times in three."""

    loaded: LoadedModel
    plain: torch.nn.Module
    draft: Path
    heads: Path
    """Untrained heads that fit the draft, by kind."""

    def llm(self, speculation: str, **options: Any) -> LLM:
        """An LLM with room for many requests at once; `DRAFT` in the spec stands for the draft model's folder, and a
        policy that needs a head gets one."""
        spec = speculation.replace("DRAFT", f'"{self.draft}"')
        spec, at, policy = spec.partition("@")
        spec += at + fakes.with_head(policy, self.heads)
        return fakes.make_llm(self.loaded, speculation=spec, **{**_WIDE, **options})


def make_tiny(folder: Path, **changes: Any) -> Tiny:
    """Save the draft under `folder`; the target exists in memory only."""
    shape = {**SHAPE, **changes}
    loaded = fakes.make_loaded(**shape)
    # A model keeps its config and reads the attention's name from it, so each gets its own.
    draft = fakes.make_model(fakes.make_config(**shape), attention="eager")
    torch.manual_seed(9)
    with torch.no_grad():
        draft.lm_head.weight.add_(torch.randn_like(draft.lm_head.weight) * 0.2)
    draft.save_pretrained(folder)
    loaded.tokenizer.save_pretrained(folder)
    heads = fakes.save_heads(folder / "heads", int(draft.config.hidden_size))
    return Tiny(loaded, fakes.make_model(fakes.make_config(**shape), attention="eager"), folder, heads)


def exact_joint(model: torch.nn.Module, params: SamplingParams, stop_ids: tuple[int, ...] = (2,)) -> Floats:
    """Joint law of the first two tokens after `PROMPT` from the model's own logits.  # [vocab, vocab]"""
    joint = np.empty((VOCAB, VOCAB))
    first = slow_law(model_rows(model, PROMPT)[-1], params, PROMPT, [], stop_ids)
    for token in range(VOCAB):
        row = model_rows(model, [*PROMPT, token])[-1]
        joint[token] = first[token] * slow_law(row, params, PROMPT, [token], stop_ids)
    return joint


@dataclass(frozen=True)
class Runs:
    """The first two tokens of many samples, and how far the drafts were followed."""

    tokens: np.ndarray  # [num_seeds, samples, 2]
    accepted: int
    drafted: int

    @property
    def counts(self) -> Floats:
        """How often each pair came.  # [vocab, vocab]"""
        flat = self.tokens.reshape(-1, 2)
        return np.bincount(flat[:, 0] * VOCAB + flat[:, 1], minlength=VOCAB**2).astype(np.float64).reshape(VOCAB, VOCAB)

    def law_p_value(self, joint: Floats) -> float:
        """Of the chi-square against the exact joint law."""
        return chi_square(self.counts, joint)

    def independence_p_value(self) -> float:
        """Of the chi-square of first tokens of neighbouring samples of one seed."""
        pairs = np.histogram2d(self.tokens[:, 0::2, 0].ravel(), self.tokens[:, 1::2, 0].ravel(), bins=range(VOCAB + 1))
        table = pairs[0]
        table = table[table.sum(axis=1) > 0][:, table.sum(axis=0) > 0]
        return 1.0 if min(table.shape) < 2 else float(stats.chi2_contingency(table).pvalue)


def run(llm: LLM, params: dict[str, Any], runs: int, first_seed: int = 0) -> Runs:
    """`runs` samples of `PROMPT`, 128 per seed, through the whole engine."""
    seeds = range(first_seed, first_seed + -(-runs // _SAMPLES))
    common = {"n": _SAMPLES, "max_tokens": MAX_TOKENS, "ignore_eos": True, **params}
    drafters = set(llm.engine.stages.drafting.drafters)
    generations = llm.generate([PROMPT] * len(seeds), [SamplingParams(seed=seed, **common) for seed in seeds])
    assert set(llm.engine.stages.drafting.drafters) == drafters, "a drafter failed and was left out"
    outputs = [list(g.outputs) for g in generations]
    assert all(o.error is None and len(o.token_ids) == MAX_TOKENS for group in outputs for o in group)
    return Runs(
        np.array([[o.token_ids[:2] for o in group] for group in outputs]),
        sum(o.stats.accepted_tokens for group in outputs for o in group),
        sum(o.stats.draft_tokens for group in outputs for o in group),
    )
