"""What systems are measured on: the real model, engines over it, prompts, a draft model, plain outputs.

Everything is made at its first use and shared by the tests of all systems, except engines, which are let go when a
system is done.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from paceline.bench.spec import Question, builtin_questions, parse_questions
from paceline.bench.systems.drafts import save_without_middle
from paceline.config import SamplingParams
from paceline.errors import InputError, RequestError
from paceline.llm import LLM
from paceline.model.draft_weights import BUILTIN, check_is_draft_or_model, is_draft, load_draft, ships
from paceline.model.loader import LoadedModel, load_model
from paceline.model.source import resolve_source
from paceline.outputs import Generation

MAX_MODEL_LEN = 1024
_KV_BYTES = 256 << 20
_BATCH = 10


class Context:
    """The model and what tests share.

    Args:
        model: built-in name, folder, GGUF file or hub id, or a loaded model.
        quick: fewer prompts and tokens.
        draft: draft model, as in `draft:model=DRAFT`; None makes one by dropping layers.
        drafts: folders of draft models to be studied, as `paceline train draft` exports them.
        traces: folder of recorded outputs (`*.jsonl`) and cost tables (`*.json`) for replays; None takes the examples.
        say: told what is being done.
    """

    def __init__(
        self,
        model: str | LoadedModel = "smollm2-135m",
        *,
        quick: bool = False,
        draft: str | None = None,
        drafts: Sequence[Path] = (),
        traces: Path | None = None,
        say: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._model = model
        self.quick = quick
        self._draft = draft
        self.drafts = drafts
        self._traces = traces
        self.say = say
        self._llms: dict[tuple[Any, ...], LLM] = {}
        self._made: dict[Hashable, Any] = {}
        self._plain: dict[tuple[tuple[int, ...], int, bool], tuple[int, ...]] = {}
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def once(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """What `make` returned at the first call with this key: figures that several systems share."""
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def few(self, full: int, quick: int) -> int:
        """How many, in this mode."""
        return quick if self.quick else full

    @cached_property
    def loaded(self) -> LoadedModel:
        """The target in fp32, in which outputs can be compared token for token."""
        if isinstance(self._model, LoadedModel):
            return self._model
        self.say(f"Loading {self._model}")
        return load_model(self._model, dtype="float32")

    def llm(self, speculation: str = "none", **options: Any) -> LLM:
        """An engine over the shared weights; the same one for the same settings."""
        key = (speculation, *sorted(options.items()))
        if key not in self._llms:
            self._llms[key] = LLM(self.loaded, speculation=speculation, **self._settings(options))
        return self._llms[key]

    def _settings(self, options: Mapping[str, Any]) -> dict[str, Any]:
        longest = min(MAX_MODEL_LEN, self.loaded.max_model_len)
        return {"max_model_len": longest, "kv_cache_memory": _KV_BYTES, **options}

    def fresh_llm(self, speculation: str, **options: Any) -> LLM:
        """A new engine in place of an earlier one of the same settings: nothing learnt, nothing cached."""
        old = self._llms.pop((speculation, *sorted(options.items())), None)
        if old is not None:
            old.close()
        return self.llm(speculation, **options)

    @cached_property
    def questions(self) -> tuple[Question, ...]:
        """The questions that ship with Paceline, all tasks mixed: the first of each task, then the second, ..."""
        lines = builtin_questions().read_text(encoding="utf-8").splitlines()
        by_task: dict[str, list[Question]] = {}
        for question in parse_questions((number, json.loads(line)) for number, line in enumerate(lines, start=1)):
            by_task.setdefault(question.category, []).append(question)
        longest = max(len(group) for group in by_task.values())
        return tuple(group[i] for i in range(longest) for group in by_task.values() if i < len(group))

    def prompts(self, count: int) -> list[list[int]]:
        """Token ids of the first `count` questions, as conversations where the model has a template."""
        return [self.encode(question.turns[0]) for question in self.questions[:count]]

    def encode(self, text: str) -> list[int]:
        """Token ids of a question."""
        llm = self.llm()
        if getattr(llm.tokenizer, "chat_template", None):
            return llm.chat_prompt([{"role": "user", "content": text}])
        return list(llm.tokenizer.encode(text))[: llm.engine.max_model_len // 4]

    def greedy(
        self, prompts: Sequence[Sequence[int]], max_tokens: int, *, alone: bool = False
    ) -> list[tuple[int, ...]]:
        """What the target says without speculation; computed once.

        Args:
            prompts: token ids.
            max_tokens: most output tokens.
            alone: one request at a time, not in batches.
        """
        params = SamplingParams(temperature=0.0, max_tokens=max_tokens)
        missing = [list(p) for p in prompts if (tuple(p), max_tokens, alone) not in self._plain]
        size = 1 if alone else _BATCH
        for start in range(0, len(missing), size):
            self.say(f"Plain greedy outputs ({start} of {len(missing)})")
            group = missing[start : start + size]
            for prompt, tokens in zip(group, tokens_of(self.llm().generate(group, params)), strict=True):
                self._plain[tuple(prompt), max_tokens, alone] = tokens
        return [self._plain[tuple(prompt), max_tokens, alone] for prompt in prompts]

    def check_draft(self) -> None:
        """Find out before the tests whether the draft model that was given can draft for the target.

        Raises:
            InputError: there is none of that name, or it is made for another target.
        """
        if self._draft is not None:
            check_is_draft_or_model(self._draft)
            if not is_draft(self._draft):
                resolve_source(self._draft)
            self.llm(self.draft("k=1"))
            self.release()

    @cached_property
    def draft_model(self) -> str:
        """A draft model of the target: the one that was given; else the trained one where one ships; else the target
        without a few of its layers, which costs about as much as it does."""
        if self._draft is not None:
            return self._draft
        if ships(self.loaded):
            return BUILTIN
        self._folder = tempfile.TemporaryDirectory(prefix="paceline-draft-")
        self.say("Making a draft model by dropping layers")
        return str(save_without_middle(self.loaded, Path(self._folder.name)))

    @cached_property
    def draft_llm(self) -> LLM:
        """The draft model as a model of its own, for its laws."""
        name = self.draft_model
        loaded = load_draft(name, self.loaded) if is_draft(name) else load_model(name, dtype="float32")
        return LLM(loaded, speculation="none", **self._settings({}))

    def draft(self, options: str) -> str:
        """A speculation setting with the draft model: `context.draft("k=4")`."""
        return f'draft:model="{self.draft_model}",{options}'

    @cached_property
    def traces(self) -> tuple[list[Path], list[Path]]:
        """Recorded outputs, and cost tables.

        Raises:
            InputError: there are none.
        """
        folders = [self._traces] if self._traces is not None else _example_folders()
        outputs = sorted(path for folder in folders for path in folder.glob("*.jsonl"))
        tables = sorted(path for folder in folders for path in folder.glob("*.json"))
        if not tables and self._traces is not None:
            tables = sorted(path for folder in _example_folders() for path in folder.glob("*.json"))
        if not outputs or not tables:
            where = self._traces or "the examples beside the package"
            raise InputError(f"{where} hold no recorded outputs with a cost table.", field="--traces", fix=_TRACES_FIX)
        return outputs, tables

    def release(self) -> None:
        """Close all engines."""
        for llm in self._llms.values():
            llm.close()
        self._llms.clear()

    def close(self) -> None:
        """Close all engines and remove the draft model."""
        self.release()
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None


_TRACES_FIX = (
    "Give --traces a folder with *.jsonl as `paceline bench replay` reads and *.json as `paceline profile` writes."
)


def _example_folders() -> list[Path]:
    """The repository's examples, where there is a repository."""
    root = Path(__file__).resolve().parents[3] / "examples"
    return [root, root / "costs"]


def tokens_of(generations: Sequence[Generation]) -> list[tuple[int, ...]]:
    """Output tokens of single-sample generations.

    Raises:
        RequestError: one failed.
    """
    for generation in generations:
        error = generation.outputs[0].error
        if error is not None:
            raise RequestError(f"a request failed: {error}")
    return [tuple(generation.token_ids) for generation in generations]
