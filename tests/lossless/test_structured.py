"""Structured output is exact under speculation: its law is that of plain constrained decoding, whatever drafts.

By enumeration on a tiny vocabulary (every outcome, error below 1e-12), by the joint law over the whole engine loop
(chi-square, odds of a false alarm 1e-6 each), by one text for one seed across drafters, and by parsing what comes out.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import fakes
import numpy as np
import pytest
import torch
from lossless.loop import FALSE_ALARM, PROMPT, VOCAB, Tiny, make_tiny, run
from lossless.real import real_llm
from lossless.reference import Floats, model_rows, slow_law

from paceline import LLM, SamplingParams, StructuredOutput
from paceline.bench.laws import (
    Context,
    Draft,
    LawOf,
    ScriptedLaw,
    ScriptedNoise,
    chosen_chain,
    error_of,
    random_laws,
    sampled_chain,
)
from paceline.constrain.compiler import Grammars
from paceline.constrain.matcher import GrammarConstraint
from paceline.draft.base import NOTHING, Proposal, chain
from paceline.draft.drafting import _allowed
from paceline.engine.request import FinishReason, Request
from paceline.engine.sampling import build_law
from paceline.model.loader import LoadedModel
from paceline.verify.coupled import CoupledRule
from paceline.verify.rejection import RejectionRule

xgrammar = pytest.importorskip("xgrammar")
EXACT = 1e-12
BROKEN = 1e-3

# By enumeration: four tokens, of which one is the end.

WORDS = ["a", "b", "ab", "</s>"]
END = 3
GRAMMARS = (
    'root ::= "a" x | "b" "b" x\nx ::= "b" | "a" x | ""',
    'root ::= ("ab" | "b")* "a"',
    'root ::= "ab" "ab" "b"?',
)
WARPS: dict[str, dict[str, Any]] = {
    "plain": {},
    "temperature": {"temperature": 0.6},
    "top_k": {"top_k": 2},
    "top_p": {"top_p": 0.75},
    "min_p": {"min_p": 0.3},
    "penalties": {"presence_penalty": 0.7, "repetition_penalty": 1.3, "logit_bias": {0: 0.5}, "min_tokens": 3},
    "greedy": {"temperature": 0.0},
}


@cache
def _compiled(grammar: str) -> Any:
    info = xgrammar.TokenizerInfo(WORDS, vocab_size=len(WORDS), stop_token_ids=[END])
    return xgrammar.GrammarCompiler(info, max_threads=1).compile_grammar(grammar)


def constraint_after(grammar: str, context: Sequence[int]) -> GrammarConstraint | None:
    """The constraint after committed tokens; None behind an end or a forbidden token, where the engine never comes."""
    found = GrammarConstraint(
        xgrammar.GrammarMatcher(_compiled(grammar)),
        vocab_size=len(WORDS),
        eos_token_ids=[END],
        encode=lambda text: [WORDS.index(c) for c in text],
        silent=frozenset(),
        field="test",
    )
    for token in context:
        allowed = found.allowed()
        if allowed is None or not allowed[token]:
            return None
        found.advance(token)
    return found


def masked(seed: int, grammar: str, params: SamplingParams) -> LawOf:
    """Random laws under a grammar, made by the engine's own code."""

    @cache
    def law(context: Context) -> Any:
        row = np.random.default_rng([seed, *context]).normal(0, 1.5, len(WORDS)).astype(np.float32)
        constraint = constraint_after(grammar, context)
        allowed = None if constraint is None else constraint.allowed()
        made = build_law(row, params, [0], context, [END], allowed)
        return ScriptedLaw(made.logits, made.ids)

    return law


def pruned(draft: Draft, grammar: str) -> Draft:
    """What the draft stage makes of a proposal."""

    def made(context: Context, noise: ScriptedNoise, position: int) -> Proposal:
        proposal = draft(context, noise, position)
        request = Request("r", [0], 1, SamplingParams(), 0, constraint=constraint_after(grammar, context))
        return _allowed(proposal, request)

    return made


def dictated(grammar: str) -> Draft:
    """The drafter `grammar`."""

    def made(context: Context, _noise: ScriptedNoise, _position: int) -> Proposal:
        constraint = constraint_after(grammar, context)
        tokens = constraint.jump(3).tokens if constraint is not None else ()
        return chain(tokens, [0] * len(tokens)) if tokens else NOTHING

    return made


@pytest.mark.parametrize("warp", WARPS)
@pytest.mark.parametrize("grammar", GRAMMARS)
def test_the_law_is_that_of_plain_constrained_decoding(grammar: str, warp: str) -> None:
    """Every kind of draft under both rules, also a sampled chain that knows nothing of the grammar."""
    params = SamplingParams(**WARPS[warp])
    p, q, blind = masked(1, grammar, params), masked(2, grammar, params), random_laws(3, len(WORDS), params)
    likely: Callable[[Context], int] = lambda context: int(blind(context).probabilities(len(WORDS)).argmax())  # noqa: E731
    drafts = {
        "sampled under the grammar": sampled_chain(q, 2),
        "sampled without it, kept whole": sampled_chain(blind, 2),
        "chosen": chosen_chain(likely, 3),
        "chosen and pruned": pruned(chosen_chain(likely, 3), grammar),
        "dictated": dictated(grammar),
    }
    for rule in (RejectionRule(), CoupledRule()):
        for name, draft in drafts.items():
            assert error_of(rule, p, draft, len(WORDS), length=3) < EXACT, f"{name} under {rule.name}"


def test_cutting_a_sampled_chain_by_the_grammar_is_caught() -> None:
    """A sampled token that is dropped because the grammar forbids it biases what is committed instead."""
    grammar = GRAMMARS[0]
    p, blind = masked(1, grammar, SamplingParams()), random_laws(3, len(WORDS), SamplingParams())

    def cut(context: Context, noise: ScriptedNoise, position: int) -> Proposal:
        proposal = sampled_chain(blind, 2)(context, noise, position)
        constraint = constraint_after(grammar, context)
        kept = 2 if constraint is None else len(constraint.surviving(proposal.tokens, proposal.parents))
        laws = proposal.laws or ()
        return chain(proposal.tokens[:kept].tolist(), [0] * kept, laws[:kept]) if kept else NOTHING

    assert error_of(RejectionRule(), p, sampled_chain(blind, 2), len(WORDS), length=3) < EXACT
    assert error_of(RejectionRule(), p, cut, len(WORDS), length=3) > BROKEN


def test_a_law_without_the_mask_is_caught() -> None:
    p, unmasked = masked(1, GRAMMARS[0], SamplingParams()), random_laws(1, len(WORDS), SamplingParams())
    assert float(np.abs(p(()).probabilities(4) - unmasked(()).probabilities(4)).max()) > BROKEN


# The joint law of the first two tokens over the whole engine loop

LOOP_GRAMMAR = """root ::= ("w3" (("w5" | "w6") | "w4w7") | "w4" [w] ("3" | "5" | "7") | "w5" "w6" | "w7") rest
rest ::= "w3" rest | "w5" rest | "w4w4w4w4w4w4"
"""
LOOP_OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "top_p": {"top_p": 0.8},
    "penalties": {"presence_penalty": 0.8, "repetition_penalty": 1.3, "logit_bias": {5: 0.7}, "temperature": 0.8},
}
SPECS = (
    "none",
    "grammar:k=3",
    "ngram:k=2+grammar:k=2",
    "recycling:k=4",
    "draft:k=2,model=DRAFT",
    "grammar:k=1+draft:k=2,model=DRAFT",
    "grammar+ngram+recycling@auto",
)
FAST = (
    ("draft:k=2,model=DRAFT", "rejection", "top_p"),
    ("grammar:k=3", "rejection", "plain"),
    ("ngram:k=2+grammar:k=2", "coupled", "penalties"),
)
CASES = [(s, r, o) for s in SPECS for r in ("coupled", "rejection") for o in LOOP_OPTIONS if (s, r, o) not in FAST]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return make_tiny(tmp_path_factory.mktemp("draft"))


@pytest.fixture(scope="module")
def words() -> Iterator[Grammars]:
    found = Grammars(fakes.make_tokenizer(VOCAB), VOCAB, (2,))
    yield found
    found.close()


def _constrained_joint(tiny: Tiny, params: SamplingParams) -> Floats:
    """Joint law of the first two tokens: the model's logits, masked by a list of what the grammar allows.

    # [vocab, vocab]
    """
    follows = {3: [5, 6, 4], 4: [3, 5, 7], 5: [6], 7: [3, 5, 4]}
    joint = np.zeros((VOCAB, VOCAB))
    first = slow_law(_only(model_rows(tiny.plain, PROMPT)[-1], list(follows)), params, PROMPT, [])
    for token, after in follows.items():
        row = model_rows(tiny.plain, [*PROMPT, token])[-1]
        joint[token] = first[token] * slow_law(_only(row, after), params, PROMPT, [token])
    return joint


def _only(row: np.ndarray, tokens: list[int]) -> np.ndarray:
    allowed = np.full_like(row, -np.inf)
    allowed[tokens] = row[tokens]
    return allowed


@pytest.mark.parametrize(
    ("speculation", "rule", "options"), [*FAST, *(pytest.param(*case, marks=pytest.mark.slow) for case in CASES)]
)
def test_the_joint_law_of_two_tokens(tiny: Tiny, words: Grammars, speculation: str, rule: str, options: str) -> None:
    params = {**LOOP_OPTIONS[options], "structured": StructuredOutput(grammar=LOOP_GRAMMAR)}
    with sharing(tiny.llm(speculation, rule=rule), words) as llm:
        runs = run(llm, params, 3072)
    joint = _constrained_joint(tiny, SamplingParams(max_tokens=9, **LOOP_OPTIONS[options]))
    assert joint.sum() == pytest.approx(1.0)
    assert runs.law_p_value(joint) > FALSE_ALARM
    assert runs.independence_p_value() > FALSE_ALARM
    if "auto" not in speculation and speculation != "none":
        assert runs.accepted > 100, "too few drafts were accepted for the test to mean anything"
    if speculation == "none":
        assert runs.drafted == 0


def test_a_mask_that_is_forgotten_behind_the_root_is_caught(
    tiny: Tiny, words: Grammars, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Broken: nodes of the draft take the root's mask."""
    real = GrammarConstraint.allowed
    monkeypatch.setattr(GrammarConstraint, "allowed", lambda self, _path=(): real(self))
    monkeypatch.setattr(GrammarConstraint, "advance", lambda *_: None)
    params = {"structured": StructuredOutput(grammar=LOOP_GRAMMAR)}
    with sharing(tiny.llm("recycling:k=4"), words) as llm:
        runs = run(llm, params, 1024)
    assert runs.law_p_value(_constrained_joint(tiny, SamplingParams())) < FALSE_ALARM


# Texts on a byte-level vocabulary with tokens of several characters

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "kind": {"enum": ["red", "green", 'a "b"', None, 12]},
        "tags": {"type": "array", "items": {"type": "string", "pattern": "^[a-z]{1,4}$"}, "maxItems": 3},
        "inner": {
            "type": "object",
            "properties": {"age": {"type": "integer", "minimum": 0, "maximum": 120}, "true": {"type": "boolean"}},
            "required": ["age"],
        },
        "value": {"type": "number", "minimum": 0, "maximum": 2},
    },
    "required": ["name", "kind", "inner", "value"],
}
ROWS = {"type": "array", "items": {"type": "array", "items": {"enum": [True, None, 7]}, "maxItems": 3}, "maxItems": 4}
UNION = {
    "anyOf": [
        {"type": "object", "properties": {"kind": {"const": "red"}, "name": {"type": "string", "maxLength": 9}}},
        {"type": "string", "format": "date"},
        {"type": "null"},
    ]
}
SCHEMAS = (PERSON, ROWS, UNION)
BYTE_SPECS = (
    "grammar:k=8",
    "ngram:k=4",
    "recycling:k=12",
    "prediction:k=6",
    "draft:k=3,model=DRAFT",
    "grammar:k=6+ngram:k=3+recycling:k=8+draft:k=2,model=DRAFT",
    "auto",
    "grammar+recycling+draft:model=DRAFT@auto",
    "rapid:k=3,start=1,chunk=1,budget=1,question=1,model=DRAFT",
)
MIXES: tuple[dict[str, Any], ...] = (
    {"temperature": 0.0},
    {},
    {"top_p": 0.8, "min_tokens": 100},
    {"top_k": 9, "temperature": 1.4},
    {"repetition_penalty": 1.3, "presence_penalty": 0.4, "ignore_eos": True},
    {"logprobs": 2, "prediction": '{"name": "the", "kind": "green"'},
)


@dataclass(frozen=True)
class Bytes:
    """A random model that writes bytes, and a draft model that often agrees with it."""

    loaded: LoadedModel
    draft: Path
    grammars: Grammars

    def llm(self, speculation: str = "none", **options: Any) -> LLM:
        """An LLM; `DRAFT` in the spec stands for the draft model's folder. All compile in one process."""
        llm = fakes.make_llm(self.loaded, speculation=speculation.replace("DRAFT", f'"{self.draft}"'), **options)
        return sharing(llm, self.grammars)


def sharing(llm: LLM, grammars: Grammars) -> LLM:
    """The LLM with grammars that outlive it."""
    llm._grammars = cast(Grammars, SimpleNamespace(constraint=grammars.constraint, close=lambda: None))
    return llm


@pytest.fixture(scope="module")
def writer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bytes]:
    folder = tmp_path_factory.mktemp("bytes")
    shape: dict[str, Any] = {"num_hidden_layers": 1, "initializer_range": 0.2}
    target, draft = fakes.make_byte_loaded(**shape), fakes.make_byte_loaded(**shape)
    torch.manual_seed(9)
    with torch.no_grad():
        draft.model.lm_head.weight.add_(torch.randn_like(draft.model.lm_head.weight) * 0.1)
    draft.model.save_pretrained(folder)
    draft.tokenizer.save_pretrained(folder)
    grammars = Grammars(target.tokenizer, fakes.BYTE_VOCAB, (2,))
    yield Bytes(target, folder, grammars)
    grammars.close()


def _params(schema: Any, seed: int, **options: Any) -> SamplingParams:
    return SamplingParams(
        **{"max_tokens": 200, "seed": seed, "structured": StructuredOutput(json_schema=schema), **options}
    )


def _fits(value: Any, schema: Any) -> bool:
    """A small validator for what `SCHEMAS` use."""
    if "anyOf" in schema:
        return any(_fits(value, inner) for inner in schema["anyOf"])
    if "enum" in schema or "const" in schema:
        return any(value == v and type(value) is type(v) for v in schema.get("enum", [schema.get("const")]))
    kinds = {"object": dict, "array": list, "string": str, "integer": int, "number": (int, float), "boolean": bool}
    if not isinstance(value, kinds.get(schema["type"], type(None))):
        return False
    if schema["type"] == "object":
        known = schema["properties"]
        return set(schema.get("required", ())) <= set(value) <= set(known) and all(
            _fits(v, known[k]) for k, v in value.items()
        )
    if schema["type"] == "array":
        return len(value) <= schema["maxItems"] and all(_fits(v, schema["items"]) for v in value)
    if schema["type"] in ("integer", "number"):
        return bool(schema["minimum"] <= value <= schema["maximum"])
    return not isinstance(value, str) or len(value) <= schema.get("maxLength", 10)


def _outputs(llm: LLM, jobs: Sequence[SamplingParams]) -> list[Any]:
    prompts = [[5 + i, 9, 12, 9] for i in range(len(jobs))]
    return [o for g in llm.generate(prompts, list(jobs)) for o in g.outputs]


def _jobs() -> tuple[list[SamplingParams], list[Any]]:
    pairs = [(schema, mix) for schema in SCHEMAS for mix in MIXES]
    return [_params(schema, i, **mix) for i, (schema, mix) in enumerate(pairs)], [schema for schema, _ in pairs]


@pytest.fixture(scope="module")
def plain(writer: Bytes) -> list[Any]:
    """What comes without speculation."""
    with writer.llm() as llm:
        return _outputs(llm, _jobs()[0])


def test_every_text_is_json_that_fits(plain: list[Any]) -> None:
    for output, schema in zip(plain, _jobs()[1], strict=True):
        assert output.error is None
        assert output.finish_reason == FinishReason.STOP
        assert _fits(json.loads(output.text), schema), output.text
    assert len({o.text for o in plain}) > len(plain) // 2, "the texts hardly differ, so little is tested"


def _shown(text: str) -> str:
    """The text with a character for each that the grammar counted: xgrammar lets bytes pass that spell a surrogate
    (ED B9 B6 here), and decoding shows a mark for each of the three."""
    return text.replace(3 * "\ufffd", "\ufffd")


@pytest.mark.parametrize("speculation", BYTE_SPECS)
def test_one_text_for_one_seed(writer: Bytes, plain: list[Any], speculation: str) -> None:
    """Greedy and sampled, in one mixed batch; under `rejection` the text may differ, but fits."""
    jobs, schemas = _jobs()
    with writer.llm(speculation) as llm:
        found = _outputs(llm, jobs)
        assert set(llm.engine.stages.drafting.drafters) == set(llm.engine.drafter_names), "a drafter was left out"
    assert [(o.token_ids, o.text, o.finish_reason) for o in found] == [
        (o.token_ids, o.text, o.finish_reason) for o in plain
    ]
    if "auto" not in speculation:
        assert sum(o.stats.accepted_tokens for o in found) > 0
    with writer.llm(speculation, rule="rejection") as llm:
        for output, schema, params in zip(_outputs(llm, jobs), schemas, jobs, strict=True):
            assert output.error is None
            assert _fits(json.loads(_shown(output.text)), schema), (params, output.text, output.token_ids)


def test_forced_tokens_are_always_accepted(writer: Bytes) -> None:
    grammar = 'root ::= "ZZZZ" [a-z] "QQQQ" [a-z] "name" "ZZ"'
    with writer.llm("grammar:k=8") as llm:
        params = SamplingParams(seed=1, structured=StructuredOutput(grammar=grammar))
        output = _outputs(llm, [params])[0]
        policy = llm.engine.stages.policy
        assert policy is not None
        tables = policy._estimates.tables()["grammar"]  # type: ignore[attr-defined]
    assert len(output.text) == 16
    assert output.stats.target_forwards < len(output.token_ids) - 6
    assert tables[0] > 1.0 - 1e-8


def test_preemption_n_and_small_memory(writer: Bytes) -> None:
    """Eight samples in a cache that holds about three of them: preempted, resumed, and the same texts."""
    jobs = [_params(PERSON, 3, n=4), _params(PERSON, 4, n=4)]
    with writer.llm() as llm:
        expected = [o.text for o in _outputs(llm, jobs)]
    token_bytes = 2 * 1 * 2 * 8 * 4
    small = {"kv_cache_memory": 20 * 16 * token_bytes, "max_model_len": 256, "enable_prefix_caching": False}
    with writer.llm("grammar:k=4+recycling:k=6", **small) as llm:
        found = _outputs(llm, jobs)
    assert [o.text for o in found] == expected
    assert len(set(expected)) == 8
    assert sum(o.stats.preemptions for o in found) > 0


def test_a_cancelled_request_and_one_whose_grammar_fails_disturb_nobody(
    writer: Bytes, plain: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = _jobs()[0]
    real = GrammarConstraint.allowed
    calls = 0

    def allowed(self: GrammarConstraint, path: Sequence[int] = ()) -> Any:
        nonlocal calls
        calls += self is broken
        if self is broken and calls > 9:
            raise RuntimeError("broken on purpose")
        return real(self, path)

    monkeypatch.setattr(GrammarConstraint, "allowed", allowed)
    with writer.llm("grammar:k=4+draft:k=2,model=DRAFT") as llm:
        requests = [r for i, p in enumerate(jobs) for r in llm._requests([5 + i, 9, 12, 9], p, "")]
        broken = requests[0].constraint
        for request in requests:
            llm.engine.add(request)
        ended = {o.request_id: o for _ in range(2) for o in llm.engine.step().outputs if o.finish_reason}
        llm.engine.abort(requests[1].id)
        while llm.engine.has_work:
            ended |= {o.request_id: o for o in llm.engine.step().outputs if o.finish_reason}
        assert set(llm.engine.stages.drafting.drafters) == {"grammar", "draft"}
    assert ended[requests[0].id].finish_reason == FinishReason.ERROR
    assert "broken on purpose" in ended[requests[0].id].error
    assert ended[requests[1].id].finish_reason == FinishReason.ABORT
    for request, output in list(zip(requests, plain, strict=True))[2:]:
        assert tuple(request.output_ids) == output.token_ids


def test_streaming_checking_and_closing(writer: Bytes, plain: list[Any]) -> None:
    jobs = _jobs()[0]
    llm = writer.llm("grammar:k=4")
    llm._grammars = None
    llm.check([5, 9], jobs[0])
    pieces = [piece for chunk in llm.stream([6, 9, 12, 9], jobs[1]) for piece in chunk.pieces]
    assert "".join(pieces) == plain[1].text
    llm.close()
    assert _outputs(llm, jobs[:1])[0].text == plain[0].text, "a closed LLM starts the compiler again"
    llm.close()


# The real model

REAL_SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 24},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "likes": {"type": "array", "items": {"enum": ["chess", "tennis", "cooking"]}, "minItems": 1, "maxItems": 3},
    },
    "required": ["name", "age", "likes"],
}


@pytest.mark.real_model
def test_real_model_answers_by_schema(real_model: LoadedModel) -> None:
    """With and without speculation: greedy, and at temperature 1 with a seed, in fp32."""
    question = [{"role": "user", "content": "Invent a person with name, age and what they like, as JSON."}]
    texts: dict[str, list[str]] = {}
    for speculation in ("none", "auto"):
        with real_llm(real_model, speculation, max_model_len=256) as llm:
            found = [
                llm.chat(
                    question,
                    SamplingParams(
                        temperature=t, seed=7, max_tokens=96, structured=StructuredOutput(json_schema=REAL_SCHEMA)
                    ),
                )[0]
                for t in (0.0, 1.0)
            ]
            texts[speculation] = [g.text for g in found]
            for generation in found:
                person = json.loads(generation.text)
                assert set(person) == {"name", "age", "likes"}
                assert 0 <= person["age"] <= 120
                assert 1 <= len(person["likes"]) <= 3
            if speculation == "auto":
                assert sum(g.stats.accepted_tokens for g in found) > 0
    assert texts["none"] == texts["auto"]
