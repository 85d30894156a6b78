"""The built-in model in its GGUF file's own precision: the dequantised fp32 model to rounding, and bit for bit the same
whatever speculates and whatever else is in the batch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from lossless.real import chat_prompts, logits_in_chunks, real_llm, top_gap

from paceline import LLM, SamplingParams
from paceline.model.loader import LoadedModel, load_model
from paceline.outputs import Generation

pytestmark = pytest.mark.real_model
LICENCE = Path(__file__).resolve().parents[2] / "LICENSE"
GREEDY = SamplingParams(temperature=0.0, max_tokens=64)
DRAWN = SamplingParams(temperature=1.0, seed=11, max_tokens=64)


@pytest.fixture(scope="module")
def kept(real_model_kept: LoadedModel) -> LLM:
    return real_llm(real_model_kept)


def alone(kept: LLM, params: SamplingParams) -> list[Generation]:
    """Without speculation, one prompt at a time."""
    return [kept.generate(prompt, params)[0] for prompt in chat_prompts(kept)]


@pytest.mark.parametrize(
    ("activations", "most", "typical", "divergence"), [("float32", 1e-3, 1e-4, 1e-6), ("auto", 5.0, 0.4, 8e-3)]
)
def test_logits_are_those_of_the_dequantised_model(
    kept: LLM, real_model: LoadedModel, activations: str, most: float, typical: float, divergence: float
) -> None:
    """Up to the rounding of inputs (bounds: about twice what it costs llama.cpp), so the greedy token is the
    same wherever the gap exceeds it."""
    exact = real_llm(real_model)
    if activations != "auto":
        kept = real_llm(load_model(str(kept.loaded.path), device="cpu", activations=activations))
    texts = [exact.tokenizer(LICENCE.read_text()).input_ids[:300]]
    texts += [[*g.prompt_token_ids, *g.token_ids] for g in alone(kept, GREEDY)]
    ours, theirs = (np.concatenate([logits_in_chunks(llm, t, 64) for t in texts]) for llm in (kept, exact))
    error = np.abs(ours - theirs).max()
    usual = float(np.sqrt(np.square(ours - theirs).mean()))
    p, q = (torch.log_softmax(torch.from_numpy(x), dim=-1) for x in (theirs, ours))
    apart = float((p.exp() * (p - q)).sum(dim=-1).mean())
    best = np.argsort(-theirs, axis=1)[:, :2]
    other = ours.argmax(axis=1) != best[:, 0]
    print(f"\n{len(ours)} positions: error {usual:.1e}, at most {error:.1e}; {other.sum()} other greedy tokens")
    print(f"Kullback-Leibler divergence {apart:.1e}")
    assert len(ours) > 400
    assert error < most
    assert usual < typical
    assert apart < divergence
    assert (top_gap(theirs, best)[other] < 2 * error).all()


def test_logits_do_not_depend_on_how_a_text_is_cut(kept: LLM) -> None:
    ids = kept.tokenizer(LICENCE.read_text()).input_ids[:300]
    whole = logits_in_chunks(kept, ids, 300)
    for size in (1, 2, 7, 64, 257):
        assert np.array_equal(logits_in_chunks(kept, ids, size), whole), size


@pytest.mark.parametrize("params", [GREEDY, DRAWN], ids=["greedy", "drawn"])
@pytest.mark.parametrize("spec", ["none", "ngram:k=5", "recycling:k=24", "draft:k=4,model=builtin", "auto"])
def test_texts_are_the_same_bit_for_bit(
    real_model_kept: LoadedModel, kept: LLM, spec: str, params: SamplingParams
) -> None:
    """All prompts in one batch, with and without drafts, against one at a time without."""
    llm = real_llm(real_model_kept, spec)
    found = llm.generate(chat_prompts(llm), params)
    assert [g.token_ids for g in found] == [g.token_ids for g in alone(kept, params)]
