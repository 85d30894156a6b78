"""`Grammars`: what users ask of the text's form, compiled once and handed out as the constraint of one request."""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import lru_cache
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from paceline.config import StructuredOutput
from paceline.constrain.matcher import GrammarConstraint
from paceline.constrain.process import CompilerProcess
from paceline.constrain.schema import Problem
from paceline.engine.constraint import Constraint
from paceline.errors import BusyError, RequestError

if TYPE_CHECKING:
    from xgrammar import CompiledGrammar, TokenizerInfo

_PROBE_TEXT = "\n"


class Grammars:
    """Compiles structured outputs, in a process of its own, and remembers them.

    Thread-safe: callers wait for one another.

    Args:
        tokenizer: the model's `transformers` tokenizer.
        vocab_size: tokens the target can emit.
        eos_token_ids: the tokens that may end a text.
        time_limit: most seconds for compiling one source.
        memory_limit: most bytes for compiling one source.
        max_text: most bytes of a source; also of all choices together.
        max_choices: most texts of a `choice`.
        max_token_seconds: most CPU time of a mask at run time.
        cache_entries: most grammars remembered.
        cache_bytes: most bytes of remembered grammars, as serialised.
    """

    def __init__(
        self,
        tokenizer: Any,
        vocab_size: int,
        eos_token_ids: Sequence[int],
        *,
        time_limit: float = 10.0,
        memory_limit: int = 1 << 30,
        max_text: int = 64 << 10,
        max_choices: int = 1024,
        max_token_seconds: float = 0.5,
        cache_entries: int = 256,
        cache_bytes: int = 128 << 20,
    ) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._eos = tuple(eos_token_ids)
        self._time_limit = time_limit
        self._memory_limit = memory_limit
        self._max_text = max_text
        self._max_choices = max_choices
        self._max_token_seconds = max_token_seconds
        self._cache = _Cache(cache_entries, cache_bytes)
        self._lock = threading.Lock()
        self._info: TokenizerInfo | None = None
        self._silent: frozenset[int] = frozenset()
        self._process: CompilerProcess | None = None
        self._closed = False
        self._encode = lru_cache(4096)(self._tokens_of)

    def start(self) -> None:
        """Start the compiler's process ahead of the first request, which would otherwise wait seconds for it.

        Without xgrammar nothing happens; requests that need it are then refused one by one.
        """
        if find_spec("xgrammar") is not None:
            with self._lock:
                self._prepare().start()

    def constraint(self, structured: StructuredOutput, field: str | None = None, salt: str = "") -> Constraint:
        """The constraint of one request, at the beginning of its text.

        Args:
            structured: what the text must look like.
            field: what errors call it; None takes `structured_outputs.<kind>`.
            salt: compiled grammars are shared by callers of one salt only: time must not tell what others asked for.

        Raises:
            RequestError: it is invalid, allows nothing, or is too big, too slow or too hungry; or xgrammar is missing.
            BusyError: the compiler's process does not start, or has been closed.
        """
        found = self._constraint(structured, field, salt, self._compiled)
        assert found is not None, "compiled or refused"
        return found

    def known(self, structured: StructuredOutput, field: str | None = None, salt: str = "") -> Constraint | None:
        """The same if it has been compiled already; returns at once.

        Raises:
            RequestError: it has been refused already, or is too big.
        """
        return self._constraint(structured, field, salt, self._cache.get)

    def _constraint(
        self, structured: StructuredOutput, field: str | None, salt: str, find: Callable[[Key], Any]
    ) -> Constraint | None:
        field = field or f"structured_outputs.{structured.kind}"
        try:
            found = find((salt, structured.kind, self._source(structured)))
            if isinstance(found, Problem):
                raise found
        except Problem as problem:
            raise RequestError(problem.message, field=field, fix=problem.fix) from None
        if found is None:
            return None
        from xgrammar import GrammarMatcher

        return GrammarConstraint(
            GrammarMatcher(found),
            vocab_size=self._vocab_size,
            eos_token_ids=self._eos,
            encode=self._encode,
            silent=self._silent,
            field=field,
            max_seconds=self._max_token_seconds,
        )

    def close(self) -> None:
        """End the compiler's process, also in the middle of its work. Constraints that were handed out stay valid."""
        self._closed = True
        if self._process is not None:
            self._process.close(forever=True)

    def _source(self, structured: StructuredOutput) -> str:
        """The text to compile, within its limits."""
        kind = structured.kind
        if kind == "choice" and len(structured.choice) > self._max_choices:
            raise Problem(f"has {len(structured.choice)} texts, and may have {self._max_choices}.", "Give fewer.")
        value = getattr(structured, kind)
        parts = value if kind == "choice" else [] if kind == "json_object" else [value]
        try:
            size = sum(len(part.encode()) for part in parts)
        except UnicodeEncodeError:
            raise Problem("is not valid Unicode text.") from None
        if size > self._max_text:
            raise Problem(f"has {size} bytes, and may have {self._max_text}.", "Shorten it.")
        return json.dumps(value) if kind == "choice" else "".join(parts)

    def _compiled(self, key: Key) -> CompiledGrammar:
        found = self._cache.get(key)
        if found is None:
            if find_spec("xgrammar") is None:
                raise Problem("needs xgrammar, which is not installed.", "Run: pip install 'paceline[serve]'")
            if not self._eos:
                raise Problem("needs an end token, and this model has none.")
            with self._lock:  # whoever waited takes what the first one made
                found = self._cache.get(key) or self._compile(key)
        if isinstance(found, Problem):
            raise Problem(found.message, found.fix)
        return found

    def _compile(self, key: Key) -> CompiledGrammar | Problem:
        """Compile and remember, refusals too: who sends a hopeless grammar again shall not occupy the process again."""
        from xgrammar import CompiledGrammar

        if self._closed:
            raise BusyError("the engine is closing.")
        process = self._prepare()
        found: CompiledGrammar | Problem
        try:
            serialised = process.compile(*key[1:])
            size = len(serialised)
            assert self._info is not None, "prepared above"
            found = CompiledGrammar.deserialize_json(serialised.decode(), self._info)
        except OSError as error:
            raise BusyError(f"grammars cannot be compiled: {error}.", fix="Try again later.") from error
        except Problem as problem:
            found, size = problem, 0
        self._cache.put(key, found, size + len(key[2]))
        return found

    def _prepare(self) -> CompilerProcess:
        """The process, not necessarily started."""
        if self._process is None:
            from xgrammar import TokenizerInfo

            self._info = TokenizerInfo.from_huggingface(
                self._tokenizer, vocab_size=self._vocab_size, stop_token_ids=list(self._eos)
            )
            self._silent = frozenset(self._info.special_token_ids) - frozenset(self._eos)
            self._process = CompilerProcess(
                self._info.serialize_json().encode(), seconds=self._time_limit, memory=self._memory_limit
            )
        return self._process

    def _tokens_of(self, text: str) -> tuple[int, ...]:
        """Token ids of a text in the middle of another, where no tokenizer puts a space in front."""
        encode = self._tokenizer.backend_tokenizer.encode
        if self._info is None or not self._info.add_prefix_space:
            return tuple(encode(text, add_special_tokens=False).ids)
        before = encode(_PROBE_TEXT, add_special_tokens=False).ids
        both = encode(_PROBE_TEXT + text, add_special_tokens=False).ids
        return tuple(both[len(before) :]) if both[: len(before)] == before else ()


Key = tuple[str, str, str]
"""Salt, kind and source."""


class _Cache:
    """The least recently used go first. Its own lock, so that a hit never waits for a compilation."""

    def __init__(self, entries: int, size: int) -> None:
        self._most_entries = entries
        self._most_bytes = size
        self._items: OrderedDict[Key, tuple[Any, int]] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def get(self, key: Key) -> CompiledGrammar | Problem | None:
        with self._lock:
            if key not in self._items:
                return None
            self._items.move_to_end(key)
            found: CompiledGrammar | Problem = self._items[key][0]
            return found

    def put(self, key: Key, found: CompiledGrammar | Problem, size: int) -> None:
        with self._lock:
            self._items[key] = found, size
            self._bytes += size
            while len(self._items) > self._most_entries or (self._bytes > self._most_bytes and len(self._items) > 1):
                self._bytes -= self._items.popitem(last=False)[1][1]
