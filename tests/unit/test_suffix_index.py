"""The suffix structure against slow obvious ones."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from slow_suffix_index import SlowSuffixIndex

from paceline.arrays import IntArray
from paceline.draft.suffixes.index import END, FIRST, LENGTH, TEXT, SuffixIndex, record_of
from paceline.draft.suffixes.matches import find
from paceline.draft.suffixes.memory import TOP
from paceline.draft.suffixes.nodes import NUM_NODES


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


def array(tokens: list[int]) -> IntArray:
    return np.array(tokens, dtype=np.int64)


def kept(index: SuffixIndex) -> range:
    """The sequences that are kept."""
    return range(index.memory[FIRST], index.memory[END])


def found_in(
    index: SuffixIndex, ending: list[int], enough: int = 1 << 30, without: int = -1
) -> list[tuple[int, int, int]]:
    """(length, sequence, at)"""
    m, found = index.memory, np.zeros((3, 1 << 14), dtype=np.int64)
    records = {sequence: record_of.py_func(m, sequence) for sequence in kept(index)}
    size = find(m, array(ending), len(ending), enough, without, found, 0)
    result = []
    for length, where, left in found[:, :size].T.tolist():
        ((sequence, at),) = (
            (sequence, where - m[record + TEXT])
            for sequence, record in records.items()
            if 0 <= where - m[record + TEXT] == m[record + LENGTH] - left
        )
        result.append((length, sequence, int(at)))
    return result


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
        index.extend(sequence, array(tokens))
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
    index.extend(index.open(), array(text))
    slow.extend(0, text)
    for start in range(0, 1900, 50):
        ending = text[start : start + 40]
        assert found_in(index, ending)[0][0] == max(slow.match(p, ending) for p in slow.places)


def test_enough_stops_at_shorter_contexts_and_a_sequence_can_be_left_out() -> None:
    index = SuffixIndex(recent=2, depth=8)
    for _ in range(6):
        index.extend(index.open(), array([1, 2, 3, 4]))
    index.extend(index.open(), array([9, 3, 5]))
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
        index.extend(index.open(), array(text))
    for gone in range(1, 12):
        index.drop(len(texts[gone - 1]))
        fresh = SuffixIndex(recent=1000, depth=5)
        for _ in range(gone):
            fresh.open()
        for text in texts[gone:]:
            fresh.extend(fresh.open(), array(text))
        assert index.num_tokens == fresh.num_tokens == sum(map(len, texts[gone:]))
        for _ in range(10):
            ending = rng.integers(0, alphabet, 12).tolist()
            assert Counter(found_in(index, ending)) == Counter(found_in(fresh, ending))
    index.drop(1 << 30)
    assert index.num_tokens == 0
    assert not kept(index)
    index.extend(11, array([1, 2, 3]))
    assert index.num_tokens == 0, "a sequence that is gone stays gone"


def test_a_sequence_is_dropped_from_its_start() -> None:
    index = SuffixIndex()
    sequence = index.open()
    index.extend(sequence, array([1, 2, 3, 1, 2, 4]))
    index.drop(3)
    assert found_in(index, [1, 2]) == [(2, sequence, 5)]
    index.extend(sequence, array([5]))
    assert index.num_tokens == 4


def test_memory_is_bounded_by_what_is_kept() -> None:
    rng = np.random.default_rng(0)
    index = SuffixIndex(recent=4, depth=8)
    nodes, words = [], []
    for _ in range(160):
        index.extend(index.open(), rng.integers(0, 6, 100))
        index.drop(max(0, index.num_tokens - 500))
        nodes.append(index.memory[NUM_NODES])
        words.append(index.memory[TOP])
    assert index.num_tokens == 500
    assert len(kept(index)) <= 6
    assert max(nodes[100:]) < 1.1 * max(nodes[40:80]), "it does not creep"
    assert max(nodes) < 600
    assert words[159] < 1.1 * words[40], "what is given back is used again"
    index.drop(500)
    assert index.memory[NUM_NODES] == 0


def test_growing_moves_nothing() -> None:
    """An index that outgrew its memory many times, of many sequences, finds what a big one does."""
    rng = np.random.default_rng(0)
    text = rng.integers(0, 40, 30_000)
    index, slow = SuffixIndex(), SlowSuffixIndex()
    for part in np.split(text, 300):
        index.extend(index.open(), part)
        slow.extend(slow.open(), part.tolist())
    assert len(index.memory) > 10 * len(SuffixIndex().memory)
    numbers = {id(tokens): number for number, tokens in slow._sequences.items()}
    for start in range(0, 29_000, 500):
        ending = text[start : start + 40].tolist()
        found = [(length, numbers[id(tokens)], at) for length, tokens, at in slow.find(ending)]
        assert found_in(index, ending) == found
