"""The drafter `suffix`: what it claims, and that it says what its slow reference says."""

from __future__ import annotations

import numpy as np
import pytest
from engine_tools import greedy, llm, make_request, prompt_of, run
from slow_suffix import SlowSuffixDrafter

from paceline.draft.base import DraftContext, Proposal
from paceline.draft.suffix import SuffixDrafter
from paceline.draft.suffixes.index import append_tokens, drop_oldest, start_sequence
from paceline.draft.suffixes.tree import grow, learn
from paceline.draft.suffixes.votes import context_class, new_openness
from paceline.engine.request import Request
from paceline.errors import SpeculationSpecError


def propose(drafter: SuffixDrafter, request: Request, budget: int = 16) -> Proposal:
    (proposal,) = drafter.propose([DraftContext(request, budget)])
    return proposal


def paths_of(proposal: Proposal) -> list[tuple[int, ...]]:
    paths: list[tuple[int, ...]] = []
    for token, parent in zip(proposal.tokens.tolist(), proposal.parents.tolist(), strict=True):
        paths.append((*(paths[parent] if parent >= 0 else ()), token))
    return paths


def finished(drafter: SuffixDrafter, prompt: list[int], output: list[int], salt: str = "") -> None:
    request = make_request(prompt, salt=salt)
    propose(drafter, request)
    request.token_ids += output
    drafter.forget(request)


def test_it_continues_as_the_text_did() -> None:
    proposal = propose(SuffixDrafter(), make_request([1, 2, 3, 4, 5, 6, 1, 2, 3]))
    assert (4, 5, 6, 1, 2, 3) in paths_of(proposal)
    assert len(propose(SuffixDrafter(), make_request([1, 2, 3]))) == 0
    assert len(propose(SuffixDrafter(), make_request([1, 2, 1]), 0)) == 0


def test_the_likelier_continuation_comes_first_and_has_the_better_class() -> None:
    text = [1, 2, 5, 9, 1, 2, 5, 8, 1, 2, 6, 7, 1, 2]
    proposal = propose(SuffixDrafter(), make_request(text), 12)
    roots = proposal.tokens[proposal.parents == -1].tolist()
    assert roots[:2] == [5, 6]
    drafter = SuffixDrafter()
    chances = drafter.prior[proposal.key]
    assert chances[0] > chances[proposal.tokens.tolist().index(6)]


@pytest.mark.parametrize("budget", [1, 2, 5, 17, 64])
def test_a_tree_has_at_most_its_budget_and_no_node_twice(budget: int) -> None:
    rng = np.random.default_rng(budget)
    drafter = SuffixDrafter()
    for _ in range(5):
        finished(drafter, rng.integers(0, 6, 20).tolist(), rng.integers(0, 6, 50).tolist())
    proposal = propose(drafter, make_request(rng.integers(0, 6, 60).tolist()), budget)
    paths = paths_of(proposal)
    assert len(paths) == len(set(paths)) == budget
    assert (proposal.parents < np.arange(budget)).all()
    assert proposal.key.min() >= 0
    assert proposal.key.max() < len(drafter.prior)
    again = propose(drafter, make_request([1, 2, 3]), budget)
    assert len(again) <= budget


def test_a_bigger_budget_only_adds_nodes() -> None:
    text = np.random.default_rng(1).integers(0, 5, 200).tolist()
    smaller: set[tuple[int, ...]] = set()
    for budget in (1, 4, 16, 64):
        paths = set(paths_of(propose(SuffixDrafter(), make_request(text), budget)))
        assert smaller < paths
        smaller = paths


def test_a_chain_is_the_likeliest_path() -> None:
    text = [1, 2, 5, 9, 1, 2, 5, 8, 1, 2, 6, 7, 1, 2]
    proposal = propose(SuffixDrafter(chain=True), make_request(text), 6)
    assert proposal.parents.tolist() == list(range(-1, len(proposal) - 1))
    assert proposal.tokens[0] == 5
    assert len(proposal) > 1


def test_own_text_and_past_requests_are_united() -> None:
    drafter = SuffixDrafter()
    finished(drafter, [50], [1, 2, 3, 20, 21])
    paths = paths_of(propose(drafter, make_request([1, 2, 3, 10, 11, 1, 2, 3]), 16))
    assert (20, 21) in paths
    assert (10, 11) in paths
    assert paths[0] == (10,), "of the two, the request's own text weighs more"


def test_outputs_are_kept_and_prompts_are_not() -> None:
    drafter = SuffixDrafter()
    finished(drafter, [1, 2, 3, 4], [7, 8, 9])
    assert len(propose(drafter, make_request([2, 3]))) == 0
    assert propose(drafter, make_request([7, 8])).tokens.tolist() == [9]


def test_running_requests_teach_one_another_but_not_themselves_twice() -> None:
    drafter = SuffixDrafter()
    first, second = make_request([50]), make_request([60])
    propose(drafter, first)
    first.token_ids += [1, 2, 3]
    propose(drafter, first)
    second.token_ids += [1, 2]
    assert propose(drafter, second).tokens.tolist() == [3]
    assert len(propose(drafter, first)) == 0, "3 came once only"


def test_a_request_that_was_never_drafted_for_teaches_too() -> None:
    drafter = SuffixDrafter()
    request = make_request([50])
    request.token_ids += [1, 2, 3]
    drafter.forget(request)
    assert propose(drafter, make_request([1, 2])).tokens.tolist() == [3]


def test_tenants_are_apart() -> None:
    drafter = SuffixDrafter()
    finished(drafter, [50], [1, 2, 3, 4], salt="a")
    assert len(propose(drafter, make_request([1, 2], salt="b"))) == 0
    assert propose(drafter, make_request([1, 2], salt="a")).tokens.tolist() == [3, 4]
    one, two = drafter._tenants["a"], drafter._tenants["b"]
    assert not np.shares_memory(one.openness, two.openness)


def test_the_number_of_tenants_is_bounded() -> None:
    drafter = SuffixDrafter()
    running = make_request([1], salt="running")
    propose(drafter, running)
    for i in range(100):
        for salt in ("kept", str(i)):
            finished(drafter, [1], [2, 3], salt=salt)
    assert len(drafter._tenants) == 64
    assert {"kept", "running"} <= drafter._tenants.keys()
    assert drafter._num_tokens == sum(tenant.past.num_tokens for tenant in drafter._tenants.values())


def test_tokens_are_bounded_and_the_biggest_tenant_gives() -> None:
    drafter = SuffixDrafter(tokens=100)
    finished(drafter, [50], [1, 2, 3, 4], salt="small")
    rng = np.random.default_rng(0)
    for _ in range(20):
        finished(drafter, [50], rng.integers(10, 40, 30).tolist(), salt="big")
        assert sum(tenant.past.num_tokens for tenant in drafter._tenants.values()) == drafter._num_tokens <= 100
    assert drafter._tenants["small"].past.num_tokens == 4
    assert propose(drafter, make_request([1, 2], salt="small")).tokens.tolist() == [3, 4]


def test_without_tokens_only_the_own_text_is_read() -> None:
    drafter = SuffixDrafter(tokens=0)
    finished(drafter, [50], [1, 2, 3, 4])
    assert len(propose(drafter, make_request([1, 2]))) == 0
    assert len(propose(drafter, make_request([1, 2, 3, 1, 2]))) > 0
    with pytest.raises(SpeculationSpecError, match="0 keeps nothing"):
        SuffixDrafter(tokens=-1)


def test_forget_drops_the_request() -> None:
    drafter = SuffixDrafter()
    request = make_request([1, 2, 1])
    propose(drafter, request)
    drafter.forget(request)
    drafter.forget(make_request([9]))  # never heard of, nothing written
    assert not drafter._states


def test_a_long_prompt_is_read_over_several_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("paceline.draft.suffix._READ_AT_ONCE", 4)
    drafter = SuffixDrafter()
    request = make_request([1, 2, 3, 4, 5, 6, 7, 8, 9, 7, 8])
    assert len(propose(drafter, request)) == 0
    assert len(propose(drafter, request)) == 0
    assert propose(drafter, request).tokens.tolist()[0] == 9


def test_openness_is_learned_by_class() -> None:
    openness = new_openness()
    rare, common = context_class(3, 1), context_class(3, 40)
    chances = openness[0] / openness[1]
    assert chances[rare] == pytest.approx(2 / 3)
    assert chances[common] < 0.15
    rng = np.random.default_rng(0)
    tokens, parents, committed = np.array([5]), np.array([-1]), np.array([5])
    for _ in range(3000):
        # after the ending there was one context of that class, which 7 followed, or 5
        learn(openness, tokens, parents, np.array([2, 0, 1, 1, rare, 7 if rng.random() < 0.1 else 5, 0]), committed)
    chances = openness[0] / openness[1]
    assert chances[rare] == pytest.approx(0.1, abs=0.05)
    assert openness[1, rare] <= 501, "the old fades"
    assert chances[context_class(4, 1)] == pytest.approx(2 / 3), "other classes are not touched"
    lengths = [context_class(n, 1) for n in range(1, 200)]
    assert lengths == sorted(lengths)
    assert max(context_class(n, m) for n in (1, 64, 500) for m in (1, 2, 500)) < openness.shape[1]


def test_it_learns_how_far_copies_go() -> None:
    """Copies that always go on exactly make long paths likely."""
    rng = np.random.default_rng(0)
    text = rng.integers(0, 1000, 40).tolist()
    drafter = SuffixDrafter()
    request = make_request(text)
    propose(drafter, request)
    first = SuffixDrafter().prior[propose(drafter, make_request([*text, *text[:8]]), 4).key]
    for token in text[:30]:
        request.token_ids.append(token)
        propose(drafter, request, 4)
    later = SuffixDrafter().prior[propose(drafter, make_request([*text, *text[:8]]), 4).key]
    assert later[0] > first[0]


def test_the_engine_says_the_same_with_it() -> None:
    prompt = prompt_of(6)
    engine = llm("suffix:k=8").engine
    plain = llm("none").engine
    for _ in range(2):
        with_it, without = make_request(prompt, greedy(24)), make_request(prompt, greedy(24))
        run(engine, [with_it])
        run(plain, [without])
        assert with_it.output_ids == without.output_ids
    assert with_it.stats.accepted_tokens > 15, "the second time it knows the answer"


class Texts:
    """Random tokens, half of them copied from what was given before."""

    def __init__(self, rng: np.random.Generator, vocab_size: int) -> None:
        self._rng, self._vocab_size = rng, vocab_size
        self._texts: list[list[int]] = []

    def some(self, length: int) -> list[int]:
        if self._texts and self._rng.random() < 0.5:
            text = self._texts[int(self._rng.integers(len(self._texts)))]
            start = int(self._rng.integers(len(text)))
            if len(text) >= start + length:
                return text[start : start + length]
        self._texts.append(self._rng.integers(0, self._vocab_size, length).tolist())
        return self._texts[-1]


def committed_of(proposal: Proposal, texts: Texts, rng: np.random.Generator) -> list[int]:
    """A path of the draft, if any, and one to three tokens that may leave it."""
    node = int(rng.integers(-1, len(proposal)))
    return [*(paths_of(proposal)[node] if node >= 0 else ()), *texts.some(int(rng.integers(1, 4)))]


@pytest.mark.parametrize("chain", [False, True])
@pytest.mark.parametrize("tokens", [0, 50, 300, 2000, 1_000_000])
@pytest.mark.parametrize("vocab_size", [2, 4, 30, 1000])
def test_it_says_what_the_slow_reference_says(vocab_size: int, tokens: int, chain: bool) -> None:
    """Requests of two tenants come, go on side by side and end; what is kept overflows in some of the cases."""
    rng = np.random.default_rng(vocab_size + tokens)
    texts = Texts(rng, vocab_size)
    drafter, slow = SuffixDrafter(tokens=tokens, chain=chain), SlowSuffixDrafter(tokens=tokens, chain=chain)
    running: list[Request] = []
    num_nodes = 0
    for _ in range(150):
        if (len(running) < 4 and rng.random() < 0.5) or not running:
            running.append(make_request(texts.some(int(rng.choice([1, 5, 40, 400]))), salt=str(rng.integers(2))))
        request, budget = running[int(rng.integers(len(running)))], int(rng.choice([0, 1, 4, 16, 64]))
        proposal = propose(drafter, request, budget)
        expected = slow.propose(request, budget)
        assert (proposal.tokens.tolist(), proposal.parents.tolist(), proposal.key.tolist()) == expected
        num_nodes += len(proposal)
        request.token_ids += committed_of(proposal, texts, rng)
        if rng.random() < 0.08:
            running.remove(request)
            drafter.forget(request)
            slow.forget(request)
        for salt, tenant in slow._tenants.items():
            mine = drafter._tenants[salt]
            assert mine.past.num_tokens == tenant.past.num_tokens
            assert mine.openness.tolist() == [tenant.openness._open, tenant.openness._seen]
    assert num_nodes > 20


def test_a_long_text_says_what_the_slow_reference_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two requests that repeat themselves and each other, prompts read in parts, more nodes than usual."""
    monkeypatch.setattr("paceline.draft.suffix._READ_AT_ONCE", 500)
    monkeypatch.setattr("slow_suffix._READ_AT_ONCE", 500)
    rng = np.random.default_rng(0)
    phrases = [rng.integers(0, 300, int(rng.integers(2, 30))).tolist() for _ in range(60)]
    text = [token for _ in range(400) for token in phrases[int(rng.integers(60))]]
    drafter, slow = SuffixDrafter(tokens=3000), SlowSuffixDrafter(tokens=3000, chain=False)
    requests = [make_request(text[:2000]), make_request(text[1000:1300])]
    for start in range(2000, 5000, 50):
        for request in requests:
            proposal = propose(drafter, request, 1500 if start % 1000 == 0 else 64)
            expected = slow.propose(request, 1500 if start % 1000 == 0 else 64)
            assert (proposal.tokens.tolist(), proposal.parents.tolist(), proposal.key.tolist()) == expected
            request.token_ids += text[start : start + 50]


def test_nothing_is_compiled_in_the_middle_of_a_request() -> None:
    """All entries to compiled code are used here, and have but the form that the constructor made."""
    drafter = SuffixDrafter(tokens=20)
    for salt in ("a", "b"):
        finished(drafter, [1, 2, 3, 1, 2], [1, 2, 3, 4, 1, 2, 3, 5, 6, 7, 8, 9], salt=salt)
        request = make_request([1, 2, 3, 1, 2], salt=salt)
        for token in (3, 1, 2):
            propose(drafter, request)
            request.token_ids.append(token)
    for entry in (start_sequence, append_tokens, drop_oldest, grow, learn):
        assert len(entry.signatures) == 1
