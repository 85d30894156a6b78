"""BASS (2404.15778): batched speculation with ragged acceptance, and one draft length that grows and shrinks.

Paceline's attention is the SPLIT form; the PAD form is written out here to compare with.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from paceline.bench.systems.base import Row, at_least, at_most, exactly, suite
from paceline.bench.systems.chen import draft_engine
from paceline.bench.systems.context import Context
from paceline.bench.systems.measures import NoResidual, combined_p_value, with_rule
from paceline.bench.systems.real_laws import hardest, pairs_p_value
from paceline.bench.systems.replays import loads
from paceline.cache.paged_kv import KVShape, PagedKV, slots_of
from paceline.config import SamplingParams
from paceline.model.attention import AttentionMetadata, SequenceAttention, paged_attention
from paceline.plan.bass import BassLength
from paceline.plan.survival import AcceptanceEstimates
from paceline.verify.base import AcceptanceRule
from paceline.verify.rejection import RejectionRule

_LENGTHS = (1, 17, 900)
_QUERIES = 5
_ROWS = 8
_TOP = 4


def _attention(context: Context) -> Iterator[Row]:
    """PAD and SPLIT attention agree."""
    heads = int(context.loaded.config.num_attention_heads)
    kv_heads = int(getattr(context.loaded.config, "num_key_value_heads", None) or heads)
    dim = int(getattr(context.loaded.config, "head_dim", None) or context.loaded.config.hidden_size // heads)
    torch.manual_seed(0)
    count = len(_LENGTHS) * _QUERIES
    query = torch.randn(heads, count, dim)
    keys = [torch.randn(length + _QUERIES, kv_heads, dim) for length in _LENGTHS]
    values = [torch.randn_like(key) for key in keys]
    split = _split(query, keys, values)
    gap = float((split - _padded(query, keys, values)).abs().max())
    note = f"contexts {_LENGTHS}, {_QUERIES} new tokens each, {heads} heads over {kv_heads}, fp32"
    yield at_most("PAD minus SPLIT attention, largest entry", gap, 1e-5, note)


class _Layer(torch.nn.Module):
    layer_idx = 0


def _split(query: torch.Tensor, keys: list[torch.Tensor], values: list[torch.Tensor]) -> torch.Tensor:
    """Paceline's own attention on paged KV.  # [tokens, heads, dim]"""
    kv_heads, dim, block = keys[0].shape[1], keys[0].shape[2], 16
    blocks = [-(-len(key) // block) for key in keys]
    kv = PagedKV(KVShape(1, kv_heads, dim, torch.float32), sum(blocks), block, torch.device("cpu"))
    sequences, slots, new_keys, new_values, first, start = [], [], [], [], 0, 0
    for key, value, size in zip(keys, values, blocks, strict=True):
        table = list(range(first, first + size))
        old = len(key) - _QUERIES
        kv.write(0, torch.from_numpy(slots_of(table, block, 0, old)), key[:old], value[:old])
        slots.append(slots_of(table, block, old, len(key)))
        new_keys.append(key[old:])
        new_values.append(value[old:])
        where = np.arange(old, len(key))
        sequences.append(SequenceAttention(start, start + _QUERIES, old, torch.tensor(table), where, None))
        first, start = first + size, start + _QUERIES
    paged = AttentionMetadata(kv, torch.from_numpy(np.concatenate(slots)), tuple(sequences))
    new_key, new_value = (torch.cat(part).transpose(0, 1)[None] for part in (new_keys, new_values))
    return paged_attention(_Layer(), query[None], new_key, new_value, paged=paged)[0][0]


def _padded(query: torch.Tensor, keys: list[torch.Tensor], values: list[torch.Tensor]) -> torch.Tensor:
    """One attention over keys padded to the longest row, the rest masked.  # [tokens, heads, dim]"""
    heads, dim, longest = query.shape[0], query.shape[2], max(len(key) for key in keys)
    repeat = heads // keys[0].shape[1]

    def pad(parts: list[torch.Tensor]) -> torch.Tensor:  # [rows, heads, longest, dim]
        filled = [torch.nn.functional.pad(part, (0, 0, 0, 0, 0, longest - len(part))) for part in parts]
        return torch.stack(filled).permute(0, 2, 1, 3).repeat_interleave(repeat, dim=1)

    ends = torch.tensor([[len(key) - _QUERIES + i for i in range(_QUERIES)] for key in keys])
    hidden = torch.arange(longest)[None, None] > ends[:, :, None]
    rows = query.reshape(heads, len(keys), _QUERIES, dim).transpose(0, 1)
    scores = (rows @ pad(keys).transpose(2, 3)) * dim**-0.5
    weights = torch.softmax(scores.masked_fill(hidden[:, None], float("-inf")), dim=-1)
    return (weights @ pad(values)).permute(0, 2, 1, 3).reshape(-1, heads, dim)


def _rows(context: Context) -> Iterator[Row]:
    """Every row of a batch of 8 follows its own law."""
    runs = context.few(96, 48)
    values, accepted = _row_p_values(context, RejectionRule(), runs)
    note = (
        f"{_ROWS} rows where the draft agrees least, {runs} runs each, T=1, top-k {_TOP}; smallest {min(values):.3g}; "
    )
    note += f"{accepted} draft tokens accepted"
    yield at_least("E2 of the rows of a batch of 8: p-value by Fisher", combined_p_value(values), 1e-3, note)
    broken, _ = _row_p_values(context, NoResidual(), runs)
    note = f"the same runs under a rule broken on purpose; smallest {min(broken):.3g}"
    yield at_most("E2 control: no residual is caught", combined_p_value(broken), 1e-3, note)


def _row_p_values(context: Context, rule: AcceptanceRule, runs: int) -> tuple[list[float], int]:
    """The p-value of every row; and how many draft tokens were accepted."""
    prompts = hardest(context, _ROWS)
    llm = with_rule(draft_engine(context, max_num_seqs=_ROWS), rule)
    common: dict[str, Any] = {"temperature": 1.0, "top_k": _TOP, "max_tokens": 3, "ignore_eos": True}
    pairs: list[list[tuple[int, int]]] = [[] for _ in prompts]
    accepted = 0
    for seed in range(runs):
        context.say(f"Batches of {_ROWS} rows: {seed} of {runs}")
        made = llm.generate(prompts, [SamplingParams(seed=seed * _ROWS + row, **common) for row in range(len(prompts))])
        for found, generation in zip(pairs, made, strict=True):
            found.append((generation.token_ids[0], generation.token_ids[1]))
            accepted += generation.stats.accepted_tokens
    with_rule(llm, RejectionRule())
    values = [pairs_p_value(context.llm(), prompt, found, _TOP) for prompt, found in zip(prompts, pairs, strict=True)]
    return values, accepted


def _trace(_context: Context) -> Iterator[Row]:
    """The rule of the draft length, step by step."""
    policy = BassLength([], AcceptanceEstimates({}))
    lengths = []
    for longest in (7, 9, 3, 3, 3):
        policy.update([0, longest, 1])
        lengths.append(str(policy.length))
    note = "after accepted maxima 7, 9, 3, 3, 3 of a batch, from 7"
    yield exactly("controller: lengths", ", ".join(lengths), "9, 11, 9, 7, 5", note)


def _controller(context: Context) -> Iterator[Row]:
    """The controller against the best fixed length."""
    found = loads(context, ["bass"])
    ratios = {load.name: load.over_best_fixed("bass") for load in found}
    worst = min(ratios, key=lambda name: ratios[name])
    best = next(load for load in found if load.name == worst).best_fixed()[0]
    note = (
        f"worst of {len(found)} loads: {worst} (best: {best}), median {np.median(list(ratios.values())):.3f}; "
        "the rule knows acceptance and no times, so it cannot stop where look-ahead does not pay"
    )
    yield at_least("controller: goodput over the best fixed length", ratios[worst], 0.95, note)


run = suite(_attention, _rows, _trace, _controller)
