"""RAPID's drafter: what it reads of a long prompt, that it drafts what the model says then, and what goes wrong."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from engine_tools import greedy, llm, loaded, make_blocks, make_request, make_runner, prompt_of, reference, run
from fakes import make_byte_tokenizer, make_config, make_model

from paceline import LLM, SamplingParams
from paceline.bench.systems.long_prompts import PASSAGES, long_prompts
from paceline.draft.base import DraftContext
from paceline.draft.rapid import RapidDrafter
from paceline.draft.retrieved import ReadingLimits, RetrievedText, question_of
from paceline.draft.retrievers import registry
from paceline.draft.retrievers.registry import create_retriever
from paceline.draft.shapes.chain import ChainShape
from paceline.engine.draft_tree import Origin
from paceline.errors import SpeculationSpecError
from paceline.model.gpu.weights import fuse_weights

LIMITS = ReadingLimits(start=4, chunk=8, budget=16, question=6)
OPTIONS = "start=4,chunk=8,budget=16,question=6"
LONG = prompt_of(90)


class Fixed:
    """Scores that are given; an exception is raised."""

    def __init__(self, *scores: float | Exception) -> None:
        self.given = scores
        self.calls = 0

    def scores(self, query: str, chunks: Sequence[str]) -> Any:  # noqa: ARG002
        """As many as there are chunks; 0 beyond those given."""
        self.calls += 1
        if isinstance(self.given[0], Exception):
            raise self.given[0]
        return np.array([*self.given, *[0.0] * len(chunks)][: len(chunks)])


def reading(retriever: Any) -> RetrievedText:
    return RetrievedText(retriever, loaded().tokenizer, LIMITS)


def rapid(retriever: Any, **options: Any) -> RapidDrafter:
    made = RapidDrafter(
        make_runner("llama", 64, 8),
        make_blocks(64, 8),
        tokenizer=loaded().tokenizer,
        start=LIMITS.start,
        chunk=LIMITS.chunk,
        budget=LIMITS.budget,
        question=LIMITS.question,
        vocab_size=96,
        coupled=True,
        shape=ChainShape(Origin.CHOSEN),
        **options,
    )
    made.reading.retriever = retriever
    return made


def swapped(engine: Any, retriever: Any) -> Any:
    """The engine, with another retriever in its drafter."""
    (drafter,) = [d for d in engine.stages.drafting.drafters.values() if isinstance(d, RapidDrafter)]
    drafter.reading.retriever = retriever
    return engine


# What is read


def test_it_reads_start_chunks_in_order_question_and_output() -> None:
    request = make_request(LONG)
    chunks = [LONG[4 + 8 * i : 12 + 8 * i] for i in range(10)]
    read = reading(Fixed(0.1, 0, 0, 0.9, 0, 0, 0, 0.5))
    short = [*LONG[:4], *chunks[3], *chunks[7], *LONG[-6:]]
    assert list(read.tokens(request)) == short
    request.token_ids += [5, 6]
    assert list(read.tokens(request)) == [*short, 5, 6]


def test_the_last_chunk_is_shorter_and_one_may_still_fit() -> None:
    """80 tokens between start and question, and 3 more: budget for two whole chunks, or one and the rest."""
    prompt = prompt_of(93)
    read = reading(Fixed(*[0.0] * 9, 0.4, 0.5))
    assert list(read.tokens(make_request(prompt))) == [*prompt[:4], *prompt[76:84], *prompt[84:87], *prompt[-6:]]


def test_ties_go_to_the_earlier_chunk() -> None:
    read = reading(Fixed(*[0.3] * 10))
    assert list(read.tokens(make_request(LONG))) == [*LONG[:20], *LONG[-6:]]


@pytest.mark.parametrize("length", [1, 5, 26])
def test_a_prompt_that_fits_is_read_whole(length: int) -> None:
    retriever = Fixed(1.0)
    request = make_request(prompt_of(length))
    read = reading(retriever)
    request.token_ids += [7] * 40
    assert read.tokens(request) is request.token_ids
    assert retriever.calls == 0


def test_nothing_found_leaves_start_and_question() -> None:
    assert list(reading(Fixed(0.0)).tokens(make_request(LONG))) == [*LONG[:4], *LONG[-6:]]


def test_it_is_chosen_once_for_a_prompt_and_forgotten() -> None:
    retriever = Fixed(1.0)
    read = reading(retriever)
    first = make_request(LONG)
    second = make_request(LONG, leader=first)
    assert list(read.tokens(first)) == list(read.tokens(first)) == list(read.tokens(second))
    assert retriever.calls == 1
    read.forget(first)
    read.tokens(first)
    assert retriever.calls == 2


@pytest.mark.parametrize(
    ("text", "question"),
    [
        ("the end of a document.\n\nWhat is the code of Velde?\nassistant\n", "What is the code of Velde?\nassistant"),
        ("What is the code?", "What is the code?"),
        ("Tell me about the canal of Velde.\n\nAnswer:", "Tell me about the canal of Velde.\n\nAnswer:"),
    ],
)
def test_the_question_is_the_last_paragraph(text: str, question: str) -> None:
    assert question_of(text) == question


def test_bm25_finds_the_chunk_that_the_question_is_about() -> None:
    towns = ["Aldburg", "Velde", "Merin", "Kallo"]
    chunks = [f"The gate of {town} opens with the code {4821 + i}. It is old." for i, town in enumerate(towns)]
    retriever = create_retriever("bm25")
    scores = retriever.scores("Which code opens the gate of Merin?", chunks)
    assert scores.shape == (4,)
    assert scores.argmax() == 2
    assert np.array_equal(retriever.scores("Which code opens the gate of Merin?", chunks), scores)


@pytest.mark.parametrize(("query", "chunks"), [("", ["a word"]), ("word", ["", "? !"]), ("none here", ["other text"])])
def test_bm25_without_a_common_word(query: str, chunks: list[str]) -> None:
    assert create_retriever("bm25").scores(query, chunks).tolist() == [0.0] * len(chunks)


def test_the_needle_is_read_from_text() -> None:
    """Bytes in, by the tokenizer: the sentence that answers the question is part of what is read."""
    tokenizer = make_byte_tokenizer()
    filler = " ".join(f"Item {i} stands on shelf {i * 7 % 31} of the hall." for i in range(60))
    needle = " The captain keeps the brass compass in drawer nineteen. "
    text = f"Read this.\n{filler[:1500]}{needle}{filler[1500:]}\n\nWhere does the captain keep the brass compass?"
    limits = ReadingLimits(start=12, chunk=120, budget=240, question=60)
    read = RetrievedText(create_retriever("bm25"), tokenizer, limits)
    request = make_request(tokenizer.encode(text))
    short = tokenizer.decode(list(read.tokens(request)))
    assert len(read.tokens(request)) < 320 < len(request.token_ids)
    assert "brass compass in drawer" in short
    assert short.startswith("Read this")
    assert short.endswith("brass compass?")


# What is drafted


def test_it_drafts_what_the_model_says_after_the_short_text() -> None:
    """By `transformers` on that text alone, so with its positions; round after round, as the output grows."""
    made = rapid(Fixed(0, 0.5, 0, 0.9))
    request = make_request(LONG)
    for _ in range(4):
        read = tuple(made.reading.tokens(request))
        (proposal,) = made.propose([DraftContext(request, 5)])
        assert tuple(proposal.tokens.tolist()) == reference(read, 5)
        request.token_ids += [*proposal.tokens[:2].tolist(), 50]
    made.forget(request)
    made.blocks.check()
    assert made.blocks.counts().used == 0


def test_draft_work_does_not_grow_with_the_prompt() -> None:
    took = []
    for length in (90, 400):
        made = rapid(Fixed(0.5, 0.9))
        made.propose([DraftContext(make_request(prompt_of(length)), 3)])
        took.append((made.model.runner.num_tokens, made.model.runner.num_forwards, made.blocks.counts().used))
    assert took[0] == took[1] == (4 + 16 + 6 + 2, 3, 4)


@pytest.mark.parametrize("rule", ["coupled", "rejection", "recursive", "multi"])
@pytest.mark.parametrize("tree", ["chain", "branching:widths=2/2", "best-first"])
def test_every_rule_and_tree(rule: str, tree: str) -> None:
    if (tree == "best-first" and rule != "coupled") or (tree != "chain" and rule == "rejection"):
        pytest.skip("the tree is refused under this rule")
    engine = llm(f"rapid:model=self,k=6,{OPTIONS}", rule=rule, tree=tree).engine
    requests = [make_request(prompt_of(n), greedy(12)) for n in (90, 30, 12)]
    run(engine, requests)
    assert [tuple(r.output_ids) for r in requests] == [reference(prompt_of(n), 12) for n in (90, 30, 12)]
    sampled = [make_request(prompt_of(n), SamplingParams(max_tokens=12, ignore_eos=True)) for n in (90, 30, 12)]
    run(engine, sampled)
    assert all(r.num_output == 12 for r in sampled)
    assert sum(r.stats.drafted_by.get("rapid", 0) for r in requests + sampled) > 0


def test_abort_and_preemption_give_everything_back() -> None:
    engine = llm(f"rapid:model=self,{OPTIONS}@auto", max_model_len=128, kv_cache_memory=64 << 10).engine
    requests = [make_request(prompt_of(60 + i), greedy(40)) for i in range(5)]
    for request in requests:
        engine.add(request)
    for _ in range(12):
        engine.step()
    engine.abort(requests[0].id)
    run(engine, requests, add=False)
    assert sum(r.stats.preemptions for r in requests) > 0
    for i, request in enumerate(requests[1:], start=1):
        assert tuple(request.output_ids) == reference(prompt_of(60 + i), 40)
    (blocks,) = engine.stages.drafting.block_managers()
    assert blocks.counts().used == 0


# What goes wrong


def test_a_retriever_that_fails_costs_drafts_only(caplog: pytest.LogCaptureFixture) -> None:
    engine = swapped(llm(f"rapid:model=self,k=3,{OPTIONS}").engine, Fixed(OSError("index lost")))
    requests = [make_request(prompt_of(90 + i), greedy(8)) for i in range(3)]
    with caplog.at_level(logging.WARNING):
        run(engine, requests)
    assert [tuple(r.output_ids) for r in requests] == [reference(prompt_of(90 + i), 8) for i in range(3)]
    assert [r.message for r in caplog.records] == ["retrieval failed; drafts go without it: index lost"]
    assert sum(r.stats.draft_tokens for r in requests) > 0
    assert set(engine.stages.drafting.drafters) == {"rapid"}


def test_under_a_transform_the_same_is_an_error_of_that_request() -> None:
    """Another law would be sampled otherwise. Who needs no retrieval runs on, and so does who comes later."""
    engine = llm(f"rapid:model=self,k=3,{OPTIONS},transfer=5").engine
    failing = Fixed(OSError("index lost"))
    long, short = make_request(LONG, greedy(8)), make_request(prompt_of(20), greedy(8))
    news = run(swapped(engine, failing), [long, short])
    assert news[long.id][-1].finish_reason == "error"
    assert "retrieval failed, and without it rapid:transfer=5 has no law: index lost" in str(news[long.id][-1].error)
    assert long.output_ids == []
    assert short.num_output == 8
    again = make_request(LONG, greedy(8))
    run(swapped(engine, Fixed(1.0)), [again])
    assert again.num_output == 8
    assert again.stats.target_transform == "rapid:transfer=5"


def test_a_draft_model_that_reads_too_little_ends_the_request_clearly() -> None:
    engine = swapped(llm(f"rapid:model=self,k=2,{OPTIONS},transfer=5").engine, Fixed(0.5, 0.9))
    (drafter,) = engine.stages.drafting.drafters.values()
    assert isinstance(drafter, RapidDrafter)
    drafter.model.max_model_len = 40
    long, short = make_request(LONG, greedy(30)), make_request(prompt_of(12), greedy(8))
    news = run(engine, [long, short])
    last = news[long.id][-1]
    assert last.finish_reason == "error"
    assert last.error_field == "prompt"
    assert "of the draft model of rapid:transfer=5, which reads 40" in str(last.error)
    assert 0 < long.num_output < 30
    assert short.num_output == 8


def test_the_declared_targets_end_does_not_move_with_anybodys_draft() -> None:
    """Another drafter's nodes near the end of what the draft model reads are cut, and no token is lost for them."""
    counts = []
    for spec in ("k=1", "k=1+recycling:k=8"):
        engine = swapped(llm(f"rapid:model=self,{OPTIONS},transfer=5,{spec}").engine, Fixed(0.5, 0.9))
        drafter = engine.stages.drafting.drafters["rapid"]
        assert isinstance(drafter, RapidDrafter)
        drafter.model.max_model_len = 40
        request = make_request(LONG, greedy(30))
        run(engine, [request])
        counts.append((request.num_output, request.output_ids))
    assert counts[0] == counts[1]
    assert counts[0][0] > 4


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "find_spec", lambda _: None)
    for name, package in (("bm25", "bm25s"), ("embeddings", "sentence-transformers")):
        with pytest.raises(SpeculationSpecError, match=f"needs the package {package}.*pip install {package}"):
            llm(f"rapid:model=self,retriever={name}")
    with pytest.raises(SpeculationSpecError, match="needs the package bm25s"):
        llm("rapid:model=self")


@pytest.mark.skipif(find_spec("sentence_transformers") is None, reason="sentence-transformers is not installed")
def test_embeddings_of_an_unknown_model_are_refused() -> None:
    with pytest.raises(SpeculationSpecError, match="cannot be loaded"):
        create_retriever("embeddings", embedder="/no/such/folder")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("retriever=magic", "nothing called 'magic' can retrieve"),
        ("embedder=x", "has no use for it"),
        ("chunk=0", "is no number of tokens"),
        ("start=0", "is no number of tokens"),
        ("question=-2", "is no number of tokens"),
        ("chunk=64,budget=32", "holds no chunk"),
        ("transfer=-1", "is no strength"),
        ("transfer=nan", "is no strength"),
        ("transfer=much", "is not a number"),
        ("chunk=1.5", "is not a whole number"),
        ("vocab=9", "cannot be cut"),
    ],
)
def test_bad_options_are_refused(options: str, message: str) -> None:
    with pytest.raises(SpeculationSpecError, match=message):
        llm(f"rapid:model=self,{options}")


def test_a_model_is_needed() -> None:
    with pytest.raises(SpeculationSpecError, match="rapid needs a model"):
        llm("rapid:k=4")


def test_self_shares_the_targets_weights() -> None:
    made: LLM = llm("rapid:model=self")
    (drafter,) = made.engine.stages.drafting.drafters.values()
    assert isinstance(drafter, RapidDrafter)
    assert drafter.model.runner.model is made.engine.runner.model
    assert drafter.model.runner.kv is not made.engine.runner.kv


def test_two_runners_of_one_model_share_fused_weights() -> None:
    """What a GPU's runner fuses, the second runner of `model=self` finds; other weights are not taken for fused."""
    model = make_model(make_config("llama"))
    first, second = (fuse_weights(model, 8).layers for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert (a.qkv.data_ptr(), a.gate_up.data_ptr()) == (b.qkv.data_ptr(), b.gate_up.data_ptr())
        assert torch.equal(a.qkv, b.qkv)
        assert torch.equal(a.gate_up, b.gate_up)
    layer = model.model.layers[0].self_attn
    layer.k_proj.weight = torch.nn.Parameter(layer.k_proj.weight.clone())
    again = fuse_weights(model, 8).layers[0].qkv
    assert again.data_ptr() != first[0].qkv.data_ptr()
    assert torch.equal(again, first[0].qkv)


# What it is measured on


def test_long_prompts_hide_every_passage_once_and_share_their_text() -> None:
    llm: Any = SimpleNamespace(tokenizer=make_byte_tokenizer())
    prompts = long_prompts(llm, 9000, 4)
    texts = [llm.tokenizer.decode(p) for p in prompts]
    assert all(text.count(passage.text) == 1 for text in texts for passage in PASSAGES)
    assert all(text.endswith(passage.question) for text, passage in zip(texts, PASSAGES[::3], strict=True))
    assert len({text.rpartition("Question:")[0] for text in texts}) == 1
    assert all(8000 < len(p) < 9500 for p in prompts)
