"""Drafting from the target itself: paths of layers, views of the context, and what they leave behind (nothing)."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from engine_tools import TOKEN_BYTES, greedy, llm, loaded, prompt_of
from fakes import make_config, make_llm, make_loaded, make_model

from paceline import LLM
from paceline.cache.paged_kv import PagedKV
from paceline.draft.kv_budget import Budgets, Choice, worth
from paceline.draft.kv_views import QueryBlocks, RandomBlocks, SinkWindow
from paceline.draft.layers import parse_layers
from paceline.draft.magicdec import MagicDecDrafter
from paceline.engine import layer_search
from paceline.engine.layer_search import search
from paceline.engine.request import Request
from paceline.errors import ConfigError, SpeculationSpecError
from paceline.model import partial
from paceline.model.partial import PartialModel
from paceline.model.path import ForwardPath
from paceline.model.runner import ForwardBatch, ModelRunner, SequenceInput, kv_shape

FAMILIES = ("llama", "qwen2", "qwen3")
CPU = torch.device("cpu")
TOKENS = list(range(3, 24))


def runner_of(architecture: str = "llama", **changes: int) -> ModelRunner:
    made = make_loaded(architecture, **changes)
    return ModelRunner(made.model, PagedKV(kv_shape(made.config, torch.float32), 8, 16, CPU), CPU)


def logits(runner: ModelRunner, path: ForwardPath | None = None) -> torch.Tensor:
    sequence = SequenceInput(TOKENS, np.arange(len(TOKENS)), 0, [5, 2])
    return runner.forward(ForwardBatch((sequence,), range(len(TOKENS)), path)).clone()


# Paths


@pytest.mark.parametrize("architecture", FAMILIES)
def test_a_whole_path_is_the_model_itself(architecture: str) -> None:
    runner = runner_of(architecture)
    whole = logits(runner)
    assert torch.equal(logits(runner, ForwardPath.without(3, ())), whole)
    assert torch.equal(logits(runner, ForwardPath.in_groups(3, 1)), whole)
    assert not torch.equal(logits(runner, ForwardPath.without(3, [1])), whole)
    assert torch.equal(logits(runner), whole), "a path leaves the model as it was"


@pytest.mark.parametrize("architecture", FAMILIES)
def test_skipping_is_a_model_with_fewer_layers(architecture: str) -> None:
    runner = runner_of(architecture, num_hidden_layers=4)
    short = runner_of(architecture, num_hidden_layers=4)
    layers = short.model.model.layers
    short.model.model.layers = torch.nn.ModuleList([layers[0], layers[3]])
    assert torch.equal(logits(runner, ForwardPath.without(4, [1, 2])), logits(short))


@pytest.mark.parametrize("architecture", FAMILIES)
def test_a_group_as_one_product_is_the_group_layer_by_layer(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = runner_of(architecture, num_hidden_layers=6)
    for layer in runner.model.model.layers:
        layer.input_layernorm.weight.data.uniform_(0.5, 1.5)
    together = logits(runner, ForwardPath.in_groups(6, 2))
    monkeypatch.setattr(partial, "_stacked", lambda _: None)
    runner._partial = PartialModel(runner.model)
    apart = logits(runner, ForwardPath.in_groups(6, 2))
    torch.testing.assert_close(together, apart, rtol=1e-4, atol=1e-4)
    assert (together - logits(runner)).abs().max() > 0.01


def test_groups_keep_the_ends_alone() -> None:
    assert ForwardPath.in_groups(8, 4).groups == ((0,), (1, 2, 3, 4), (5, 6), (7,))
    assert ForwardPath.in_groups(2, 4).groups == ((0,), (1,))
    assert ForwardPath.in_groups(1, 4).groups == ((0,),)


@pytest.mark.parametrize(("skipped", "message"), [([3], "no layer 3"), ([0, 1, 2], "every layer")])
def test_impossible_paths_are_refused(skipped: list[int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ForwardPath.without(3, skipped)


# Views


def test_sinks_and_the_latest_blocks() -> None:
    view = SinkWindow(budget=64, block_size=16, sinks=20)
    request = llm_request()
    assert view.chosen(request, 4) is None, "all of it fits"
    assert view.chosen(request, 9) == [0, 1, 7, 8]


def test_random_blocks_fill_the_budget() -> None:
    view = RandomBlocks(budget=48, block_size=16)
    draws = [view.chosen(llm_request(), 40) for _ in range(20)]
    assert all(draw is not None and len(set(draw)) == 3 and sorted(draw) == draw for draw in draws)
    assert len({tuple(draw or ()) for draw in draws}) > 10


def test_attention_by_block_is_what_the_tokens_pay() -> None:
    """Against softmax weights of the eager model, summed over layers, heads and the tokens that ask."""
    made = make_loaded("llama")
    runner = ModelRunner(made.model, PagedKV(kv_shape(made.config, torch.float32), 8, 16, CPU), CPU)
    logits(runner)
    before = runner.kv.slots.clone()
    asking = SequenceInput(TOKENS[15:], np.arange(15, len(TOKENS)), 15, [5, 2])
    found = runner.attention_to_blocks(asking)
    assert torch.equal(runner.kv.slots, before), "nothing may be written"
    eager = make_model(make_config("llama"), 0, "eager")
    with torch.inference_mode():
        attentions = eager(torch.tensor([TOKENS]), output_attentions=True).attentions
    weights = torch.stack(attentions)[:, 0, :, 15:].sum(dim=(0, 1, 2))
    np.testing.assert_allclose(found, [weights[:16].sum(), weights[16:].sum()], rtol=1e-4)


def llm_request() -> Request:
    return Request("a", [1, 2, 3], 3, greedy(), 0)


def test_more_room_comes_behind_the_view() -> None:
    """What a round adds to its room are blocks of the request, so that commit gives them back."""
    engine = llm("magicdec:k=3,budget=48").engine
    blocks, drafter = engine.stages.scheduler.blocks, engine.stages.drafting.drafters["magicdec"]
    assert isinstance(drafter, MagicDecDrafter)
    request = Request("a", list(prompt_of(160)), 160, greedy(), 0)
    assert blocks.grow(request.blocks, 160)
    request.num_computed = 159
    scratch = drafter.model.open(request, 4)
    assert scratch is not None
    assert scratch.sequence.table == [request.blocks[0], *request.blocks[7:]]
    before = len(request.blocks)
    assert drafter.model.make_room(scratch, 40)
    assert len(request.blocks) == before + 2
    assert scratch.sequence.table[-2:] == request.blocks[-2:]
    blocks.release(request.blocks)


# Drafters

LONG = prompt_of(150)
SPECS = (
    "magicdec:k=3,budget=48",
    "magicdec:k=3,budget=48,select=query",
    "magicdec:k=3,budget=48,select=random",
    "magicdec:k=3,budget=48,sinks=0",
    "layerskip:k=3,skip=1",
    "s3d:k=3,ends=1",
)


@pytest.fixture(scope="module")
def plain() -> list[tuple[int, ...]]:
    return [g.token_ids for g in llm().generate(_prompts(), greedy(40))]


def _prompts() -> list[list[int]]:
    return [list(LONG), list(prompt_of(90, 1)), list(prompt_of(20, 2))]


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("rule", ["coupled", "rejection"])
def test_greedy_text_is_the_same(spec: str, rule: str, plain: list[tuple[int, ...]]) -> None:
    engine = llm(spec, rule=rule)
    found = engine.generate(_prompts(), greedy(40))
    assert [g.token_ids for g in found] == plain
    assert sum(g.stats.draft_tokens for g in found) > 0
    engine.close()  # asserts that no block is lost


def test_a_view_of_everything_always_agrees() -> None:
    """A budget beyond the context drafts with the target itself."""
    found = llm("magicdec:k=3,budget=512").generate([list(LONG)], greedy(40))[0]
    assert found.stats.accepted_tokens == found.stats.draft_tokens > 0
    assert found.stats.mean_accepted_length == pytest.approx(4.0, abs=0.4)


def test_more_of_the_context_is_accepted_more_often() -> None:
    shares = []
    for budget in (32, 96, 512):
        made = llm(f"magicdec:k=3,budget={budget}").generate([list(prompt_of(300, i)) for i in range(6)], greedy(24))
        shares.append(sum(g.stats.accepted_tokens for g in made) / sum(g.stats.draft_tokens for g in made))
    assert all(a <= b + 0.02 for a, b in pairwise(shares))
    assert shares[0] < shares[-1] == 1.0


@pytest.mark.parametrize("spec", SPECS[:2])
def test_drafts_leave_no_trace_in_the_cache(spec: str) -> None:
    """What later requests find in the prefix cache is what plain decoding leaves there."""
    engine, clean = llm(spec), llm()
    first = engine.generate([list(LONG)], greedy(40))[0]
    clean.generate([list(LONG)], greedy(40))
    again = [*LONG, *first.token_ids, 7, 9]
    a = engine.generate([again], greedy(8, prompt_logprobs=None))[0]
    b = clean.generate([again], greedy(8, prompt_logprobs=None))[0]
    assert a.token_ids == b.token_ids
    assert a.stats.cached_tokens == b.stats.cached_tokens > len(LONG)


def test_no_room_for_drafts_is_no_error(plain: list[tuple[int, ...]]) -> None:
    """A cache that holds the requests and hardly more; some are preempted."""
    engine = llm("magicdec:k=8,budget=48", kv_cache_memory=TOKEN_BYTES * 16 * 14, max_model_len=224)
    assert [g.token_ids for g in engine.generate(_prompts(), greedy(40))] == plain
    engine.close()


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("magicdec:k=3,budget=16", "leaves no room beside 16"),
        ("magicdec:k=3,budget=32,select=query", "Give budget=48 or more"),
        ("magicdec:k=3,budget=8,select=random", "leaves no room"),
        ("magicdec:k=3,budget=48,sinks=-1", "is negative"),
        ("magicdec:k=3,budget=48,select=best", "select='best' is not known"),
        ("layerskip:k=3,skip=7", "no layer 7"),
        ("layerskip:k=3,skip=2-1", "empty range"),
        ("layerskip:k=3,skip=0-2", "every layer"),
        ("s3d:k=3,ends=0", "leaves no layer"),
        ("s3d:k=3,mask=5000", "no token"),
    ],
)
def test_bad_options_are_refused(spec: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        llm(spec)


@pytest.mark.parametrize("block_size", [1, 64, 256])
def test_auto_starts_with_any_size_of_blocks(block_size: int) -> None:
    found = llm("auto", block_size=block_size, max_model_len=512).generate([list(LONG)], greedy(4))[0]
    assert found.token_ids == llm().generate([list(LONG)], greedy(4))[0].token_ids


def test_windows_and_other_families_are_refused() -> None:
    with pytest.raises(SpeculationSpecError, match="sliding windows"):
        make_llm(loaded("mistral"), speculation="magicdec:k=3,budget=48")
    with pytest.raises(ConfigError, match="gpt2"):
        make_llm(loaded("gpt2"), speculation="layerskip:k=3,skip=1")


def test_layers_are_read() -> None:
    assert parse_layers("3") == (3,)
    assert parse_layers("3-5, 8") == (3, 4, 5, 8)


# Choices


def test_the_search_finds_the_layer_that_does_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    # Forwards of six layers of nothing differ by less than what else the machine does.
    monkeypatch.setattr(layer_search._Trial, "seconds", lambda _, skipped: 1.0 - 0.1 * len(skipped))
    made = make_loaded("llama", num_hidden_layers=6)
    idle = made.model.model.layers[3]
    for module in (idle.self_attn.o_proj, idle.mlp.down_proj):
        module.weight.data.zero_()
    idle = made.model.model.layers[2]
    for module in (idle.self_attn.o_proj, idle.mlp.down_proj):
        module.weight.data.zero_()
    engine = LLM(made, max_model_len=128).engine
    seen: list[tuple[int, int]] = []
    blocks = engine.stages.scheduler.blocks
    found = search(engine.runner, blocks, list(prompt_of(60)), lambda *progress: seen.append(progress))
    assert set(found) >= {2, 3}
    assert seen
    assert blocks.counts().used == 0


def test_the_cheaper_view_wins_when_it_is_as_good() -> None:
    cheap, dear = Choice("a", 80, 100, 0.1), Choice("b", 80, 100, 0.5)
    assert worth(cheap, 1.0, 8) > worth(dear, 1.0, 8)
    better = Choice("c", 99, 100, 0.12)
    assert worth(better, 1.0, 8) > worth(cheap, 1.0, 8)


def test_views_are_tried_and_then_the_best_is_kept() -> None:
    budgets = Budgets(("bad", "good", "middling"))
    rates = {0: (1, 0.2), 1: (3, 0.2), 2: (2, 0.2)}
    used = []
    for _ in range(400):
        number = budgets.choose([0, 1, 2], 1.0, 8)
        hits, seconds = rates[number]
        budgets.choices[number].learn_outcome(hits, 4)
        budgets.choices[number].learn_seconds(seconds)
        used.append(number)
    assert set(used[:60]) == {0, 1, 2}
    assert used[100:].count(1) > 0.9 * len(used[100:])
    assert set(used[100:]) == {0, 1, 2}, "the others are looked at now and then"


def test_magicdec_chooses_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("paceline.draft.magicdec._BUDGETS", (48, 64))
    engine = llm("magicdec:k=3")
    plain = llm().generate([list(prompt_of(300))], greedy(120))[0]
    assert engine.generate([list(prompt_of(300))], greedy(120))[0].token_ids == plain.token_ids
    drafter = engine.engine.stages.drafting.drafters["magicdec"]
    assert isinstance(drafter, MagicDecDrafter)
    assert any(name.startswith("recent 48") for name in drafter.report(llm_request()))


def test_query_blocks_hold_the_budget() -> None:
    runner = runner_of()
    view = QueryBlocks(64, runner, sinks=16)
    request = Request("a", list(TOKENS) * 5, 105, greedy(), 0)
    request.blocks, request.num_computed = list(range(7)), 104
    table = SequenceInput(request.token_ids[:104], np.arange(104), 0, request.blocks)
    runner.forward(ForwardBatch((table,), [0]))
    chosen = view.chosen(request, 6)
    assert chosen is not None
    assert len(chosen) == 4
    assert chosen[0] == 0
    assert chosen[-1] == 5
