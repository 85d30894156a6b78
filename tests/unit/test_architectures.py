"""Every architecture gives what `transformers` gives: greedy text token for token in fp32, and a draft tree's logits.

The reference is `transformers`' own `generate` with its eager attention over the same random weights. Prompts are
shorter and longer than the sliding window (24), and outputs are checked to be no endless repetition of one token.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from engine_tools import (
    LIVELY,
    batch_of,
    greedy,
    llm,
    make_request,
    make_runner,
    prompt_of,
    reference,
    reference_logits,
    tree,
)
from fakes import ARCHITECTURES, make_config, make_llm, make_loaded, make_model

from paceline.cache.paged_kv import PagedKV
from paceline.engine.draft_tree import EMPTY_TREE, DraftTree
from paceline.engine.types import DraftBatch
from paceline.model.checks import PROVED, check_architecture, max_positions
from paceline.model.runner import ModelRunner, kv_shape
from paceline.verify.verifier import Verifier

PROMPTS = [prompt_of(n) for n in (1, 8, 27, 80)]
NEW = 24
SPECULATION = ("none", "ngram:k=4", "recycling:k=24", "ngram:k=3+recycling:k=24+prediction:k=6")
WINDOWS = {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 2}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    **{architecture: (architecture, {}) for architecture in ARCHITECTURES},
    "qwen2 with windows": ("qwen2", WINDOWS),
    "gemma3_text with capped logits": ("gemma3_text", {"final_logit_softcapping": 5.0, "tie_word_embeddings": True}),
    "phi3 without windows": (
        "phi3",
        {
            "sliding_window": None,
            "rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.75},
        },
    ),
    "gpt2 scaled by layer": ("gpt2", {"scale_attn_by_inverse_layer_idx": True, "reorder_and_upcast_attn": True}),
    "gpt2 unscaled": ("gpt2", {"scale_attn_weights": False, "tie_word_embeddings": True}),
    "opt normed afterwards": ("opt", {"do_layer_norm_before": False, "word_embed_proj_dim": 16}),
    "opt without biases": (
        "opt",
        {
            "enable_bias": False,
            "layer_norm_elementwise_affine": False,
            "_remove_final_layer_norm": True,
            "initializer_range": 0.3,  # without a last norm large values would cancel
        },
    ),
    "olmo2 with biases": ("olmo2", {"attention_bias": True, "num_key_value_heads": 1}),
    "granite with biases": ("granite", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    "qwen2_moe with windows": ("qwen2_moe", {**WINDOWS, "norm_topk_prob": True, "qkv_bias": False}),
    "qwen2_moe with router logits": ("qwen2_moe", {"output_router_logits": True}),
    "qwen3_moe, experts in one layer": ("qwen3_moe", {"decoder_sparse_step": 2, "mlp_only_layers": None}),
    "qwen3_moe with windows": ("qwen3_moe", {**WINDOWS, "norm_topk_prob": False, "attention_bias": True}),
}
architectures = pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))


def expected(architecture: str) -> list[tuple[int, ...]]:
    outputs = [reference(p, NEW, architecture) for p in PROMPTS]
    assert all(len(set(output)) >= 8 for output in outputs), "a degenerate reference proves nothing"
    return outputs


@architectures
@pytest.mark.parametrize("speculation", SPECULATION)
@pytest.mark.parametrize("chunk", [512, 13])
def test_greedy_equals_transformers(architecture: str, speculation: str, chunk: int) -> None:
    """One batch of all prompts, twice: the second time from the prefix cache and with warm drafters."""
    outputs = expected(architecture)
    # A prediction with one wrong word, so that long drafts are accepted, rejected and resumed.
    texts = [" ".join(f"w{t}" for t in (*output[:9], 77, *output[10:])) for output in outputs]
    engine = llm(speculation, architecture, max_num_batched_tokens=chunk)
    for turn in range(2):
        params = [greedy(NEW, prediction=text) for text in texts]
        found = engine.generate(PROMPTS, params)
        assert [g.token_ids for g in found] == outputs
        assert (found[3].stats.cached_tokens >= 64) == (turn == 1)
        if "recycling" in speculation and turn == 1:
            least = 2 * NEW if "prediction" in speculation else 8
            assert sum(g.stats.accepted_tokens for g in found) >= least, "hardly a draft was accepted"
        if "prediction" in speculation:
            # In one prompt's output the wrong word may cost more; every one must have profited.
            assert all(g.stats.target_forwards < NEW - 6 for g in found)


@architectures
def test_each_prompt_alone_gives_the_same(architecture: str) -> None:
    engine = llm("ngram:k=4+recycling:k=12", architecture, max_num_batched_tokens=13, enable_prefix_caching=False)
    for prompt, output in zip(PROMPTS, expected(architecture), strict=True):
        (found,) = engine.generate([prompt], greedy(NEW))
        assert found.token_ids == output
        assert found.stats.cached_tokens == 0


@architectures
@pytest.mark.parametrize("block_size", [1, 5])
def test_odd_block_sizes(architecture: str, block_size: int) -> None:
    engine = llm("recycling:k=24", architecture, block_size=block_size, max_num_batched_tokens=13)
    for _ in range(2):
        found = engine.generate(PROMPTS, greedy(NEW))
        assert [g.token_ids for g in found] == expected(architecture)


def assert_close(found: torch.Tensor, wanted: torch.Tensor, tolerance: float = 1e-5) -> None:
    """Equal up to fp32 rounding, measured against the largest logit."""
    assert (found - wanted).abs().max() <= tolerance * wanted.abs().max()


def random_tree(size: int, seed: int) -> DraftTree:
    """Many nodes per position: parents are drawn from the root and the nodes before."""
    rng = np.random.default_rng(seed)
    parents = [int(rng.integers(max(-1, i - 12), i)) for i in range(size)]
    return tree(rng.integers(3, 96, size).tolist(), parents)


def scores_of(architecture: str, tokens: list[int], draft: DraftTree, computed: int, table: list[int]) -> torch.Tensor:
    """Logits of the root and the nodes behind `tokens`, `computed` of which go through the network beforehand."""
    return scores_with(make_runner(architecture), tokens, draft, computed, table)


def scores_with(
    runner: ModelRunner, tokens: list[int], draft: DraftTree, computed: int, table: list[int]
) -> torch.Tensor:
    """The same over a runner that has computed nothing yet."""
    request = make_request(tokens)
    request.blocks = table
    verifier = Verifier(runner)
    if computed:
        verifier.verify(batch_of(request, chunk=computed), DraftBatch(()))
        request.num_computed = computed
    return verifier.verify(batch_of(request), DraftBatch((draft,))).logits


@architectures
@pytest.mark.parametrize(("length", "size"), [(10, 12), (30, 12), (70, 44)])
def test_a_tree_scores_like_its_paths(architecture: str, length: int, size: int) -> None:
    """Each node's logits are those of its root-to-node path, run as a chain here and by `transformers`."""
    tokens = list(prompt_of(length))
    draft = random_tree(size, seed=length)
    depths = draft.depths()
    assert np.bincount(depths).max() >= 3, "several nodes share a position"
    table = list(range(12))
    for computed in (length - 1, length - 5):
        logits = scores_of(architecture, tokens, draft, computed, table)
        assert len(logits) == size + 1
        for node in range(size):
            path = np.flatnonzero(draft.ancestor_mask()[node])
            assert len(path) == depths[node]
            picked = draft.tokens[path].tolist()
            chain = tree(picked, list(range(-1, len(path) - 1)))
            alone = scores_of(architecture, tokens, chain, length - 1, table)
            assert_close(logits[node + 1], alone[-1])
            whole = reference_logits(tokens + picked, architecture)
            assert_close(logits[node + 1], whole[-1])


@pytest.mark.parametrize("architecture", ["mistral", "gemma2", "gemma3_text", "phi3"])
def test_windows_compare_positions_in_a_tree_deeper_than_the_window(architecture: str) -> None:
    """Eight siblings stand before a chain of 34: slots run ahead of positions by seven."""
    tokens = list(prompt_of(10))
    draft = tree([5 + i for i in range(42)], [-1] * 8 + list(range(7, 41)))
    logits = scores_of(architecture, tokens, draft, 9, list(range(12)))
    whole = reference_logits(tokens + draft.tokens[7:].tolist(), architecture)
    assert_close(logits[8:], whole[10:])


@architectures
def test_the_place_of_blocks_does_not_matter(architecture: str) -> None:
    tokens, draft = list(prompt_of(60)), random_tree(20, seed=1)
    table = list(range(8))
    straight = scores_of(architecture, tokens, draft, 40, table)
    shuffled = scores_of(architecture, tokens, draft, 40, [61, 3, 17, 0, 42, 5, 9, 33])
    torch.testing.assert_close(straight, shuffled, rtol=0, atol=0)


@architectures
def test_batched_rows_score_like_single_ones(architecture: str) -> None:
    """A ragged batch of a chunk, a decode with a tree and a plain decode equals the three runs alone."""
    runner = make_runner(architecture)
    verifier = Verifier(runner)
    chunk, branching, plain = (make_request(prompt_of(n, seed=5)) for n in (40, 33, 29))
    chunk.blocks, branching.blocks, plain.blocks = [0, 1, 2], [3, 4, 5, 6], [7, 8]
    for request in (branching, plain):
        computed = len(request.token_ids) - 1
        verifier.verify(batch_of(request, chunk=computed), DraftBatch(()))
        request.num_computed = computed
    draft = random_tree(15, seed=2)
    scores = verifier.verify(batch_of(chunk, branching, plain), DraftBatch((EMPTY_TREE, draft, EMPTY_TREE)))
    assert scores.first_row == (0, 1, 17)
    assert runner.num_tokens == 32 + 28 + 40 + (1 + 15) + 1
    for request, row in zip((chunk, branching, plain), scores.first_row, strict=True):
        alone = reference_logits(request.token_ids, architecture)[-1]
        assert_close(scores.logits[row], alone)
    alone = scores_of(architecture, branching.token_ids, draft, 32, list(range(4)))
    assert_close(scores.logits[1:17], alone)


def test_every_proved_architecture_is_here() -> None:
    assert set(ARCHITECTURES) == set(PROVED)


def scrambled(architecture: str, changes: dict[str, Any], attention: str) -> torch.nn.Module:
    """A random model whose norms and biases show; in the reference the experts run as a plain loop."""
    experts = {"experts_implementation": "eager"} if attention == "eager" else {}
    config = make_config(architecture, **{**LIVELY.get(architecture, {}), **changes, **experts})
    check_architecture(config)
    model = make_model(config, attention=attention)
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data += 0.3 * torch.randn_like(parameter)
    return model


def runner_over(model: torch.nn.Module, config: Any) -> ModelRunner:
    cpu = torch.device("cpu")
    return ModelRunner(model, PagedKV(kv_shape(config, torch.float32), 16, 16, cpu), cpu)


@pytest.mark.parametrize("variant", VARIANTS)
def test_options_of_a_config(variant: str) -> None:
    """A chunk, then a tree: each node scores like its path in plain `transformers`."""
    architecture, changes = VARIANTS[variant]
    model = scrambled(architecture, changes, "paceline")
    eager = scrambled(architecture, changes, "eager")
    tokens, draft = list(prompt_of(50)), random_tree(12, seed=3)
    logits = scores_with(runner_over(model, model.config), tokens, draft, 37, list(range(5)))
    for node in range(-1, len(draft)):
        path = np.flatnonzero(draft.ancestor_mask()[node]) if node >= 0 else []
        with torch.inference_mode():
            whole = eager(torch.tensor([tokens + draft.tokens[path].tolist()]), use_cache=False).logits[0]
        assert_close(logits[node + 1], whole[-1])


@pytest.mark.parametrize("architecture", ["qwen2_moe", "qwen3_moe"])
def test_crowded_experts_drop_no_token(architecture: str) -> None:
    """Every token of a batch goes to one of two sets of experts, and each scores as it does alone."""
    model = scrambled(architecture, {}, "paceline")
    assert model.config._experts_implementation == "grouped_mm"
    for name, weight in model.named_parameters():
        if name.endswith("mlp.gate.weight"):
            weight.data = torch.linspace(1, -1, len(weight))[:, None] * weight.data[0]
    runner = runner_over(model, model.config)
    requests = [make_request(prompt_of(n, seed=7)) for n in (64, 32, 32, 16)]
    tables = iter(range(16))
    for request in requests:
        request.blocks = [next(tables) for _ in range(len(request.token_ids) // 16)]
    together = Verifier(runner).verify(batch_of(*requests), DraftBatch((EMPTY_TREE,) * 4)).logits
    for row, request in enumerate(requests):
        alone = runner_over(model, model.config)
        for i in range(len(request.token_ids)):  # one token a forward: nothing competes for an expert
            request.num_computed = i
            single = Verifier(alone).verify(batch_of(request, chunk=1), DraftBatch((EMPTY_TREE,))).logits
        assert_close(together[row], single[-1])


LONGROPE = {**ARCHITECTURES["phi3"]["rope_parameters"], "original_max_position_embeddings": 48}


@pytest.mark.parametrize(
    ("architecture", "changes"),
    [
        ("gpt2", {"max_position_embeddings": 48}),
        ("opt", {"max_position_embeddings": 48}),
        ("phi3", {"original_max_position_embeddings": 48, "rope_parameters": LONGROPE}),
    ],
)
@pytest.mark.parametrize("speculation", ["none", "recycling:k=24", "prediction:k=12", "auto"])
def test_up_to_the_last_position(architecture: str, changes: dict[str, Any], speculation: str) -> None:
    """Drafts never reach behind the table of positions, nor where longrope would turn all angles."""
    config = make_config(architecture, **changes)
    assert max_positions(config) == 48
    loaded = dataclasses.replace(make_loaded(architecture, **changes), max_model_len=48)
    eager = make_model(config, attention="eager")
    prompts = [prompt_of(n) for n in (9, 20, 41, 47)]
    with torch.inference_mode():
        wanted = [
            eager.generate(torch.tensor([p]), max_length=48, do_sample=False, eos_token_id=None, pad_token_id=0)
            for p in prompts
        ]
    outputs = [tuple(w[0, len(p) :].tolist()) for p, w in zip(prompts, wanted, strict=True)]
    engine = make_llm(loaded, speculation=speculation)
    for _ in range(2):
        params = [greedy(100, prediction=" ".join(f"w{t}" for t in (*output, *range(3, 30)))) for output in outputs]
        assert [g.token_ids for g in engine.generate(prompts, params)] == outputs
