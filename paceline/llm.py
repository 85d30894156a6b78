"""Offline use: load a model once, generate, chat, stream."""

from __future__ import annotations

import itertools
import logging
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from numbers import Integral
from typing import Any, cast

from paceline.config import EngineConfig, SamplingParams
from paceline.constrain.compiler import Grammars
from paceline.engine.builder import build_engine
from paceline.engine.constraint import Constraint
from paceline.engine.garbage import leave_out_what_is_loaded
from paceline.engine.request import Request
from paceline.engine.rng import fresh_seed
from paceline.engine.speculation import check_speculation
from paceline.errors import ConfigError, RequestError, SamplingParamsError
from paceline.model.loader import LoadedModel, load_model
from paceline.outputs import Collector, Generation, StreamChunk

logger = logging.getLogger(__name__)
Prompt = str | Sequence[int]
Messages = Sequence[Mapping[str, Any]]


class LLM:
    """A model with an engine.

    Args:
        model: built-in name, local folder, GGUF file or hub id; or an already `LoadedModel`, to share weights.
        speculation: `none`, `auto` or a spec such as `ngram:k=4+recycling:k=16`.
        on_progress: called with a short text at every stage of loading.
        **options: fields of `EngineConfig`.

    Raises:
        ConfigError: an unknown or impossible option, or one that this model has no use for.
        ModelError: the model cannot be found or run.
    """

    def __init__(
        self,
        model: str | LoadedModel,
        *,
        speculation: str = "auto",
        on_progress: Callable[[str], None] = lambda _: None,
        **options: Any,
    ) -> None:
        self.config = EngineConfig.from_options({"speculation": speculation, **options})
        check_speculation(self.config)
        if isinstance(model, str):
            on_progress(f"loading {model}")
            model = load_model(
                model,
                dtype=self.config.dtype,
                device=self.config.device,
                activations=self.config.activations,
                trust_remote_code=self.config.trust_remote_code,
            )
        if self.config.activations != "auto" and not model.kept_kinds:
            raise ConfigError(
                f"is for weights in 4 and 8 bits, and {model.name} runs in {model.precision} here.",
                field="activations",
                fix="Leave it out; dtype sets the number format of everything.",
            )
        self.loaded = model
        self.engine = build_engine(self.config, model, on_progress)
        self._grammars: Grammars | None = None
        self._ids = itertools.count()
        self._open: dict[str, Collector] = {}
        self._thaw = leave_out_what_is_loaded(self)

    @property
    def model_name(self) -> str:
        """The name the model was loaded by."""
        return self.loaded.name

    @property
    def tokenizer(self) -> Any:
        """The model's `transformers` tokenizer."""
        return self.loaded.tokenizer

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        cache_salt: str = "",
        on_finished: Callable[[int], None] = lambda _: None,
    ) -> list[Generation]:
        """Complete prompts (texts or token ids), all in one continuous batch.

        Args:
            prompts: one or many.
            params: one for all, or one per prompt; None takes the defaults.
            cache_salt: callers with different salts share no cached state.
            on_finished: called with the number of finished samples whenever it grows.

        Raises:
            RequestError: a prompt or option that cannot run; nothing has been generated then.
        """
        many = _as_many(prompts)
        per_prompt = _spread(params, len(many))
        groups = [self._requests(p, sp, cache_salt) for p, sp in zip(many, per_prompt, strict=True)]
        collectors = [Collector(r) for group in groups for r in group]
        self._open_all(collectors)
        finished = 0
        try:
            while finished < len(collectors):
                if self._advance() or not self.engine.has_work:  # `on_finished` may have run the engine, too
                    done, finished = finished, sum(c.finished for c in collectors)
                    if finished > done:
                        on_finished(finished)
        finally:
            self._close_all(collectors)
        by_id = {c.request.id: c for c in collectors}
        return [_generation(p, [by_id[r.id] for r in group]) for p, group in zip(many, groups, strict=True)]

    def check(self, prompt: Prompt | Messages, params: SamplingParams | None = None) -> None:
        """Check a prompt or conversation with its options without running it.

        Raises:
            RequestError: it cannot run; the message names the field.
        """
        for request in self._requests(self._as_prompt(prompt), params or SamplingParams(), ""):
            self.engine.validate(request)

    def chat(
        self,
        messages: Messages | Sequence[Messages],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        cache_salt: str = "",
        on_finished: Callable[[int], None] = lambda _: None,
    ) -> list[Generation]:
        """Answer one conversation or many, through the model's chat template.

        Raises:
            RequestError: a conversation the template cannot render.
        """
        many = [messages] if messages and isinstance(messages[0], Mapping) else list(messages)
        prompts = [self.chat_prompt(m) for m in many]  # type: ignore[arg-type]
        return self.generate(prompts, params, cache_salt=cache_salt, on_finished=on_finished)

    def stream(
        self, prompt: Prompt | Messages, params: SamplingParams | None = None, *, cache_salt: str = ""
    ) -> Iterator[StreamChunk]:
        """Generate one sample and yield its tokens step by step. Closing the iterator cancels the request.

        Args:
            prompt: text, token ids, or chat messages.
            params: with n = 1.
        """
        params = params or SamplingParams()
        if params.n != 1:
            raise SamplingParamsError("must be 1 when streaming.", field="n")
        plain = self._as_prompt(prompt)
        (request,) = self._requests(plain, params, cache_salt)
        self.engine.validate(request)
        return self._stream(plain, Collector(request, keeps_news=True))

    def _as_prompt(self, prompt: Prompt | Messages) -> Prompt:
        if not isinstance(prompt, str) and len(prompt) and isinstance(prompt[0], Mapping):
            return self.chat_prompt(cast(Messages, prompt))
        return cast(Prompt, prompt)

    def chat_prompt(self, messages: Messages) -> list[int]:
        """Token ids of a conversation, ready for the assistant's answer.

        Raises:
            RequestError: the model has no chat template, or it rejects the messages.
        """
        if not getattr(self.tokenizer, "chat_template", None):
            raise RequestError(
                f"{self.model_name} has no chat template.",
                field="messages",
                fix="Give a plain prompt instead.",
            )
        try:
            text = self.tokenizer.apply_chat_template(
                [dict(m) for m in messages], tokenize=False, add_generation_prompt=True
            )
        except Exception as error:
            raise RequestError(f"the chat template rejects them: {error}", field="messages") from error
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    def close(self) -> None:
        """Cancel everything that runs, and end the process that compiles grammars."""
        self.engine.abort_all()
        self._thaw()
        if self._grammars is not None:
            self._grammars.close()
            self._grammars = None

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _stream(self, prompt: Prompt, collector: Collector) -> Iterator[StreamChunk]:
        self._open_all([collector])
        try:
            while not collector.finished or collector.unread:
                while not collector.unread:
                    self._advance()
                news = collector.unread.popleft()
                done = news.finish_reason is not None
                yield StreamChunk(
                    news.token_ids,
                    news.pieces,
                    news.drafters,
                    news.logprobs,
                    news.finish_reason.value if news.finish_reason else None,
                    _generation(prompt, [collector]) if done else None,
                )
        finally:
            self._close_all([collector])

    def _advance(self) -> bool:
        """One step; its news goes to whoever waits for it, so that calls and streams may interleave.

        Returns:
            Whether anyone has got all there is.
        """
        ended = False
        for news in self.engine.step().outputs:
            if news.request_id in self._open:
                self._open[news.request_id].add(news)
                ended = ended or news.finish_reason is not None
        return ended

    def _open_all(self, collectors: Sequence[Collector]) -> None:
        """Start all requests or none."""
        try:
            for collector in collectors:
                self.engine.add(collector.request)
                self._open[collector.request.id] = collector
        except BaseException:
            self._close_all(collectors)
            raise

    def _close_all(self, collectors: Sequence[Collector]) -> None:
        """Stop listening, and cancel what has not ended."""
        for collector in collectors:
            if self._open.pop(collector.request.id, None) is not None and not collector.finished:
                self.engine.abort(collector.request.id)
        if not self._open and self.engine.has_work:
            self.engine.step()  # nothing runs any more: this only collects the news of the cancellations

    def _requests(self, prompt: Prompt, params: SamplingParams, salt: str) -> list[Request]:
        return make_requests(
            self.tokenizer, prompt, params, salt, f"r{next(self._ids)}", self._constraint(params, salt)
        )

    def _constraint(self, params: object, salt: str) -> Constraint | None:
        """Of a prompt's samples; the first one starts the compiler's process."""
        structured = params.structured if isinstance(params, SamplingParams) else None
        if structured is None:
            return None
        if self._grammars is None:
            self._grammars = Grammars(self.tokenizer, self.engine.vocab_size, self.engine.eos_token_ids)
        return self._grammars.constraint(structured, salt=salt)


def make_requests(
    tokenizer: Any,
    prompt: Prompt,
    params: SamplingParams,
    salt: str,
    request_id: str,
    constraint: Constraint | None = None,
) -> list[Request]:
    """One engine request per sample; later samples wait for the first one's prompt KV.

    Args:
        tokenizer: the model's.
        prompt: text or token ids.
        params: with `structured`, a constraint is needed, too.
        salt: callers with different salts share no cached state.
        request_id: of the sample, or what the samples' ids begin with.
        constraint: at the beginning of the text; every sample gets a copy.

    Raises:
        RequestError: the prompt is neither text nor token ids.
    """
    if not isinstance(params, SamplingParams):
        raise RequestError(f"must be SamplingParams, not {type(params).__name__}.", field="params")
    token_ids = _token_ids(tokenizer, prompt)
    predicted = tokenizer.encode(params.prediction, add_special_tokens=False) if params.prediction else ()
    seed = fresh_seed() if params.seed is None else params.seed
    requests: list[Request] = []
    for index in range(params.n):
        requests.append(
            Request(
                id=request_id if params.n == 1 else f"{request_id}-{index}",
                token_ids=list(token_ids),
                prompt_len=len(token_ids),
                params=params,
                seed=seed,
                sample_index=index,
                salt=salt,
                prediction_ids=tuple(predicted),
                constraint=None if constraint is None else constraint.fork(),
                leader=requests[0] if requests else None,
            )
        )
    return requests


def _token_ids(tokenizer: Any, prompt: object) -> list[int]:
    """Token ids of a prompt.

    Raises:
        RequestError: it is neither valid text nor a sequence of whole numbers.
    """
    if isinstance(prompt, str):
        try:
            prompt.encode()
        except UnicodeEncodeError as error:
            raise RequestError("is not valid Unicode text.", field="prompt") from error
        return list(tokenizer.encode(prompt))
    try:
        items = list(prompt)  # type: ignore[call-overload]
        ids = [operator.index(t) for t in items]
    except TypeError as error:
        raise RequestError("must be text or a sequence of token ids.", field="prompt") from error
    if any(isinstance(t, bool) for t in items):
        raise RequestError("must be text or a sequence of token ids.", field="prompt")
    return ids


def _as_many(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    if isinstance(prompts, str) or (_is_sequence(prompts) and len(prompts) and isinstance(prompts[0], Integral)):
        return [cast(Prompt, prompts)]
    if not _is_sequence(prompts):
        raise RequestError("must be text, token ids, or a list of those.", field="prompts")
    return list(cast(Sequence[Prompt], prompts))


def _is_sequence(value: object) -> bool:
    return hasattr(value, "__len__") and hasattr(value, "__getitem__") and not isinstance(value, Mapping)


def _spread(params: SamplingParams | Sequence[SamplingParams] | None, count: int) -> list[SamplingParams]:
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * count
    if not _is_sequence(params):
        raise RequestError(f"must be SamplingParams, not {type(params).__name__}.", field="params")
    if len(params) != count:
        raise RequestError(f"{len(params)} given for {count} prompts.", field="params")
    return list(params)


def _generation(prompt: Prompt, collectors: Sequence[Collector]) -> Generation:
    first = collectors[0].request
    wanted = first.params.prompt_logprobs is not None
    return Generation(
        prompt=prompt if isinstance(prompt, str) else None,
        prompt_token_ids=tuple(first.token_ids[: first.prompt_len]),
        outputs=tuple(c.completion() for c in collectors),
        prompt_logprobs=collectors[0].prompt_logprobs if wanted else None,
    )
