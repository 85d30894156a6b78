"""The suffix structure against a slow obvious one, and the drafter on it."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from engine_tools import greedy, llm, make_request, prompt_of, run

from paceline.draft.base import DraftContext, Proposal
from paceline.draft.suffix import SuffixDrafter
from paceline.draft.suffix_index import SuffixIndex
from paceline.draft.suffix_votes import Openness
from paceline.engine.request import Request
from paceline.errors import SpeculationSpecError


class SlowIndex:
    """Every place of every sequence, in the order in which they were added."""

    def __init__(self, recent: int, depth: int, longest: int) -> None:
        self.recent, self.depth, self.longest = recent, depth, longest
        self.texts: list[list[int]] = []
        self.places: list[tuple[int, int]] = []

    def extend(self, sequence: int, tokens: list[int]) -> None:
        for token in tokens:
            self.places.append((sequence, len(self.texts[sequence])))
            self.texts[sequence].append(token)

    def match(self, place: tuple[int, int], ending: list[int]) -> int:
        before = self.texts[place[0]][: place[1]][::-1]
        pairs = zip(before, ending[::-1], strict=False)
        return min(next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(before), len(ending))), self.longest)

    def find(self, ending: list[int]) -> Counter[tuple[int, int, int]]:
        """(length, sequence, at): of every context as deep as contexts go, the latest `recent` places."""
        found: dict[tuple[int, int], int] = {}
        for length in range(1, self.depth + 1):
            here = [p for p in self.places if self.match(p, ending) >= length]
            for place in here[-self.recent :]:
                found[place] = self.match(place, ending)
        return Counter((length, *place) for place, length in found.items())


def found_in(index: SuffixIndex, ending: list[int], **options: int) -> list[tuple[int, int, int]]:
    numbers = {id(tokens): number for number, tokens in index._sequences.items()}
    return [(length, numbers[id(tokens)], at) for length, tokens, at in index.find(ending, **options)]


def nodes_of(index: SuffixIndex) -> list[object]:
    nodes, queue = [], [index._root]
    while queue:
        node = queue.pop()
        nodes.append(node)
        queue += (node.children or {}).values()
    return nodes


@pytest.mark.parametrize("alphabet", [1, 2, 4, 20])
@pytest.mark.parametrize(("recent", "depth", "longest"), [(1, 3, 5), (3, 4, 10), (8, 16, 64), (1000, 5, 30)])
def test_occurrences_are_those_of_a_slow_search(alphabet: int, recent: int, depth: int, longest: int) -> None:
    rng = np.random.default_rng(alphabet)
    index = SuffixIndex(recent=recent, depth=depth, longest=longest)
    slow = SlowIndex(recent, depth, longest)
    some = 0
    for _ in range(60):
        if len(slow.texts) < 4:
            assert index.open() == len(slow.texts)
            slow.texts.append([])
        sequence = int(rng.integers(len(slow.texts)))  # several grow at once
        tokens = rng.integers(0, alphabet, int(rng.integers(1, 9))).tolist()
        index.extend(sequence, tokens)
        slow.extend(sequence, tokens)
        ending = slow.texts[int(rng.integers(len(slow.texts)))][-int(rng.integers(1, 80)) :]
        found = found_in(index, ending)
        assert Counter(found) == slow.find(ending)
        lengths = [length for length, _, _ in found]
        assert lengths == sorted(lengths, reverse=True)
        if found and recent == 1000:  # nothing is left out: the longest match, and true counts
            assert lengths[0] == max(slow.match(p, ending) for p in slow.places)
            continuations = Counter(slow.texts[s][at] for n, s, at in found if n >= 2)
            assert continuations == Counter(
                slow.texts[s][at] for s, at in slow.places if slow.match((s, at), ending) >= 2
            )
        some += len(found)
    assert some > 50
    assert index.num_tokens == sum(map(len, slow.texts))


def test_the_longest_match_is_exact_while_its_context_is_rarer_than_what_is_kept() -> None:
    rng = np.random.default_rng(5)
    text = rng.integers(0, 3, 2000).tolist()
    index, slow = SuffixIndex(recent=32, depth=16), SlowIndex(32, 16, 64)
    slow.texts.append([])
    index.extend(index.open(), text)
    slow.extend(0, text)
    for start in range(0, 1900, 50):
        ending = text[start : start + 40]
        assert found_in(index, ending)[0][0] == max(slow.match(p, ending) for p in slow.places)


def test_enough_stops_at_shorter_contexts_and_a_sequence_can_be_left_out() -> None:
    index = SuffixIndex(recent=2, depth=8)
    for _ in range(6):
        index.extend(index.open(), [1, 2, 3, 4])
    index.extend(index.open(), [9, 3, 5])
    everything = found_in(index, [2, 3])
    assert {length for length, _, _ in everything} == {2, 1}
    assert {length for length, _, _ in found_in(index, [2, 3], enough=1)} == {2}
    assert 6 not in {sequence for _, sequence, _ in found_in(index, [2, 3], without=6)}


@pytest.mark.parametrize("alphabet", [2, 5])
def test_dropping_the_oldest_leaves_what_was_never_added(alphabet: int) -> None:
    """Sequences that came one after another: what is left equals an index of the rest, node for node."""
    rng = np.random.default_rng(alphabet)
    texts = [rng.integers(0, alphabet, int(rng.integers(1, 60))).tolist() for _ in range(12)]
    index = SuffixIndex(recent=1000, depth=5)
    for text in texts:
        index.extend(index.open(), text)
    for gone in range(1, 12):
        index.drop(len(texts[gone - 1]))
        fresh = SuffixIndex(recent=1000, depth=5)
        for _ in range(gone):
            fresh.open()
        for text in texts[gone:]:
            fresh.extend(fresh.open(), text)
        assert index.num_tokens == fresh.num_tokens == sum(map(len, texts[gone:]))
        for _ in range(10):
            ending = rng.integers(0, alphabet, 12).tolist()
            assert Counter(found_in(index, ending)) == Counter(found_in(fresh, ending))
    index.drop(1 << 30)
    assert index.num_tokens == 0
    assert not index._sequences
    index.extend(11, [1, 2, 3])
    assert index.num_tokens == 0, "a sequence that is gone stays gone"


def test_a_sequence_is_dropped_from_its_start() -> None:
    index = SuffixIndex()
    sequence = index.open()
    index.extend(sequence, [1, 2, 3, 1, 2, 4])
    index.drop(3)
    assert found_in(index, [1, 2]) == [(2, sequence, 5)]
    index.extend(sequence, [5])
    assert index.num_tokens == 4


def test_memory_is_bounded_by_what_is_kept() -> None:
    rng = np.random.default_rng(0)
    index = SuffixIndex(recent=4, depth=8)
    sizes = []
    for _ in range(160):
        index.extend(index.open(), rng.integers(0, 6, 100).tolist())
        index.drop(max(0, index.num_tokens - 500))
        sizes.append(len(nodes_of(index)))
    assert index.num_tokens == 500
    assert len(index._sequences) <= 6
    assert max(sizes[100:]) < 1.1 * max(sizes[40:80]), "it does not creep"
    assert max(sizes) < 600
    assert all(len(node.places) <= 4 for node in nodes_of(index))  # type: ignore[attr-defined]
    index.drop(500)
    assert len(nodes_of(index)) == 1


# The drafter


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
    assert one.openness is not two.openness


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
    openness = Openness()
    rare, common = openness.of(3, 1), openness.of(3, 40)
    assert openness.chance(rare) == pytest.approx(2 / 3)
    assert openness.chance(common) < 0.15
    rng = np.random.default_rng(0)
    for _ in range(3000):
        openness.learn(rare, bool(rng.random() < 0.1))
    assert openness.chance(rare) == pytest.approx(0.1, abs=0.05)
    assert openness.chance(openness.of(4, 1)) == pytest.approx(2 / 3), "other classes are not touched"
    lengths = [openness.of(n, 1) for n in range(1, 200)]
    assert lengths == sorted(lengths)
    assert max(openness.of(n, m) for n in (1, 64, 500) for m in (1, 2, 500)) < len(openness._seen)


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
