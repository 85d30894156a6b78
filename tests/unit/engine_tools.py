"""What the engine's tests share: tiny models made once, `transformers` as the reference, requests made by hand."""

from __future__ import annotations

import itertools
from functools import cache
from typing import Any

import numpy as np
import torch
from fakes import make_config, make_llm, make_loaded, make_model

from paceline import LLM, SamplingParams
from paceline.cache.block_manager import BlockManager
from paceline.cache.paged_kv import PagedKV
from paceline.engine.draft_tree import DraftTree
from paceline.engine.request import Request
from paceline.engine.types import NodeLabels, RequestOutput, ScheduledBatch, ScheduledRequest, StepStats
from paceline.model.loader import LoadedModel
from paceline.model.runner import ModelRunner, kv_shape

LIVELY: dict[str, dict[str, Any]] = {
    "gemma2": {"tie_word_embeddings": False, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 5.0}
}
"""Changes under which a random model does not repeat one token for ever."""
TOKEN_BYTES = 2 * 3 * 2 * 8 * 4
"""KV of one token: keys and values, three layers, two heads of eight, fp32."""
_ids = itertools.count()


@cache
def loaded(architecture: str = "llama", seed: int = 0) -> LoadedModel:
    """The tiny model of an architecture, shared by all tests (its weights are only read)."""
    return make_loaded(architecture, seed=seed, **LIVELY.get(architecture, {}))


def llm(speculation: str = "none", architecture: str = "llama", **options: Any) -> LLM:
    """An LLM over the shared model."""
    return make_llm(loaded(architecture), speculation=speculation, **options)


@cache
def _eager(architecture: str, seed: int = 0) -> torch.nn.Module:
    return make_model(make_config(architecture, **LIVELY.get(architecture, {})), seed, "eager")


@cache
def reference(prompt: tuple[int, ...], num_tokens: int, architecture: str = "llama") -> tuple[int, ...]:
    """Greedy continuation by `transformers`' own `generate`, end tokens ignored."""
    with torch.inference_mode():
        out = _eager(architecture).generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
            max_new_tokens=num_tokens,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
    return tuple(out[0, len(prompt) :].tolist())


def reference_logits(tokens: list[int], architecture: str = "llama") -> torch.Tensor:
    """Logits by a plain `transformers` forward.  # [len(tokens), vocab]"""
    with torch.inference_mode():
        logits: torch.Tensor = _eager(architecture)(torch.tensor([tokens]), use_cache=False).logits[0]
    return logits


def prompt_of(length: int, seed: int = 0) -> tuple[int, ...]:
    """A random prompt without special tokens."""
    return tuple(np.random.default_rng((seed, length)).integers(3, 96, length).tolist())


def words(tokens: Any) -> str:
    """The text of tokens, as the tiny tokenizer writes it (special tokens left out)."""
    return "".join(f"w{t}" for t in tokens if t not in (0, 2))


def greedy(max_tokens: int = 16, **options: Any) -> SamplingParams:
    """Temperature 0 to exactly `max_tokens`."""
    return SamplingParams(**{"temperature": 0.0, "max_tokens": max_tokens, "ignore_eos": True, **options})


def make_request(tokens: Any, params: SamplingParams | None = None, **fields: Any) -> Request:
    """A request with an id of its own."""
    tokens = list(tokens)
    fields = {"id": f"t{next(_ids)}", "seed": 0, **fields}
    return Request(token_ids=tokens, prompt_len=len(tokens), params=params or greedy(), **fields)


def run(engine: Any, requests: list[Request], add: bool = True) -> dict[str, list[RequestOutput]]:
    """Add requests, step until all is done, and return the news by request."""
    for request in requests if add else ():
        engine.add(request)
    news: dict[str, list[RequestOutput]] = {}
    for _ in range(5000):
        if not engine.has_work:
            engine.check()
            return news
        for item in engine.step().outputs:
            news.setdefault(item.request_id, []).append(item)
    raise AssertionError("the engine never became idle")


def text_of(news: list[RequestOutput]) -> str:
    """All pieces of a request, joined."""
    return "".join(item.text for item in news)


def tree(tokens: list[int], parents: list[int], **changes: Any) -> DraftTree:
    """A draft tree with plausible classes and survivals."""
    n = len(tokens)
    fields: dict[str, Any] = {
        "tokens": np.array(tokens, dtype=np.int64),
        "parents": np.array(parents, dtype=np.int64),
        "drafter": ("ngram",) * n,
        "key": np.zeros(n, dtype=np.int64),
        "survival": np.linspace(0.9, 0.1, n),
        **changes,
    }
    return DraftTree(**fields)


def batch_of(*requests: Request, chunk: int | None = None) -> ScheduledBatch:
    """All of each request's uncomputed tokens (or a chunk of them), as the scheduler would hand them out."""
    items = []
    for r in requests:
        n = len(r.token_ids) - r.num_computed if chunk is None else chunk
        items.append(ScheduledRequest(r, r.num_computed, n, r.num_computed + n == len(r.token_ids)))
    return ScheduledBatch(tuple(items))


def make_runner(architecture: str = "llama", num_blocks: int = 64, block_size: int = 16, seed: int = 0) -> ModelRunner:
    """A runner with a cache of its own over the shared model."""
    model = loaded(architecture, seed)
    kv = PagedKV(kv_shape(model.config, model.dtype), num_blocks, block_size, model.device)
    return ModelRunner(model.model, kv, model.device)


def make_blocks(num_blocks: int = 64, block_size: int = 16) -> BlockManager:
    """A block manager to go with it."""
    return BlockManager(num_blocks, block_size)


def decoding(requests: int = 1, max_tokens: int = 1000) -> ScheduledBatch:
    """A batch of decoding requests."""
    made = [make_request(range(3, 13), greedy(max_tokens)) for _ in range(requests)]
    for request in made:
        request.num_computed = 9
    return batch_of(*made)


def labels_of(*rows: tuple[str, int, bool], request: int = 0, predicted: float = 0.5) -> NodeLabels:
    """Labels of nodes that hang from one request's root, from (drafter, key, accepted)."""
    names = tuple(dict.fromkeys(name for name, _, _ in rows))
    n = len(rows)
    return NodeLabels(
        names,
        np.array([names.index(name) for name, _, _ in rows], dtype=np.int64),
        np.array([key for _, key, _ in rows], dtype=np.int64),
        np.ones(n, dtype=np.int64),
        np.full(n, request, dtype=np.int64),
        np.full(n, predicted),
        np.array([accepted for _, _, accepted in rows], dtype=np.bool_),
    )


def step_stats(labels: NodeLabels | None = None, **changes: Any) -> StepStats:
    """What a step of one decoding request (or of `requests`) would report."""
    requests = changes.pop("requests", None) or (make_request([3, 4]),)
    count = len(requests)
    fields: dict[str, Any] = {
        "num_prompt_tokens": 0,
        "num_context_tokens": 10 * count,
        "num_sequences": count,
        "committed": np.ones(count, dtype=np.int64),
        "verified": np.zeros(count, dtype=np.int64),
        "forward_seconds": 0.01,
        "step_seconds": 0.01,
        "draft_seconds": {},
        "draft_depths": {},
        "gains": {},
        "nodes": {},
        "labels": labels_of() if labels is None else labels,
        **changes,
    }
    return StepStats(requests=tuple(requests), **fields)
