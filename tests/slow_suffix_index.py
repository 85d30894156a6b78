"""The suffix structure of `draft/suffixes` as plain Python objects: its slow reference."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

_SEQUENCE_BITS = 32
_INDEX = (1 << _SEQUENCE_BITS) - 1


Occurrence = tuple[int, list[int], int]
"""(length, tokens, at): the ending's last `length` tokens stood before `tokens[at]`. A plain tuple, for speed."""


class _Node:
    """A context. Without `children` it is a leaf. A place is a sequence's number and the index of the next token."""

    __slots__ = ("children", "places")

    def __init__(self) -> None:
        self.places = array("q")
        self.children: dict[int, _Node] | None = None

    def child(self, token: int) -> _Node:
        assert self.children is not None
        found = self.children.get(token)
        if found is None:
            found = self.children[token] = _Node()
        return found


class SlowSuffixIndex:
    """Occurrences of every context in a set of growing sequences.

    Args:
        recent: occurrences kept of a context that is more frequent than that.
        depth: longest context that has a node of its own.
        longest: longest match that is told apart.
    """

    def __init__(self, *, recent: int = 32, depth: int = 16, longest: int = 64) -> None:
        self.longest = longest
        self.num_tokens = 0
        self._recent = recent
        self._depth = depth
        self._root = _Node()
        self._sequences: dict[int, list[int]] = {}  # oldest first
        self._dropped: dict[int, int] = {}  # tokens at the front of a sequence that cannot be found any more
        self._next = 0

    def open(self) -> int:
        self._sequences[self._next] = []
        self._next += 1
        return self._next - 1

    def extend(self, sequence: int, tokens: Sequence[int]) -> None:
        """Append tokens to a sequence. Nothing happens to one that has been dropped."""
        mine = self._sequences.get(sequence)
        if mine is None:
            return
        base = sequence << _SEQUENCE_BITS
        for token in tokens:
            mine.append(token)
            self._add(base + len(mine) - 1, mine)
        self.num_tokens += len(tokens)

    def find(self, ending: Sequence[int], *, enough: int = 1 << 30, without: int = -1) -> list[Occurrence]:
        """Earlier occurrences of the last 1 to `longest` tokens of `ending`, longest match first, then the latest.

        Of every context they are all there are, or the latest `recent` of them.

        Args:
            ending: the context.
            enough: look at no shorter context once so many are found.
            without: a sequence whose occurrences do not count.
        """
        path = self._walk(ending)
        found: list[Occurrence] = []
        known: set[int] = set()
        for length in range(len(path) - 1, -1, -1):
            node = path[length]
            places = [place for place in reversed(node.places) if place not in known]
            known.update(places)
            if without >= 0:
                places = [place for place in places if place >> _SEQUENCE_BITS != without]
            if node.children is None:
                measured = [self._measured(place, ending, length) for place in places]
                found += sorted([o for o in measured if o[0]], key=_by_length)
            elif length:
                texts = self._sequences
                found += [(length, texts[place >> _SEQUENCE_BITS], place & _INDEX) for place in places]
            if len(found) >= enough:
                break
        return found

    def drop(self, count: int) -> None:
        """Forget the `count` oldest tokens: of the oldest sequences, from their start on."""
        while count > 0 and self._sequences:
            sequence, tokens = next(iter(self._sequences.items()))
            first = self._dropped.get(sequence, 0)
            last = min(first + count, len(tokens))
            for at in range(first, last):
                self._remove((sequence << _SEQUENCE_BITS) + at, tokens)
            count -= last - first
            self.num_tokens -= last - first
            self._dropped[sequence] = last
            if last == len(tokens):
                del self._sequences[sequence], self._dropped[sequence]

    def _add(self, place: int, tokens: list[int]) -> None:
        node, at, depth = self._root, place & _INDEX, 0
        while True:
            node.places.append(place)
            leaf = node.children is None
            if len(node.places) > self._recent:
                self._settle(node, depth)
            if leaf or depth == at:  # at the sequence's start there is no longer context
                return
            depth += 1
            node = node.child(tokens[at - depth])

    def _settle(self, node: _Node, depth: int) -> None:
        """Drop the oldest place of a node that has one too many; a leaf hands all of them to children first."""
        if node.children is None and depth < self._depth:
            node.children = {}
            for place in node.places:
                at = place & _INDEX
                if depth < at:
                    node.child(self._sequences[place >> _SEQUENCE_BITS][at - 1 - depth]).places.append(place)
            for child in node.children.values():
                if len(child.places) > self._recent:
                    self._settle(child, depth + 1)
        node.places.pop(0)

    def _remove(self, place: int, tokens: list[int]) -> None:
        node, depth, at = self._root, 0, place & _INDEX
        path: list[tuple[_Node, int]] = []
        while True:
            if place in node.places:
                node.places.remove(place)
            if node.children is None or depth == at:
                break
            token = tokens[at - 1 - depth]
            path.append((node, token))
            child = node.children.get(token)
            if child is None:
                break
            node, depth = child, depth + 1
        for parent, token in reversed(path):
            assert parent.children is not None
            child = parent.children.get(token)
            if child is not None and not child.places and not child.children:
                del parent.children[token]

    def _walk(self, ending: Sequence[int]) -> list[_Node]:
        """The nodes of the ending's contexts, the empty one first."""
        node, path = self._root, [self._root]
        for token in reversed(ending):
            child = None if node.children is None else node.children.get(token)
            if child is None:
                break
            node = child
            path.append(node)
        return path

    def _measured(self, place: int, ending: Sequence[int], length: int) -> Occurrence:
        """The occurrence with its true length, which is at least `length`."""
        tokens, at, end = self._sequences[place >> _SEQUENCE_BITS], place & _INDEX, len(ending)
        most = min(at, end, self.longest)
        while length < most and tokens[at - 1 - length] == ending[end - 1 - length]:
            length += 1
        return length, tokens, at


def _by_length(occurrence: Occurrence) -> int:
    return -occurrence[0]
