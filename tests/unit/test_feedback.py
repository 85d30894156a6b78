"""What a step tells the next plan and the drafters, and that a run's counters add up."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from engine_tools import batch_of, greedy, llm, make_request, prompt_of, reference, run, tree

from paceline.engine.draft_tree import EMPTY_TREE, DraftTree
from paceline.engine.feedback import node_labels, observations, step_stats
from paceline.engine.types import (
    Acceptance,
    AcceptedStep,
    DraftBatch,
    InFlight,
    NodeLabels,
    SpecPlan,
    StepStats,
    TargetScores,
    Walk,
)
from paceline.outputs import generation_stats

PROMPTS = [prompt_of(n) for n in (3, 18, 33, 12)]
NEW = 17


ACCEPTANCE = {name: np.full((2, 5), 0.5) for name in ("a", "b", "ngram", "idle")}


def rows_of(found: NodeLabels) -> list[tuple[str, int, bool]]:
    rows = zip(found.drafter.tolist(), found.key.tolist(), found.accepted.tolist(), strict=True)
    return [(found.names[drafter], key, accepted) for drafter, key, accepted in rows]


def labels(draft: DraftTree, committed: list[int]) -> list[tuple[str, int, bool]]:
    return rows_of(node_labels([(0, draft, committed)], ACCEPTANCE))


def test_a_chain_is_labelled_up_to_its_first_miss() -> None:
    chain = tree([5, 6, 7, 8], [-1, 0, 1, 2], key=np.array([0, 1, 2, 3]))
    assert labels(chain, [5, 6, 9]) == [("ngram", 0, True), ("ngram", 1, True), ("ngram", 2, False)]
    assert labels(chain, [4]) == [("ngram", 0, False)]
    assert labels(chain, [5, 6]) == [("ngram", 0, True), ("ngram", 1, True)], "beyond the committed nothing is known"
    assert labels(chain, [5, 6, 7, 8, 9]) == [("ngram", k, True) for k in range(4)]
    assert labels(EMPTY_TREE, [5]) == []


def test_siblings_are_labelled_on_the_committed_path_only() -> None:
    draft = tree(
        [5, 6, 7, 8, 6],
        [-1, -1, 0, 1, 1],
        key=np.arange(5),
        drafter=("a", "b", "a", "b", "a"),
    )
    assert labels(draft, [6, 8]) == [("a", 0, False), ("b", 1, True), ("b", 3, True), ("a", 4, False)]
    assert labels(draft, [5, 1]) == [("a", 0, True), ("b", 1, False), ("a", 2, False)]


def test_of_equal_siblings_only_the_first_is_accepted() -> None:
    """Draws with replacement repeat; what stands below the second was never verified as part of the text."""
    draft = tree([5, 6, 6, 6, 7, 7], [-1, -1, -1, -1, 1, 2], key=np.arange(6))
    expected = [("ngram", 0, False), ("ngram", 1, True), ("ngram", 2, False), ("ngram", 3, False), ("ngram", 4, True)]
    assert labels(draft, [6, 7, 8]) == expected


def test_labels_say_where_they_come_from() -> None:
    """Depth, request and the plan's own estimate, for shared nodes as well; a drafter without nodes has no label."""
    draft = tree([5, 6], [-1, 0], key=np.array([1, 2]), drafter=("a", "b"), shared=((0, "b", 4),))
    acceptance = {name: rng.random((3, 5)) for rng, name in zip(np.random.default_rng(0).spawn(3), "abc", strict=True)}
    found = node_labels([(2, draft, [5, 7]), (1, EMPTY_TREE, [5]), (0, draft, [6])], acceptance)
    assert rows_of(found) == [("a", 1, True), ("b", 2, False), ("b", 4, True), ("a", 1, False), ("b", 4, False)]
    assert found.depth.tolist() == [1, 2, 1, 1, 1]
    assert found.request.tolist() == [0, 0, 0, 2, 2], "rows of those that committed"
    a, b = acceptance["a"], acceptance["b"]
    assert found.predicted.tolist() == [a[2, 1], b[2, 2], b[2, 4], a[0, 1], b[0, 4]], "rows of the plan"
    assert len(node_labels([], acceptance)) == len(node_labels([], {})) == 0


def in_flight(drafted: DraftBatch, verified: DraftBatch, walks: list[Walk | None], logits: np.ndarray) -> AcceptedStep:
    requests = [make_request([*range(3, 9)]) for _ in walks]
    for request in requests:
        request.num_computed = 5
    first, row = [], 0
    for t in verified.trees:
        first.append(row)
        row += 1 + len(t)
    return AcceptedStep(
        batch=batch_of(*requests),
        plan=SpecPlan(np.full(len(walks), 4), ("ngram",), 8, ACCEPTANCE),
        drafted=drafted,
        verified=verified,
        scores=TargetScores(torch.from_numpy(logits), tuple(first)),
        acceptance=Acceptance(tuple(walks), {}),
        started=0.0,
        forward_seconds=0.5,
    )


def test_trimmed_nodes_are_labelled_too() -> None:
    """The plan kept one node of three; the bonus token still tells that the second was right as well."""
    whole = tree([5, 6, 7], [-1, 0, 1], key=np.arange(3))
    drafted = DraftBatch((whole, whole), {"ngram": 0.2, "idle": 0.1})
    verified = DraftBatch((whole.keep(np.arange(1)), EMPTY_TREE), slot_price=0.7)
    walks = [Walk((0,), (5, 6)), Walk((), (9,))]
    step = in_flight(drafted, verified, walks, np.zeros((3, 96), dtype=np.float32))
    stats = step_stats(step, 1.5, {"ngram": 0.05, "never asked": 9.0})
    assert rows_of(stats.labels) == [("ngram", 0, True), ("ngram", 1, True), ("ngram", 0, False)]
    assert stats.labels.request.tolist() == [0, 0, 1]
    assert (stats.committed.tolist(), stats.verified.tolist()) == ([2, 1], [1, 0])
    assert (stats.num_draft_nodes, stats.num_committed, stats.num_sampling) == (1, 3, 2)
    assert (stats.num_prompt_tokens, stats.num_sequences, stats.num_context_tokens) == (0, 2, 12)
    assert stats.slot_price == 0.7
    assert stats.gains == {"ngram": pytest.approx(0.9), "idle": 0.0}, "of verified nodes only"
    assert stats.nodes["idle"] == 0
    assert sum(stats.nodes.values()) == stats.num_draft_nodes
    assert (stats.forward_seconds, stats.step_seconds) == (0.5, 1.5)
    assert stats.draft_depths == {"ngram": 3, "idle": 0}
    assert stats.draft_seconds == {"ngram": pytest.approx(0.25), "idle": 0.1}, "learning counts, for those asked"


def test_a_failed_request_teaches_nothing() -> None:
    whole = tree([5, 6], [-1, 0])
    drafts = DraftBatch((whole, whole), {"ngram": 0.1})
    step = in_flight(drafts, drafts, [None, Walk((0,), (5, 9))], np.zeros((6, 96), dtype=np.float32))
    stats = step_stats(step, 1.0, {})
    assert stats.labels.accepted.tolist() == [True, False]
    assert stats.labels.request.tolist() == [0, 0]
    assert stats.requests == (step.batch.sampling[1].request,)
    assert (stats.committed.tolist(), stats.verified.tolist()) == ([2], [2])
    assert len(list(observations(step, want_top_ids=True))) == 1


def test_observations_pair_rows_with_their_input_tokens() -> None:
    """Row i of the top ids belongs to the root or node whose token stands at i."""
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(5, 96)).astype(np.float32)
    drafts = DraftBatch((tree([5, 6], [-1, -1]), tree([7], [-1])))
    step = in_flight(drafts, drafts, [Walk((1,), (6, 1)), Walk((), (9,))], logits)
    first, second = observations(step, want_top_ids=True)
    assert first.row_tokens.tolist() == [8, 5, 6], "the root is the last committed token"
    assert second.row_tokens.tolist() == [8, 7]
    assert (first.committed, second.committed) == ((6, 1), (9,))
    best = np.argsort(-logits, axis=1)[:, :8]
    assert first.top_ids is not None
    assert second.top_ids is not None
    assert np.array_equal(first.top_ids, best[:3])
    assert np.array_equal(second.top_ids, best[3:])
    assert all(o.top_ids is None for o in observations(step, want_top_ids=False))


@pytest.mark.parametrize(
    ("rows", "vocab", "k"), [(3, 96, 8), (4, 64 * 64, 8), (2, 64 * 40, 8), (2, 1000, 3), (1, 5, 8)]
)
def test_top_ids_equal_a_full_sort(rows: int, vocab: int, k: int) -> None:
    logits = torch.from_numpy(np.random.default_rng(vocab).permutation(rows * vocab).astype(np.float32))
    logits = logits.view(rows, vocab)
    found = TargetScores(logits, (0,)).top_ids(0, rows, k)
    assert np.array_equal(found, logits.sort(dim=1, descending=True).indices[:, :k].numpy())


SPECULATION = ["none", "ngram:k=4", "recycling:k=20", "prediction:k=5+recycling:k=20", "auto"]


@pytest.mark.parametrize("speculation", SPECULATION)
@pytest.mark.parametrize("chunk", [512, 10])
def test_the_counters_of_a_run_add_up(speculation: str, chunk: int) -> None:
    engine = llm(speculation, max_num_batched_tokens=chunk).engine
    steps: list[StepStats] = []
    requests = [make_request(p, greedy(NEW), prediction_ids=reference(p, NEW)[:9]) for p in PROMPTS]
    verified: dict[str, list[tuple[int, int, int]]] = {r.id: [] for r in requests}  # nodes, path, committed
    accept = engine.accept

    def spy(launched: InFlight) -> AcceptedStep:
        step = accept(launched)
        for item, t, walk in zip(step.batch.sampling, step.verified.trees, step.acceptance.walks, strict=True):
            assert walk is not None
            verified[item.request.id].append((len(t), len(walk.path), len(walk.tokens)))
        return step

    engine.accept = spy
    for request in requests:
        engine.add(request)
    while engine.has_work:
        engine.step()
        assert engine.last_stats is not None
        steps.append(engine.last_stats)
    for request in requests:
        counted, seen = request.stats, verified[request.id]
        assert counted.target_forwards == len(seen)
        assert counted.draft_tokens == sum(nodes for nodes, _, _ in seen)
        assert sum(counted.accepted_by.values()) == counted.accepted_tokens <= counted.draft_tokens
        walked = sum(tokens for _, _, tokens in seen)
        assert walked == sum(path for _, path, _ in seen) + len(seen)
        cut = walked - NEW  # committed by the last walk beyond max_tokens
        assert 0 <= cut < seen[-1][2]
        truncated = counted.accepted_tokens + counted.target_forwards - NEW
        assert truncated in (0, 1), "either all of the last walk counts, or it ended on an accepted token"
        assert (truncated == 1) == (cut >= 1)
        found = generation_stats(request)
        assert found.mean_accepted_length == pytest.approx(NEW / counted.target_forwards)
        if speculation == "none":
            assert found.mean_accepted_length == 1.0
            assert (counted.draft_tokens, counted.accepted_tokens, counted.accepted_by) == (0, 0, {})
        if "prediction" in speculation:
            assert counted.accepted_by["prediction"] >= 6
            assert counted.target_forwards <= NEW - 6
        assert 0 < found.ttft_seconds <= found.seconds
        assert found.tokens_per_second > 0
    assert sum(s.num_draft_nodes for s in steps) == sum(r.stats.draft_tokens for r in requests)
    assert sum(s.num_sampling for s in steps) == sum(r.stats.target_forwards for r in requests)
    assert sum(s.num_committed for s in steps) >= NEW * len(requests)
    assert all(s.num_sampling + s.num_prompt_tokens <= chunk for s in steps)
    assert sum(s.num_prompt_tokens for s in steps) == sum(len(p) for p in PROMPTS) - len(PROMPTS)
    assert all(len(s.committed) == len(s.verified) == s.num_sampling <= s.num_sequences for s in steps)
    assert all(s.forward_seconds <= s.step_seconds for s in steps)


def test_drafts_accepted_behind_a_stop_do_not_count() -> None:
    """All eight predicted tokens are right, and the fourth ends the text: four are committed and counted."""
    prompt = PROMPTS[1]
    output = reference(prompt, 8)
    stop = output[3]
    assert output.index(stop) == 3
    request = make_request(prompt, greedy(NEW, stop_token_ids=(stop,)), prediction_ids=output)
    engine = llm("prediction:k=8").engine
    run(engine, [request])
    assert tuple(request.output_ids) == output[:4]
    assert request.stats.target_forwards == 1
    assert request.stats.accepted_by == {"prediction": 4}
    assert request.stats.accepted_tokens == 4
    assert request.stats.draft_tokens == 8


@pytest.mark.parametrize("speculation", ["ngram:k=4", "prediction:k=5+recycling:k=20"])
def test_streamed_tokens_name_their_drafter(speculation: str) -> None:
    engine = llm(speculation).engine
    requests = [make_request(p, greedy(NEW), prediction_ids=reference(p, NEW)[:9]) for p in PROMPTS]
    news = run(engine, requests)
    for request in requests:
        named = [name for item in news[request.id] for name in item.drafters]
        assert len(named) == NEW
        counted = {name: named.count(name) for name in set(named) - {None}}
        assert counted == request.stats.accepted_by
