"""One request's grammar on xgrammar's matcher (XGrammar 2411.15100): masks along draft paths, and jumps.

The matcher stands on a draft path and is moved by rollback and accept, about a microsecond a token, so a mask is
filled only for the nodes that somebody asks about: those on the walk. Filling the whole tree in one
`traverse_draft_tree` costs two to three times as much as pruning by accepting, since most nodes are never walked.
Masks are kept by path until the next commit; drafters and acceptance ask for the same ones.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from paceline.arrays import BoolArray, IntArray
from paceline.engine.constraint import Jump
from paceline.errors import RequestError

if TYPE_CHECKING:
    from xgrammar import GrammarMatcher

Encode = Callable[[str], Sequence[int]]
_CHARACTERS_PER_TOKEN = 16
"""Of a jump's text, this much per token of the budget is looked at."""


class GrammarConstraint:
    """A `Constraint` on a compiled grammar.

    Args:
        matcher: at the beginning of the text.
        vocab_size: tokens the target can emit.
        eos_token_ids: the tokens that may end the text.
        encode: text to token ids, as they stand in the middle of a text.
        silent: tokens that stand for no text, which no grammar allows; the matcher prints a warning about each.
        field: the request field that errors name.
        max_seconds: most CPU time of one call of the matcher; a grammar that takes longer fails its request.
    """

    def __init__(
        self,
        matcher: GrammarMatcher,
        *,
        vocab_size: int,
        eos_token_ids: Sequence[int],
        encode: Encode,
        silent: frozenset[int],
        field: str,
        max_seconds: float = 0.5,
    ) -> None:
        self._matcher = matcher
        self._vocab_size = vocab_size
        self._eos = np.asarray(eos_token_ids, dtype=np.int64)
        self._encode = encode
        self._silent = silent
        self._field = field
        self._max_seconds = max_seconds
        self._here: list[int] = []  # the path the matcher stands on
        self._masks: dict[tuple[int, ...], NDArray[np.int32]] = {}  # path -> one bit per token
        self._finished: bool | None = None
        self._error: RequestError | None = None

    @property
    def finished(self) -> bool:
        """Whether nothing more may come but an end token, or one came."""
        if self._finished is None:
            self._go(())
            allowed = self.allowed() if self._matcher.is_completed() else None
            self._finished = self._matcher.is_terminated() or (allowed is not None and self._only_ends(allowed))
        return self._finished

    def allowed(self, path: Sequence[int] = ()) -> BoolArray | None:
        """Which tokens may follow `path`; None behind an end token.  # [vocab]"""
        at = tuple(path)
        if at not in self._masks:
            if not self._go(at):
                raise self._fail(f"token {at[len(self._here)]} of a draft is not allowed where it stands.")
            if self._matcher.is_terminated():
                return None
            self._masks[at] = self._fill()
        bits = np.unpackbits(self._masks[at].view(np.uint8), count=self._vocab_size, bitorder="little")
        return bits.view(np.bool_)

    def surviving(self, tokens: IntArray, parents: IntArray) -> IntArray:
        """Nodes that are allowed along with all their ancestors, found by walking the tree depth first.  # [kept]"""
        children: list[list[int]] = [[] for _ in range(len(tokens) + 1)]
        for node, parent in enumerate(parents.tolist()):
            children[parent + 1].append(node)
        words = tokens.tolist()
        kept = []
        waiting: list[tuple[int, tuple[int, ...]]] = [(node, ()) for node in reversed(children[0])]
        while waiting:
            node, above = waiting.pop()
            path = (*above, words[node])
            if self._go(path):
                kept.append(node)
                waiting += [(child, path) for child in reversed(children[node + 1])]
        return np.array(sorted(kept), dtype=np.int64)

    def jump(self, budget: int) -> Jump:
        """Forced tokens first; where several tokens are left, the text that must come, as the tokenizer spells it."""
        path: list[int] = []
        while len(path) < budget:
            allowed = self.allowed(path)
            if allowed is None or self._only_ends(allowed):
                return Jump(tuple(path), len(path))
            if np.count_nonzero(allowed) != 1:
                break
            path.append(int(allowed.argmax()))
        forced = len(path)
        if forced < budget and self._go(path):
            text = self._text()[: _CHARACTERS_PER_TOKEN * (budget - forced)]
            for token in self._encode(text)[: budget - forced] if text else ():
                if not self._go([*path, token]):
                    break
                path.append(token)
        return Jump(tuple(path), forced)

    def advance(self, token: int) -> None:
        """Commit a token.

        Raises:
            RequestError: the grammar forbids it, or took too long.
        """
        if self._here[:1] != [token] and not self._go((token,)):
            raise self._fail(f"token {token} was committed and is not allowed.")
        del self._here[0]
        self._masks = {path[1:]: mask for path, mask in self._masks.items() if path[:1] == (token,)}
        self._finished = None

    def fork(self) -> GrammarConstraint:
        """An independent copy."""
        self._go(())
        return GrammarConstraint(
            self._matcher.fork(),
            vocab_size=self._vocab_size,
            eos_token_ids=self._eos.tolist(),
            encode=self._encode,
            silent=self._silent,
            field=self._field,
            max_seconds=self._max_seconds,
        )

    def _only_ends(self, allowed: BoolArray) -> bool:
        ends = np.count_nonzero(allowed[self._eos])
        return bool(ends) and ends == np.count_nonzero(allowed)

    def _go(self, path: Sequence[int]) -> bool:
        """Move the matcher onto `path`; False where it is forbidden (it then stands on what was allowed of it)."""
        if self._error is not None:
            raise self._error
        common = 0
        for token, wanted in zip(self._here, path, strict=False):
            if token != wanted:
                break
            common += 1
        if common == len(self._here) == len(path):
            return True
        started = time.thread_time()
        if common < len(self._here):
            self._matcher.rollback(len(self._here) - common)
            del self._here[common:]
        for token in path[common:]:
            if token in self._silent or self._matcher.is_terminated() or not self._matcher.accept_token(token):
                return False
            self._here.append(token)
        self._check(started)
        return True

    def _fill(self) -> NDArray[np.int32]:
        """The packed mask where the matcher stands.  # [ceil(vocab / 32)]"""
        started = time.thread_time()
        mask = np.zeros((1, -(-self._vocab_size // 32)), dtype=np.int32)
        self._matcher.fill_next_token_bitmask(mask)
        self._check(started)
        filled: NDArray[np.int32] = mask[0]
        return filled

    def _text(self) -> str:
        """The text that must come where the matcher stands; empty if it begins or ends inside a character."""
        started = time.thread_time()
        try:
            return str(self._matcher.find_jump_forward_string())
        except UnicodeDecodeError:
            return ""
        finally:
            self._check(started)

    def _check(self, started: float) -> None:
        """Fail the request if its grammar is too slow: the engine's other requests wait for every call."""
        seconds = time.thread_time() - started
        if seconds > self._max_seconds:
            raise self._fail(
                f"the grammar took {seconds:.1f} s for one token, and may take {self._max_seconds:g} s.",
                "Make it less ambiguous, or shorten its repetitions.",
            )

    def _fail(self, message: str, fix: str | None = None) -> RequestError:
        self._error = RequestError(message, field=self._field, fix=fix)
        return self._error
