"""The drafters that read tokens: each against a slow reference, and what they must never propose or share."""

from __future__ import annotations

import numpy as np
import pytest
from engine_tools import greedy, llm, make_request, prompt_of, reference, run

from paceline.draft.base import DraftContext, Proposal, chain
from paceline.draft.drafting import Drafting
from paceline.draft.ngram import LENGTH_CLASSES, NO_MATCH, Match, NgramDrafter, NgramIndex, follow_back, length_class
from paceline.draft.prediction import PredictionDrafter
from paceline.draft.recycling import LEVEL_SIZES, RecyclingDrafter, chain_template, static_template
from paceline.engine.request import Request
from paceline.engine.types import Observation
from paceline.errors import SpeculationSpecError


def propose(drafter: object, request: Request, budget: int = 8) -> Proposal:
    (proposal,) = drafter.propose([DraftContext(request, budget)])  # type: ignore[attr-defined]
    return proposal


# Prompt lookup


@pytest.mark.parametrize("bounds", [(1, 1), (1, 3), (2, 4), (3, 6)])
def test_ngram_index_equals_brute_force(bounds: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    index = NgramIndex(*bounds)
    tokens: list[int] = []
    found = 0
    precedents: set[int] = set()
    for _ in range(400):
        new = rng.integers(0, 5, int(rng.integers(1, 4))).tolist()
        tokens += new
        index.extend(new)
        expected = NO_MATCH
        for n in range(bounds[1], bounds[0] - 1, -1):
            ends = [e for e in range(n, len(tokens)) if tokens[e - n : e] == tokens[-n:]]
            if ends and n <= len(tokens):
                went_on = [tokens[e] for e in ends[-2:]]
                precedent = 0 if len(ends) == 1 else 1 if went_on[0] == went_on[1] else 2
                expected = Match(ends[-1], n, precedent)
                break
        assert index.find(tokens[-bounds[1] :]) == expected
        found += expected.length > 0
        precedents.add(expected.precedent)
        if expected.length:
            before, now = tokens[: expected.at][::-1], tokens[::-1]
            agree = next((i for i, (a, b) in enumerate(zip(before, now, strict=False)) if a != b), len(before))
            assert follow_back(tokens, expected) == min(agree, max(40, expected.length))
    assert found > 100
    assert precedents == {0, 1, 2}


def test_ngram_continues_after_the_last_occurrence() -> None:
    request = make_request([1, 2, 3, 4, 1, 2, 3, 5, 6, 7, 2, 3])
    drafter = NgramDrafter(lookup_max=3, lookup_min=2)
    proposal = propose(drafter, request)
    assert proposal.tokens.tolist() == [5, 6, 7, 2, 3], "the draft ends where the text does"
    assert proposal.parents.tolist() == [-1, 0, 1, 2, 3]
    contested = 2 * LENGTH_CLASSES
    assert proposal.key.tolist() == [contested + n for n in (2, 3, 4, 5, 6)], "4 came after the first 2, 3"
    assert propose(drafter, request, 2).tokens.tolist() == [5, 6]
    assert len(propose(drafter, request, 0)) == 0
    request.token_ids += [5, 6]  # committed: now a longer match
    assert propose(drafter, request, 2).tokens.tolist() == [7, 2]
    assert propose(drafter, request, 1).key.tolist() == [4], "2, 3, 5, 6 came once; three of them were looked up"


def test_ngram_confidence_says_whether_it_happened_before() -> None:
    drafter = NgramDrafter()
    assert propose(drafter, make_request([1, 2, 7, 1, 2])).key[0] == 2
    assert propose(drafter, make_request([1, 2, 7, 3, 1, 2, 7, 4, 1, 2])).key[0] == LENGTH_CLASSES + 2
    assert propose(drafter, make_request([1, 2, 6, 3, 1, 2, 7, 4, 1, 2])).key[0] == 2 * LENGTH_CLASSES + 2


def test_ngram_confidence_is_capped() -> None:
    proposal = propose(NgramDrafter(lookup_max=32, lookup_min=1), make_request([1, 2, 3] * 30), 60)
    assert proposal.key.max() == 2 * LENGTH_CLASSES - 1
    assert len(NgramDrafter().prior) == 3 * LENGTH_CLASSES
    assert 0 < NgramDrafter().prior.min() < NgramDrafter().prior.max() < 1
    classes = [length_class(n) for n in range(200)]
    assert classes == sorted(classes)
    assert classes[:11] == list(range(11))
    assert set(classes) == set(range(LENGTH_CLASSES))


@pytest.mark.parametrize("bounds", [(0, 2), (3, 2), (2, 33)])
def test_ngram_bounds_are_checked(bounds: tuple[int, int]) -> None:
    with pytest.raises(SpeculationSpecError):
        NgramDrafter(lookup_min=bounds[0], lookup_max=bounds[1])


def test_ngram_below_its_shortest_match_proposes_nothing() -> None:
    request = make_request([1, 2, 3, 9, 3])
    assert len(propose(NgramDrafter(lookup_min=2, lookup_max=4), request)) == 0
    assert propose(NgramDrafter(lookup_min=1, lookup_max=4), request).tokens.tolist() == [9, 3]


def test_ngram_requests_do_not_share() -> None:
    drafter = NgramDrafter()
    first = make_request([1, 2, 3, 1, 2])
    assert len(propose(drafter, first)) == 3
    assert len(propose(drafter, make_request([1, 2]))) == 0
    drafter.forget(first)
    assert drafter._indexes.keys().isdisjoint({first})


# A user-given prediction


def accepted_length(predicted: list[int], output: list[int], budget: int = 6) -> list[int]:
    """Accepted draft tokens per step when the target writes `output`."""
    drafter = PredictionDrafter()
    request = make_request([1], prediction_ids=tuple(predicted))
    accepted = []
    while request.num_output < len(output):
        rest = output[request.num_output :]
        drafted = propose(drafter, request, budget).tokens.tolist()
        assert len(drafted) <= budget
        hits = next((i for i, (a, b) in enumerate(zip(drafted, rest, strict=False)) if a != b), len(drafted))
        hits = min(hits, len(rest))
        accepted.append(hits)
        request.token_ids += rest[: hits + 1]
    return accepted


TEXT = list(range(10, 40))


def test_an_exact_prediction_is_accepted_to_the_end() -> None:
    assert accepted_length(TEXT, TEXT) == [6, 6, 6, 6, 2]


def test_the_cursor_survives_a_substitution() -> None:
    """One wrong token costs one step: the next draft starts right behind it."""
    output = [*TEXT[:9], 99, *TEXT[10:]]
    assert accepted_length(TEXT, output) == [6, 2, 6, 6, 6]


def test_the_cursor_survives_an_insertion() -> None:
    output = [*TEXT[:9], 98, 99, 97, *TEXT[9:]]
    steps = accepted_length(TEXT, output)
    assert sum(steps) >= len(TEXT) - 3 - len(steps) + 3
    assert steps[-2] == 6, "back in step"


def test_the_cursor_survives_a_deletion() -> None:
    output = [*TEXT[:9], *TEXT[15:]]
    steps = accepted_length(TEXT, output)
    assert len(steps) <= 6
    assert steps[-2] == 6, "back in step"


def test_beyond_the_prediction_and_without_one_there_is_no_draft() -> None:
    drafter = PredictionDrafter()
    assert len(propose(drafter, make_request([1]))) == 0
    request = make_request([1], prediction_ids=(5, 6))
    assert propose(drafter, request).tokens.tolist() == [5, 6]
    request.token_ids += [5, 6]
    assert len(propose(drafter, request)) == 0
    drafter.forget(request)
    assert not drafter._states


def test_the_prompt_does_not_move_the_cursor() -> None:
    """The prediction often repeats the prompt; only the output counts."""
    request = make_request(TEXT[5:15], prediction_ids=tuple(TEXT))
    drafter = PredictionDrafter()
    assert propose(drafter, request, 3).tokens.tolist() == TEXT[:3]
    request.token_ids += [TEXT[15]]  # continues the prompt, as the prediction does: still one output token only
    assert propose(drafter, request, 3).tokens.tolist() == TEXT[1:4]


# Token Recycling


def test_the_template_is_the_published_one() -> None:
    template = static_template(80)
    assert len(template.ranks) == 80
    assert [level.stop - level.start for level in template.levels] == list(LEVEL_SIZES) == [8, 21, 25, 15, 8, 3]
    assert len(static_template(100).ranks) == 80


@pytest.mark.parametrize("template", [static_template, chain_template])
def test_templates_hold_ancestors_first(template: object) -> None:
    smaller: set[tuple[int, ...]] = set()
    for n in range(1, 81):
        made = template(n)  # type: ignore[operator]
        size = min(n, 16) if template is chain_template else n
        assert len(made.parents) == len(made.ranks) == len(made.key) == size
        paths: list[tuple[int, ...]] = []
        for i, (parent, rank) in enumerate(zip(made.parents.tolist(), made.ranks.tolist(), strict=True)):
            assert parent < i
            paths.append((*(paths[parent] if parent >= 0 else ()), rank))
            level = made.levels[len(paths[i]) - 1]
            assert level.start <= i < level.stop
        assert len(set(paths)) == size
        assert smaller <= set(paths), "a bigger tree only adds nodes"
        smaller = set(paths)
        if template is chain_template:
            assert max(made.ranks) == 0


def filled(vocab_size: int = 30, seed: int = 0) -> tuple[RecyclingDrafter, np.ndarray]:
    """A drafter that has seen every token once, and its matrix."""
    rng = np.random.default_rng(seed)
    matrix = np.array([rng.permutation(vocab_size)[:8] for _ in range(vocab_size)])
    drafter = RecyclingDrafter(vocab_size=vocab_size)
    drafter.observe(Observation(make_request([1]), (1,), np.arange(vocab_size), matrix))
    return drafter, matrix


@pytest.mark.parametrize("budget", [1, 7, 8, 20, 32, 80])
def test_recycling_follows_the_matrix(budget: int) -> None:
    drafter, matrix = filled()
    proposal = propose(drafter, make_request([3, 17]), budget)
    assert len(proposal) == budget
    for token, parent, key in zip(proposal.tokens, proposal.parents, proposal.key, strict=True):
        above = 17 if parent < 0 else proposal.tokens[parent]
        assert token == matrix[above][key % 8]
    for siblings in range(-1, budget):
        tokens = proposal.tokens[proposal.parents == siblings].tolist()
        assert len(set(tokens)) == len(tokens)


def test_recycling_as_a_chain() -> None:
    _, matrix = filled()
    drafter = RecyclingDrafter(vocab_size=30, chain=True)
    drafter.observe(Observation(make_request([1]), (1,), np.arange(30), matrix))
    proposal = propose(drafter, make_request([5]), 6)
    assert proposal.parents.tolist() == [-1, 0, 1, 2, 3, 4]
    assert proposal.tokens.tolist()[:2] == [matrix[5][0], matrix[matrix[5][0]][0]]


def test_unknown_rows_propose_nothing() -> None:
    drafter = RecyclingDrafter(vocab_size=30)
    request = make_request([1])
    assert len(propose(drafter, request, 20)) == 0
    rows = np.arange(10, 18)[None]
    drafter.observe(Observation(request, (10,), np.array([1]), rows))
    assert propose(drafter, request, 80).tokens.tolist() == rows[0].tolist(), "children known, grandchildren not"
    drafter.observe(Observation(request, (10,), np.array([11]), rows + 8))
    proposal = propose(drafter, request, 80)
    assert set(proposal.parents.tolist()) == {-1, 1}
    assert proposal.tokens[proposal.parents == 1].tolist() == (rows[0] + 8)[: (proposal.parents == 1).sum()].tolist()
    assert len(propose(drafter, make_request([2]), 20)) == 0
    assert len(propose(drafter, request, 0)) == 0


def test_all_verified_nodes_refresh_the_matrix() -> None:
    """After a run, the row of every token that went through a root or node, rejected ones too, is known."""
    engine = llm("recycling:k=20").engine
    drafter = engine.stages.drafting.drafters["recycling"]
    seen: set[int] = set()
    observe = drafter.observe

    def spy(observation: Observation) -> None:
        assert observation.top_ids is not None
        assert observation.top_ids.shape == (len(observation.row_tokens), 8)
        seen.update(observation.row_tokens.tolist())
        observe(observation)

    drafter.observe = spy
    request = make_request(prompt_of(5))
    run(engine, [request])
    known = np.flatnonzero(drafter._matrices.of(request)[:, 0] >= 0).tolist()
    assert known == sorted(seen)
    assert len(seen - set(request.token_ids)) > 5, "rejected nodes teach as well"
    assert seen >= {request.token_ids[4], *request.output_ids[:-1]}


def test_the_matrix_holds_the_likeliest_successors() -> None:
    engine = llm("recycling:k=1").engine
    drafter = engine.stages.drafting.drafters["recycling"]
    prompt = prompt_of(5)
    run(engine, [make_request(prompt, greedy(1))])
    assert drafter._matrices.of(make_request(prompt))[prompt[-1], 0] == reference(prompt, 1)[0]


def test_salts_share_no_matrix() -> None:
    engine = llm("recycling:k=20").engine
    alice, bob = make_request(prompt_of(5), salt="a"), make_request(prompt_of(5), salt="b")
    run(engine, [alice])
    run(engine, [bob])
    assert bob.stats.draft_tokens == alice.stats.draft_tokens, "nothing of the first run helped the second"
    run(engine, [again := make_request(prompt_of(5), salt="a")])
    assert again.stats.draft_tokens != alice.stats.draft_tokens


def test_the_number_of_tenants_is_bounded() -> None:
    drafter = RecyclingDrafter(vocab_size=30)
    running = make_request([1], salt="running")
    propose(drafter, running)
    for i in range(100):
        for salt in ("kept", str(i)):
            propose(drafter, passing := make_request([1], salt=salt))
            drafter.forget(passing)
    assert len(drafter._matrices) == 64
    assert "kept" in drafter._matrices, "the least recently used goes"
    assert "running" in drafter._matrices, "a tenant with a running request keeps its rows"
    drafter.forget(running)
    propose(drafter, make_request([1], salt="one more"))
    assert "running" not in drafter._matrices


@pytest.mark.parametrize(
    ("proposals", "message"),
    [
        ([], "0 proposals for 1 requests"),
        ([chain([96], [0])], "outside the vocabulary"),
        ([Proposal(np.array([5, 6]), np.array([-1]), np.array([0, 0]))], "different lengths"),
        ([Proposal(np.array([5, 6]), np.array([1, -1]), np.array([0, 0]))], "after its parent"),
    ],
)
def test_a_malformed_proposal_is_refused(proposals: list[Proposal], message: str) -> None:
    """It would otherwise break the forward of the whole batch."""
    drafting = Drafting({}, merge_trees=True, vocab_size=96)
    with pytest.raises(ValueError, match=message):
        drafting._check(proposals, 1)
    drafting._check([chain([95, 0], [0, 0])], 1)
