"""What the routes share: the engine behind its thread, tokenisation off the event loop, names, tenants, metrics."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from starlette.requests import Request as HTTPRequest

from paceline.config import SamplingParams
from paceline.constrain.compiler import Grammars
from paceline.engine.async_engine import AsyncEngine, RequestStream
from paceline.engine.constraint import Constraint
from paceline.engine.engine import Engine
from paceline.engine.request import Request
from paceline.errors import BusyError, PromptTooLongError, RequestError
from paceline.llm import Prompt, make_requests
from paceline.model.loader import LoadedModel
from paceline.server.admission import Admission
from paceline.server.config import ServerConfig
from paceline.server.errors import HTTPError
from paceline.server.gauges import EngineGauges
from paceline.server.metrics import Metrics
from paceline.server.parsers.detect import detect
from paceline.server.parsers.registry import MARKERS
from paceline.server.prompts import ChatTemplate
from paceline.server.protocol.common import SamplingBody
from paceline.server.tokens import TokenTexts

T = TypeVar("T")
_TOKENIZING_THREADS = 2
_MOST_COMPILING = 16
"""Requests that wait for a new grammar; they are compiled one by one."""


class Service:
    """A served model.

    Args:
        loaded: the model.
        engine: its engine, to be used by nobody else from now on.
        config: the server's settings.
    """

    def __init__(self, loaded: LoadedModel, engine: Engine, config: ServerConfig) -> None:
        self.loaded = loaded
        self.config = config
        self.names = config.served_model_name or (loaded.name,)
        self.created = int(time.time())
        self.max_model_len = engine.max_model_len
        self.metrics = Metrics(self.names[0], lambda: _gauges(engine), max_model_len=engine.max_model_len)
        self.engine = AsyncEngine(engine, self.metrics.on_news)
        self.admission = Admission(engine.stages.scheduler.max_num_seqs + config.max_queued_requests)
        self.tokens = TokenTexts(loaded.tokenizer, engine.vocab_size)
        self.grammars = Grammars(
            loaded.tokenizer,
            engine.vocab_size,
            loaded.eos_token_ids,
            time_limit=config.grammar_timeout,
            max_text=config.max_grammar_bytes,
        )
        self._longest_token = max(map(len, loaded.tokenizer.get_vocab()))
        template = getattr(loaded.tokenizer, "chat_template", None)
        detected = detect(template, getattr(loaded.config, "model_type", None))
        asked_for = detected.tool if detected.template_knows_tools else "hermes"  # `parsers.fallback` asks for it
        self.tool_format = _format(config.tool_call_parser, asked_for)
        self.reasoning_format = _format(config.reasoning_parser, detected.reasoning)
        self.template = ChatTemplate(loaded.tokenizer, loaded.name, detected.template_knows_tools)
        self.markers = _special_ids(loaded.tokenizer, MARKERS)
        self._num_compiling = 0
        self._tokenizing = ThreadPoolExecutor(_TOKENIZING_THREADS, thread_name_prefix="paceline-tokenize")
        self._compiling = ThreadPoolExecutor(1, thread_name_prefix="paceline-grammar")

    @property
    def status(self) -> str:
        """`ok`, `draining` or `dead`."""
        if not self.engine.is_alive:
            return "dead"
        return "draining" if self.admission.draining else "ok"

    def warm_up(self) -> None:
        """Begin in the background what the first request of its kind would otherwise wait for."""
        self._compiling.submit(self.grammars.start)
        self._tokenizing.submit(self.tokens.load)

    def stop_now(self) -> None:
        """Cancel what runs; returns at once, from the event loop's thread."""
        self.engine.stop()
        self.grammars.close()

    def close(self) -> None:
        """Cancel what runs, and end all threads and workers."""
        self.engine.shutdown()
        self.grammars.close()
        self._tokenizing.shutdown(wait=False, cancel_futures=True)
        self._compiling.shutdown(wait=False, cancel_futures=True)

    def check_model(self, name: str | None) -> str:
        """The name to answer with.

        Raises:
            HTTPError: 404, no such model.
        """
        if name is not None and name not in self.names:
            raise HTTPError(
                404,
                "no such model is served here.",
                field="model",
                fix=f"Served: {', '.join(self.names)}.",
                code="model_not_found",
            )
        return name or self.names[0]

    def reports_metrics(self, body: SamplingBody) -> bool:
        """Whether the answer carries speculation statistics."""
        always = self.config.per_request_spec_decode_metrics == "summary"
        return always or (body.speculation is not None and body.speculation.metrics)

    def salt(self, http: HTTPRequest, cache_salt: str | None) -> str:
        """The key of everything cached for this caller.

        Raises:
            HTTPError: 400, the tenant's header is missing.
        """
        tenant = ""
        name = self.config.tenant_header
        if name is not None:
            tenant = http.headers.get(name, "")
            if not tenant:
                raise HTTPError(400, "the tenant's header is missing.", field=name, code="tenant_missing")
        return f"{len(tenant)}:{tenant}{cache_salt or ''}" if tenant or cache_salt else ""

    async def off_loop(self, work: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        """Run something that takes a while (templates, tokenisation) without holding up the event loop."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._tokenizing, lambda: work(*args, **kwargs))

    def encode(self, text: str, *, add_special_tokens: bool, field: str) -> list[int]:
        """Token ids of a text.

        Raises:
            PromptTooLongError: it has more tokens than fit.
        """
        # Tokenising megabytes takes seconds; no token has more characters than the longest one.
        if len(text) > self.max_model_len * self._longest_token:
            raise PromptTooLongError(
                f"has more than the {self.max_model_len} tokens that prompt and output together may have.",
                field=field,
                fix="Shorten it.",
            )
        ids = list(self.loaded.tokenizer.encode(text, add_special_tokens=add_special_tokens))
        self.check_length(ids, field)
        return ids

    def check_length(self, ids: Sequence[int], field: str) -> None:
        """Refuse an empty prompt, and one that leaves no room for a token.

        Raises:
            PromptTooLongError, RequestError: see there.
        """
        if not ids:
            raise RequestError("is empty.", field=field, fix="Give at least one token.")
        if len(ids) >= self.max_model_len:
            raise PromptTooLongError(
                f"has {len(ids)} tokens, and prompt and output together may have {self.max_model_len}.",
                field=field,
                fix="Shorten it.",
            )

    async def constraint(self, params: SamplingParams, field: str | None, salt: str) -> Constraint | None:
        """The compiled grammar of `params.structured`.

        Raises:
            RequestError: it cannot be compiled within the limits.
            BusyError: too many wait.
        """
        wanted = params.structured
        if wanted is None:
            return None
        found = self.grammars.known(wanted, field, salt)
        if found is not None:
            return found
        if self._num_compiling >= _MOST_COMPILING:
            raise BusyError("too many new grammars are waiting to be compiled.", field=field, fix="Try again later.")
        loop = asyncio.get_running_loop()
        self._num_compiling += 1
        try:  # cancelled before its turn, it is not compiled
            return await loop.run_in_executor(self._compiling, lambda: self.grammars.constraint(wanted, field, salt))
        finally:
            self._num_compiling -= 1

    def requests(
        self, prompt: Prompt, params: SamplingParams, salt: str, constraint: Constraint | None
    ) -> list[Request]:
        """One engine request per sample."""
        return make_requests(self.loaded.tokenizer, prompt, params, salt, uuid.uuid4().hex, constraint=constraint)

    async def start(self, requests: Sequence[Request]) -> RequestStream:
        """Hand requests to the engine and wait until it has taken them in.

        Raises:
            RequestError: it refuses one, and runs none.
            EngineDeadError: it has stopped.
        """
        stream = self.engine.open(requests)
        try:
            await stream.accepted()
        except BaseException:
            stream.close()
            raise
        return stream


def _format(setting: str, detected: str | None) -> str | None:
    return {"auto": detected, "none": None}.get(setting, setting)


def _special_ids(tokenizer: Any, texts: Sequence[str]) -> tuple[int, ...]:
    """Those of the texts that are special tokens, which decoding leaves out."""
    special = {str(token): i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return tuple(special[text] for text in texts if text in special)


def _gauges(engine: Engine) -> EngineGauges:
    scheduler = engine.stages.scheduler
    counts = scheduler.blocks.counts()
    stats = engine.last_stats
    busy = stats if scheduler.has_work else None
    return EngineGauges(
        running=len(scheduler.running),
        waiting=len(scheduler.waiting),
        kv_blocks_total=scheduler.blocks.num_blocks,
        kv_blocks_used=counts.used,
        kv_blocks_cached=counts.cached,
        goodput=busy.num_committed / busy.step_seconds if busy else 0.0,
        look_ahead=busy.num_draft_nodes / max(busy.num_sampling, 1) if busy else 0.0,
        slot_price=engine.slot_price,
    )
