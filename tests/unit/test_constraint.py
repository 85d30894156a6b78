"""A request's grammar: masks along draft paths against slow references, jumps, commits, and where masks are used."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from engine_tools import make_request, step_stats
from fakes import BYTE_VOCAB, make_byte_tokenizer, make_engine
from lossless.reference import slow_law

from paceline import SamplingParams, StructuredOutput
from paceline.arrays import BoolArray, IntArray
from paceline.constrain.matcher import GrammarConstraint
from paceline.draft.base import DraftContext, Proposal, chain
from paceline.draft.drafting import _allowed
from paceline.draft.grammar import FIRST, FORCED, INNER, LAST, GrammarDrafter
from paceline.draft.tree import build
from paceline.engine.constraint import Jump
from paceline.engine.feedback import node_labels
from paceline.engine.sampling import Law, build_law
from paceline.errors import RequestError
from paceline.llm import make_requests
from paceline.plan.survival import AcceptanceEstimates

xgrammar = pytest.importorskip("xgrammar")
EOS = 2
PERSON = """root ::= "{\\"name\\": \\"" [a-z]{1,9} "\\", \\"kind\\": " kind "}"
kind ::= "null" | "true" | "12" [0-9]*"""


@cache
def _info() -> Any:
    return xgrammar.TokenizerInfo.from_huggingface(make_byte_tokenizer(), vocab_size=BYTE_VOCAB, stop_token_ids=[EOS])


@cache
def _compiled(grammar: str) -> Any:
    return xgrammar.GrammarCompiler(_info(), max_threads=1).compile_grammar(grammar)


def ids(text: str) -> list[int]:
    return list(make_byte_tokenizer().encode(text, add_special_tokens=False))


def constraint_on(grammar: str = PERSON, **options: Any) -> GrammarConstraint:
    return GrammarConstraint(
        xgrammar.GrammarMatcher(_compiled(grammar)),
        vocab_size=BYTE_VOCAB,
        eos_token_ids=[EOS],
        encode=ids,
        silent=frozenset(),
        field="structured_outputs.grammar",
        **options,
    )


class Slow:
    """The reference: every mask from a fresh matcher that accepts the whole path."""

    def __init__(self, grammar: str = PERSON, committed: Sequence[int] = ()) -> None:
        self.grammar = grammar
        self.committed = list(committed)

    def allowed(self, path: Sequence[int]) -> BoolArray | None:
        """The mask after `path`; None where the text has ended; raises where the path is forbidden."""
        matcher = xgrammar.GrammarMatcher(_compiled(self.grammar))
        for token in (*self.committed, *path):
            if matcher.is_terminated() or not matcher.accept_token(token):
                raise ValueError("forbidden")
        if matcher.is_terminated():
            return None
        mask = xgrammar.allocate_token_bitmask(1, BYTE_VOCAB)
        matcher.fill_next_token_bitmask(mask)
        return np.unpackbits(mask[0].numpy().view(np.uint8), bitorder="little")[:BYTE_VOCAB].astype(bool)

    def surviving(self, tokens: Sequence[int], parents: Sequence[int]) -> list[int]:
        kept = []
        for node in range(len(tokens)):
            try:
                self.allowed(path_of(node, tokens, parents))
            except ValueError:
                continue
            kept.append(node)
        return kept


def path_of(node: int, tokens: Sequence[int], parents: Sequence[int]) -> list[int]:
    path: list[int] = []
    while node >= 0:
        path.insert(0, int(tokens[node]))
        node = int(parents[node])
    return path


def random_tree(rng: np.random.Generator, slow: Slow, size: int) -> tuple[IntArray, IntArray]:
    """A tree of which about two nodes in three are allowed, and nodes may stand behind an end."""
    tokens: list[int] = []
    parents: list[int] = []
    for node in range(size):
        parent = int(rng.integers(-1, node))
        allowed = None
        if rng.random() < 0.7:
            try:
                allowed = slow.allowed(path_of(parent, tokens, parents))
            except ValueError:
                allowed = None
        choices = np.arange(BYTE_VOCAB) if allowed is None else np.flatnonzero(allowed)
        tokens.append(int(rng.choice(choices)))
        parents.append(parent)
    return np.array(tokens), np.array(parents)


def traversed(committed: Sequence[int], tokens: IntArray, parents: IntArray) -> IntArray:
    """All masks by one `traverse_draft_tree`; row 0 is the root's.  # [n + 1, vocab]"""
    matcher = xgrammar.GrammarMatcher(_compiled(PERSON))
    assert all(matcher.accept_token(t) for t in committed)
    n = len(tokens) + 1
    first, sibling, last = (np.full(n, -1) for _ in range(3))
    for node, parent in enumerate(parents.tolist(), start=1):
        (first if last[parent + 1] < 0 else sibling)[parent + 1 if last[parent + 1] < 0 else last[parent + 1]] = node
        last[parent + 1] = node
    masks = torch.zeros((n, BYTE_VOCAB // 32), dtype=torch.int32)
    words = torch.from_numpy(np.concatenate([[0], tokens]).astype(np.int64))
    matcher.traverse_draft_tree(torch.from_numpy(first), torch.from_numpy(sibling), words, masks)
    return np.unpackbits(masks.numpy().view(np.uint8), axis=1, bitorder="little")[:, :BYTE_VOCAB]


STARTS = ("", '{"name": "', '{"name": "the', '{"name": "abc", "kind": 12', '{"name": "a", "kind": null')


@pytest.mark.parametrize("start", STARTS)
def test_masks_and_surviving_nodes_on_random_trees(start: str) -> None:
    """Against a fresh matcher for every node, and against xgrammar's own traversal, in any order of asking."""
    committed = ids(start)
    slow = Slow(committed=committed)
    constraint = constraint_on()
    for token in committed:
        constraint.advance(token)
    rng = np.random.default_rng(len(start))
    for _ in range(12):
        tokens, parents = random_tree(rng, slow, int(rng.integers(1, 14)))
        kept = constraint.surviving(tokens, parents)
        assert kept.tolist() == slow.surviving(tokens, parents)
        rows = traversed(committed, tokens, parents)
        for node in (-1, *rng.permutation(kept).tolist()):
            path = path_of(node, tokens, parents)
            expected, found = slow.allowed(path), constraint.allowed(path)
            assert (expected is None) == (found is None)
            if expected is not None and found is not None:
                assert found.tolist() == expected.tolist() == rows[node + 1].astype(bool).tolist()


def test_asking_changes_nothing_and_commits_follow_any_question() -> None:
    text = [*ids('{"name": "red", "kind": true}'), EOS]
    asked, silent = constraint_on(), constraint_on()
    rng = np.random.default_rng(0)
    for place, token in enumerate(text):
        ahead = text[place : place + int(rng.integers(0, 5))]
        asked.allowed(ahead)
        asked.surviving(np.array([5, *text[place:]]), np.array([-1, -1, *range(1, len(text) - place)]))
        asked.jump(8)
        now, plain = asked.allowed(), silent.allowed()
        assert now is not None
        assert plain is not None
        assert now.tolist() == plain.tolist()
        assert now[token]
        assert asked.finished == silent.finished == (place == len(text) - 1)
        asked.advance(token)
        silent.advance(token)
    assert asked.finished
    assert asked.allowed() is None
    assert asked.jump(4) == Jump()


def test_it_is_finished_where_only_an_end_may_follow() -> None:
    constraint = constraint_on('root ::= "ab" | "ab" "c"?')
    for token in ids("ab"):
        assert not constraint.finished
        constraint.advance(token)
    assert not constraint.finished, "a c may follow"
    constraint.advance(ids("c")[0])
    assert constraint.finished
    only = constraint.allowed()
    assert only is not None
    assert np.flatnonzero(only).tolist() == [EOS]


def test_an_end_token_finishes_it() -> None:
    constraint = constraint_on('root ::= "a"*')
    constraint.advance(EOS)
    assert constraint.finished


def test_copies_are_independent() -> None:
    constraint = constraint_on()
    for token in ids('{"name": "'):
        constraint.advance(token)
    constraint.allowed(ids("the"))
    copy = constraint.fork()
    before = constraint.allowed()
    for token in ids('a", '):
        copy.advance(token)
    after, moved = constraint.allowed(), copy.allowed()
    assert before is not None
    assert after is not None
    assert moved is not None
    assert before.tolist() == after.tolist() != moved.tolist()


def test_a_forbidden_commit_fails_this_constraint_for_good() -> None:
    constraint = constraint_on()
    with pytest.raises(RequestError, match=r"structured_outputs\.grammar: token 5 was committed"):
        constraint.advance(5)
    for call in (constraint.allowed, lambda: constraint.jump(3), lambda: constraint.finished):
        with pytest.raises(RequestError, match="token 5"):
            call()


def test_a_forbidden_path_has_no_mask() -> None:
    with pytest.raises(RequestError, match="token 5 of a draft"):
        constraint_on().allowed([5])


def test_a_slow_grammar_fails_its_request(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(np.arange(0.0, 90.0, 0.3))
    monkeypatch.setattr(time, "thread_time", lambda: float(next(clock)))
    assert constraint_on(max_seconds=0.4).allowed() is not None
    with pytest.raises(RequestError, match=r"took 0\.3 s for one token, and may take 0\.2 s"):
        constraint_on(max_seconds=0.2).allowed()


# Jumps


def test_jumps_are_what_must_come() -> None:
    constraint = constraint_on()
    jump = constraint.jump(32)
    assert make_byte_tokenizer().decode(jump.tokens) == '{"name": "'
    assert constraint.jump(2) == Jump(jump.tokens[:2], 0)
    for token in jump.tokens:
        constraint.advance(token)
    assert constraint.jump(32) == Jump()


def test_single_tokens_are_forced() -> None:
    """Bytes that are in no longer token leave no choice; the jump behind them is the tokenizer's own spelling."""
    constraint = constraint_on('root ::= "ZZZ" "name" [a-z]')
    jump = constraint.jump(32)
    assert jump.forced == 3
    assert jump.tokens == (*ids("ZZZ"), *ids("name"))
    assert constraint.jump(2) == Jump(tuple(ids("ZZ")), 2)
    assert constraint_on('root ::= "ZZ"').jump(9) == Jump(tuple(ids("ZZ")), 2), "an end is not drafted"


def test_a_jump_that_ends_inside_a_character_is_none() -> None:
    constraint = constraint_on('root ::= "name" ("\\u00e9" | "\\u00e8")')
    for token in ids("name"):
        constraint.advance(token)
    jump = constraint.jump(9)
    assert len(jump.tokens) == jump.forced <= 1, "at most the byte that both characters begin with"


def test_the_drafter_tells_certain_tokens_from_likely_ones() -> None:
    drafter = GrammarDrafter()
    free = make_request([3, 4])
    bound = make_request([3, 4], constraint=constraint_on('root ::= "ZZ" "name" "kind" "value" [a-z]'))
    nothing, made, none = drafter.propose([DraftContext(free, 9), DraftContext(bound, 9), DraftContext(bound, 0)])
    assert len(nothing) == len(none) == 0
    assert made.tokens.tolist() == ids("ZZnamekindvalue")
    assert made.key.tolist() == [FORCED, FORCED, FIRST, INNER, LAST]


def test_certain_tokens_survive() -> None:
    """However often a guess behind them failed: the worth of a forced token stays that of a token, to nine digits."""
    estimates = AcceptanceEstimates({"grammar": GrammarDrafter().prior})
    proposal = chain([7, 8, 9], [FORCED, FORCED, FIRST])
    request = make_request([3])
    for _ in range(300):
        rows = estimates.requests.batch((request,), 1000).rows
        acceptance = estimates.of_batch([request], rows, ["grammar"])
        tree = build("grammar", proposal, acceptance["grammar"][0])
        assert tree.survival[:2].min() > 1.0 - 1e-7
        assert tree.survival[2] < 0.99
        labels = node_labels([(0, tree, [7, 8, 1])], acceptance)
        assert labels.accepted.tolist() == [True, True, False]
        estimates.learn(step_stats(labels, requests=[request]))
    assert estimates.tables()["grammar"][FIRST] < 0.1


class _Failing:
    """A constraint that always fails."""

    finished = False

    def allowed(self, path: Sequence[int] = ()) -> BoolArray | None:
        raise RequestError(f"broken after {len(path)}")

    def surviving(self, tokens: IntArray, parents: IntArray) -> IntArray:
        raise RequestError(f"broken on {len(tokens)} and {len(parents)}")

    def jump(self, budget: int) -> Jump:
        raise RequestError(f"broken within {budget}")

    def advance(self, token: int) -> None:
        raise RequestError(f"broken at {token}")

    def fork(self) -> _Failing:
        return _Failing()


def test_a_failing_grammar_gets_no_draft_and_costs_no_drafter() -> None:
    request = make_request([3, 4], constraint=_Failing())
    (found,) = GrammarDrafter().propose([DraftContext(request, 5)])
    assert len(found) == 0
    assert len(_allowed(chain([5, 6], [0, 0]), request)) == 0


# Where masks are used


def test_chosen_drafts_are_pruned_and_sampled_ones_are_not() -> None:
    request = make_request([3], constraint=constraint_on())
    good = ids('{"name": "a')
    tree = Proposal(np.array([good[0], 9, good[1], 9, good[2]]), np.array([-1, -1, 0, 0, 2]), np.array([0, 1, 2, 3, 4]))
    kept = _allowed(tree, request)
    assert kept.tokens.tolist() == good[:3]
    assert kept.parents.tolist() == [-1, 0, 1]
    assert kept.key.tolist() == [0, 2, 4]
    sampled = chain([good[0], 9], [0, 0], (Law(np.zeros(BYTE_VOCAB)),) * 2)
    assert _allowed(sampled, request) is sampled
    assert _allowed(tree, make_request([3])) is tree


MIXES: tuple[dict[str, Any], ...] = (
    {},
    {"temperature": 0.0},
    {"temperature": 0.6, "top_k": 5},
    {"top_p": 0.7},
    {"min_p": 0.2},
    {"presence_penalty": 0.5, "repetition_penalty": 1.3, "logit_bias": {4: 2.0, 9: -3.0}},
)


@pytest.mark.parametrize("options", MIXES, ids=str)
def test_the_law_under_a_mask(options: dict[str, Any]) -> None:
    params = SamplingParams(**options)
    rng = np.random.default_rng(0)
    for size in (1, 2, 7, 40):
        row = rng.normal(0, 2, 40).astype(np.float32)
        allowed = np.zeros(40, dtype=np.bool_)
        allowed[rng.permutation(40)[:size]] = True
        law = build_law(row, params, [4, 5], [9, 9], allowed=allowed)
        expected = slow_law(np.where(allowed, row, -np.inf), params, [4, 5], [9, 9])
        np.testing.assert_allclose(law.probabilities(40), expected, atol=1e-6)
        assert not law.probabilities(40)[~allowed].any()


def test_min_tokens_never_leaves_an_empty_law() -> None:
    row = np.arange(6, dtype=np.float32)
    params = SamplingParams(min_tokens=4, temperature=0.0)
    ends = [EOS, 5]
    for tokens, expected in (([EOS], EOS), ([EOS, 5], 5), ([EOS, 5, 1], 1)):
        allowed = np.zeros(6, dtype=np.bool_)
        allowed[tokens] = True
        assert build_law(row, params, [], [0], ends, allowed).probabilities(6)[expected] == 1.0


def test_a_grammar_without_a_sayable_token_is_an_error() -> None:
    with pytest.raises(RequestError, match="allows no token"):
        build_law(np.zeros(4, dtype=np.float32), SamplingParams(), [], [], (), np.zeros(4, dtype=np.bool_))


def test_every_sample_gets_its_own_constraint() -> None:
    constraint = constraint_on()
    requests = make_requests(make_byte_tokenizer(), "the", SamplingParams(n=3), "", "r", constraint)
    assert len({id(r.constraint) for r in requests} | {id(constraint)}) == 4
    assert all(r.constraint is None for r in make_requests(make_byte_tokenizer(), "the", SamplingParams(n=2), "", "r"))


def test_structured_output_without_a_constraint_is_refused() -> None:
    params = SamplingParams(structured=StructuredOutput(json_object=True))
    with pytest.raises(RequestError, match="comes without its constraint"):
        make_engine().validate(make_request([3, 4], params))
