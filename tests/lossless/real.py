"""What the real-model tests share: prompts, LLMs over one loaded model, a smaller draft, logits in any batch shape."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from paceline import LLM
from paceline.model.loader import LoadedModel
from paceline.model.runner import ForwardBatch, SequenceInput
from paceline.outputs import Generation

SPEC_BENCH = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "spec_bench.jsonl"
QUESTIONS = (
    "Write three sentences about a lighthouse keeper who finds a letter in a bottle.",
    "Repeat this list, each item twice: apples, pears, plums, apples, cherries.",
    "Add type hints to this function and repeat it:\n\ndef area(width, height):\n    return width * height\n",
    "What is 17 + 25 + 17 + 25? Show every step.",
)


def real_llm(loaded: LoadedModel, speculation: str = "none", **options: Any) -> LLM:
    """An LLM that shares the loaded weights."""
    defaults = {"max_model_len": 1024, "kv_cache_memory": 256 << 20}
    return LLM(loaded, speculation=speculation, **{**defaults, **options})


def chat_prompts(llm: LLM, questions: Sequence[str] = QUESTIONS) -> list[list[int]]:
    """Token ids of one-turn conversations."""
    return [llm.chat_prompt([{"role": "user", "content": question}]) for question in questions]


def spec_bench(count: int, longest: int = 3000) -> list[str]:
    """First turns of Spec-Bench, spread over its tasks, or a skip."""
    if not SPEC_BENCH.exists():
        pytest.skip("Spec-Bench's questions (shared/data/spec_bench.jsonl beside the repository) are not here")
    rows = [json.loads(line) for line in SPEC_BENCH.read_text().splitlines()]
    turns = [row["turns"][0] for row in rows if len(row["turns"][0]) <= longest]
    return turns[:: max(1, len(turns) // count)][:count]


def logits_in_chunks(llm: LLM, tokens: Sequence[int], chunk: int) -> np.ndarray:
    """The engine's own logits after every token, `chunk` tokens to a forward.  # [len(tokens), vocab] fp32"""
    blocks = llm.engine.stages.scheduler.blocks
    table: list[int] = []
    assert blocks.grow(table, len(tokens))
    rows = []
    try:
        for start in range(0, len(tokens), chunk):
            part = list(tokens[start : start + chunk])
            where = np.arange(start, start + len(part))
            batch = ForwardBatch((SequenceInput(part, where, start, table),), range(len(part)))
            rows.append(llm.engine.runner.forward(batch).float().numpy())
    finally:
        blocks.release(table)
    return np.concatenate(rows)


def top_gap(rows: np.ndarray, best: np.ndarray) -> np.ndarray:
    """How far the first of two tokens is above the second.  # [n, vocab], [n, 2] -> [n]"""
    picked = np.take_along_axis(rows, best, axis=1)
    return picked[:, 0] - picked[:, 1]


def shape_noise(llm: LLM, sequences: Sequence[Sequence[int]]) -> float:
    """99.9th percentile of how far the gap of the two best logits moves when the same tokens run in another shape."""
    moved = []
    for tokens in sequences:
        single = logits_in_chunks(llm, tokens, 1)
        best = np.argsort(-single, axis=1)[:, :2]
        for chunk in (2, 5, 17, 64, len(tokens)):
            moved.append(np.abs(top_gap(single, best) - top_gap(logits_in_chunks(llm, tokens, chunk), best)))
    return float(np.quantile(np.concatenate(moved), 0.999))


def divergence(exact: LLM, found: Generation, expected: Generation) -> float | None:
    """The gap of the two best logits of `exact` where two texts part; None if they do not."""
    a, b = found.token_ids, expected.token_ids
    at = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    if at == len(a) == len(b):
        return None
    row = logits_in_chunks(exact, (*expected.prompt_token_ids, *b[:at]), 512)[-1]
    return float(np.subtract(*np.sort(row)[:-3:-1]))
