"""Compiling what users send: every bad source is refused with a sentence, and none of them harms the engine."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from fakes import BYTE_VOCAB, make_byte_tokenizer

from paceline import StructuredOutput
from paceline.constrain import compiler as compiler_module
from paceline.constrain.compiler import Grammars
from paceline.constrain.ebnf import endless_rules, read_rules, uses
from paceline.constrain.process import CompilerProcess
from paceline.constrain.schema import Problem, check_schema, check_structural_tag
from paceline.engine.constraint import Constraint
from paceline.errors import BusyError, RequestError

pytest.importorskip("xgrammar")
EOS = 2
MANY_OPTIONS = json.dumps({"type": "object", "properties": {f"k{i}": {"type": "string"} for i in range(1500)}})
"""Takes half a minute to compile."""


def make(**limits: Any) -> Grammars:
    return Grammars(make_byte_tokenizer(), BYTE_VOCAB, (EOS,), **limits)


@pytest.fixture(scope="module")
def grammars() -> Iterator[Grammars]:
    found = make()
    found.start()
    yield found
    found.close()


def structured(kind: str, value: Any) -> StructuredOutput:
    return StructuredOutput(**{kind: value})


def accepts(constraint: Constraint, text: str) -> bool:
    """Whether the text fits from beginning to end, token by token."""
    constraint = constraint.fork()
    for token in (*make_byte_tokenizer().encode(text, add_special_tokens=False), EOS):
        allowed = constraint.allowed()
        if allowed is None or not allowed[token]:
            return False
        constraint.advance(token)
    return True


def schema(**keywords: Any) -> str:
    return json.dumps(keywords)


TAG = {"begin": "<f>", "content": {"type": "json_schema", "json_schema": {"type": "integer"}}, "end": "</f>"}
FITTING: list[tuple[str, Any, list[str], list[str]]] = [
    ("json_object", True, ["{}", '{"a": [1, {"b": null}], "c": "é\\n"}'], ["[]", "3", '{"a": }', "{", '{"a":1}']),
    ("json_schema", {"type": "integer", "minimum": 3, "maximum": 40}, ["3", "40"], ["2", "41", "03", "3.0"]),
    ("json_schema", schema(enum=["é", 1, None, {"a": [1]}]), ['"é"', "1", "null", '{"a":[1]}'], ["2", '"e"']),
    ("json_schema", schema(type="string", enum=["a", "b"]), ['"a"'], ['"c"']),
    ("json_schema", schema(type="string", maxLength=3), ['""', '"abc"', '"é😀"'], ['"abcd"', '"a\t"', '"\x01"']),
    ("json_schema", schema(type="string", minLength=1), ['"a"'], ['""', '"\n"']),
    ("json_schema", schema(type="string", pattern="^[^b]{2}$"), ['"aa"'], ['"ab"', '"a""', '"a\\"', '"a\n"']),
    ("json_schema", schema(type=["string", "null"]), ["null", '"a\\u00e9"'], ["1"]),
    (
        "json_schema",
        schema(
            type="object",
            properties={"name": {"type": "string"}, "next": {"anyOf": [{"type": "null"}, {"$ref": "#"}]}},
            required=["name", "next"],
        ),
        ['{"name": "a", "next": null}', '{"name": "a", "next": {"name": "b", "next": null}}'],
        ['{"name": "a"}', '{"next": null, "name": "a"}', '{"name": "a", "next": null, "z": 1}'],
    ),
    (
        "json_schema",
        schema(
            oneOf=[
                {"type": "object", "properties": {"kind": {"const": k}, k: {"type": "null"}}, "required": ["kind", k]}
                for k in ("a", "b")
            ],
            discriminator={"propertyName": "kind"},
        ),
        ['{"kind": "b", "b": null}'],
        ['{"kind": "b", "a": null}'],
    ),
    ("regex", r"[a-c]{2}-\d+", ["ab-12"], ["ab", "ad-1", "ab-1x"]),
    ("choice", ('a"\\b', "é\n😀", "", "aa"), ['a"\\b', "é\n😀", "", "aa"], ["a", "é", "aaa"]),
    ("choice", "yes", ["yes"], ["no"]),
    ("grammar", 'root ::= "a" root "b" | ""', ["", "ab", "aaabbb"], ["aab", "b"]),
    (
        "structural_tag",
        {"type": "structural_tag", "format": {"type": "triggered_tags", "triggers": ["<f>"], "tags": [TAG]}},
        ["the end", "so <f>12</f> and"],
        ["so <f>x</f>"],
    ),
]


@pytest.mark.parametrize(("kind", "value", "good", "bad"), FITTING, ids=lambda v: v if isinstance(v, str) else "")
def test_what_fits(grammars: Grammars, kind: str, value: Any, good: list[str], bad: list[str]) -> None:
    constraint = grammars.constraint(structured(kind, value))
    assert [text for text in good if not accepts(constraint, text)] == []
    assert [text for text in bad if accepts(constraint, text)] == []


@pytest.mark.parametrize(
    ("kind", "value"), [case[:2] for case in FITTING], ids=lambda v: v if isinstance(v, str) else ""
)
def test_masks_hold_what_the_grammar_takes(grammars: Grammars, kind: str, value: Any) -> None:
    """Along random texts, every token: its bit in the mask says whether the matcher accepts it."""
    constraint = grammars.constraint(structured(kind, value))
    rng = np.random.default_rng(0)
    for _ in range(40):
        allowed = constraint.allowed()
        assert allowed is not None
        everything = np.arange(BYTE_VOCAB)
        taken = constraint.surviving(everything, np.full(BYTE_VOCAB, -1)).tolist()
        assert np.flatnonzero(allowed).tolist() == taken
        constraint.advance(int(rng.choice(taken)))
        if constraint.finished:
            constraint = grammars.constraint(structured(kind, value))


A_LOOP = {"type": "object", "properties": {"b": {"$ref": "#/$defs/b"}}, "required": ["b"]}
B_LOOP = {"type": "object", "properties": {"a": {"$ref": "#/$defs/a"}}, "required": ["a"]}
LIST_LOOP = {"$defs": {"a": {"type": "array", "prefixItems": [{"$ref": "#/$defs/a"}], "minItems": 1}}}
DEEP = json.loads('{"items": ' * 80 + "{}" + "}" * 80)
REFUSED: dict[str, tuple[str, Any, str]] = {
    "no JSON": ("json_schema", '{"type":', "is not JSON"),
    "a number": ("json_schema", "3", "must be an object"),
    "unknown type": ("json_schema", schema(type="objekt"), "objekt"),
    "type of the wrong type": ("json_schema", schema(type=5), "Type should be a string"),
    "false": ("json_schema", "false", "cannot accept any value"),
    "empty enum": ("json_schema", schema(enum=[]), "must not be empty"),
    "refers to itself": ("json_schema", {"$ref": "#"}, "can never end"),
    "two that need each other": (
        "json_schema",
        {"$defs": {"a": A_LOOP, "b": B_LOOP}, "$ref": "#/$defs/a"},
        "never end",
    ),
    "one way never ends": (
        "json_schema",
        {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/a"}], **LIST_LOOP},
        "never end",
    ),
    "not": ("json_schema", {"not": {}}, "'not' cannot be enforced"),
    "several allOf": ("json_schema", schema(allOf=[{"type": "string"}, {"type": "integer"}]), "'allOf'"),
    "uniqueItems": ("json_schema", schema(type="array", uniqueItems=True), "'uniqueItems'"),
    "multipleOf": ("json_schema", schema(type="integer", multipleOf=7), "'multipleOf'"),
    "beside anyOf": ("json_schema", schema(type="object", required=["a"], anyOf=[{}]), "'required' beside 'anyOf'"),
    "beside enum": ("json_schema", schema(enum=[1], minimum=3), "'minimum' beside"),
    "enum of another type": ("json_schema", schema(type="string", enum=["a", 1]), "not of the type"),
    "true is no integer": ("json_schema", schema(type="integer", enum=[True]), "not of the type"),
    "undescribed property": ("json_schema", schema(type="object", required=["z"]), "'z' is not described"),
    "inside": ("json_schema", schema(type="array", items={"not": {}}), "at /items: the keyword 'not'"),
    "another document": ("json_schema", {"$ref": "http://a/b"}, "another document"),
    "missing reference": ("json_schema", {"$ref": "#/$defs/x"}, "Cannot find"),
    "a quote in a pattern": ("json_schema", schema(type="string", pattern='^"$'), "needs a quote"),
    "a tab in a pattern": ("json_schema", schema(type="string", pattern="^\\t$"), "control character"),
    "beside a pattern": ("json_schema", schema(type="string", pattern="^a*$", minLength=2), "'minLength' beside"),
    "overlapping oneOf": ("json_schema", schema(oneOf=[{"type": "integer"}, {"type": "number"}]), "oneOf"),
    "minimum above maximum": ("json_schema", schema(type="integer", minimum=9, maximum=5), "minimum"),
    "deep": ("json_schema", DEEP, "nested too deeply"),
    "very deep": ("json_schema", '{"items":' * 6000 + "{}" + "}" * 6000, "nested too deeply"),
    "a lone surrogate": ("json_schema", '{"const": "\\ud800"}', "parse JSON"),
    "big": ("json_schema", schema(description="x" * 70_000), "may have 65536"),
    "no Unicode": ("regex", "a\ud800", "not valid Unicode"),
    "regex": ("regex", "(abc", "parenthesis is not closed"),
    "regex that allows nothing": ("regex", "[^\\s\\S]", "allows no text"),
    "regex of nothing": ("grammar", 'root ::= ""', "allows no text"),
    "nested groups": ("regex", "(" * 20_000 + "a" + ")" * 20_000, "maximum limit"),
    "lookahead": ("regex", "(?=a)b", "not supported"),
    "backreference": ("regex", "(a)\\1", "not supported"),
    "no root": ("grammar", 'x ::= "a"', "root"),
    "undefined rule": ("grammar", "root ::= y", '"y" is not defined'),
    "left recursion alone": ("grammar", "root ::= root", "never end"),
    "no base": ("grammar", 'root ::= "a" root', "never end"),
    "a helper without base": ("grammar", 'root ::= "a" | x\nx ::= "b" y\ny ::= "c" x', "never end"),
    "many choices": ("choice", tuple(map(str, range(2000))), "may have 1024"),
    "long choices": ("choice", ("x" * 40_000, "y" * 40_000), "may have 65536"),
    "a choice of nothing": ("choice", ("",), "allows no text"),
    "structural tag": ("structural_tag", {"type": "structural_tag"}, "must have a format"),
    "structural tag, no object": ("structural_tag", "[]", "must be a JSON object"),
    "schema in a tag": (
        "structural_tag",
        {"type": "structural_tag", "format": {"type": "json_schema", "json_schema": {"not": {}}}},
        "'not'",
    ),
    "loop in a tag": (
        "structural_tag",
        {"type": "structural_tag", "format": {"type": "json_schema", "json_schema": {"$ref": "#"}}},
        "never end",
    ),
    "slow at run time": ("grammar", "root ::= x*\nx ::= [a-z]* y*\ny ::= [a-z ]* x*", "too slow to follow"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(grammars: Grammars, name: str) -> None:
    kind, value, message = REFUSED[name]
    with pytest.raises(RequestError) as caught:
        grammars.constraint(structured(kind, value))
    assert message in str(caught.value)
    assert caught.value.field == f"structured_outputs.{kind}"


def test_the_field_can_be_named(grammars: Grammars) -> None:
    with pytest.raises(RequestError) as caught:
        grammars.constraint(structured("json_schema", "{"), "response_format.json_schema.schema")
    assert caught.value.field == "response_format.json_schema.schema"


def test_a_source_that_takes_too_long_is_given_up_and_others_go_on() -> None:
    grammars = make(time_limit=0.7)
    try:
        grammars.start()
        started = time.monotonic()
        for _ in range(2):  # the second time it is remembered
            with pytest.raises(RequestError, match=r"took more than 0\.7 s"):
                grammars.constraint(structured("json_schema", MANY_OPTIONS))
        assert accepts(grammars.constraint(structured("regex", "[ab]")), "a")
        assert time.monotonic() - started < 60
    finally:
        grammars.close()


def test_a_source_that_needs_too_much_memory_is_given_up() -> None:
    grammars = make(memory_limit=8 << 20, time_limit=60.0)
    try:
        with pytest.raises(RequestError, match=r"memory|MiB"):
            grammars.constraint(structured("regex", "([a-z]{1,250}){1,250}[a-z]{1,9000}"))
        assert accepts(grammars.constraint(structured("regex", "[ab]")), "a")
    finally:
        grammars.close()


@pytest.fixture
def process() -> Iterator[CompilerProcess]:
    from xgrammar import TokenizerInfo

    info = TokenizerInfo.from_huggingface(make_byte_tokenizer(), vocab_size=BYTE_VOCAB, stop_token_ids=[EOS])
    found = CompilerProcess(info.serialize_json().encode(), seconds=30.0, memory=1 << 30)
    yield found
    found.close()


def _pid(process: CompilerProcess) -> int:
    assert process._child is not None
    return process._child.process.pid


def test_a_crash_is_contained(process: CompilerProcess) -> None:
    """The process dies in the middle of a source, as it would by an abort in xgrammar."""
    process.compile("regex", "[ab]")
    first = _pid(process)
    threading.Timer(0.3, os.kill, (first, signal.SIGABRT)).start()
    with pytest.raises(Problem, match="crashes the compiler"):
        process.compile("json_schema", MANY_OPTIONS)
    assert process.compile("regex", "[ab]")
    assert _pid(process) != first


def test_it_ends_itself_when_nobody_waits(process: CompilerProcess) -> None:
    """An engine that dies leaves no process behind that compiles for ever."""
    brief = CompilerProcess(process._tokenizer, seconds=0.5, memory=1 << 30)
    brief.start()
    brief._wait_until_ready()
    assert brief._child is not None
    brief._child.link.send_bytes(json.dumps(["json_schema", MANY_OPTIONS]).encode())
    assert brief._child.process.wait(timeout=20) == -signal.SIGALRM
    idle = CompilerProcess(process._tokenizer, seconds=0.5, memory=1 << 30)
    idle.start()
    idle._wait_until_ready()
    assert idle._child is not None
    idle._child.link.close()
    assert idle._child.process.wait(timeout=20) == 0


def test_a_process_that_died_idle_is_replaced(process: CompilerProcess) -> None:
    process.compile("regex", "[ab]")
    os.kill(_pid(process), signal.SIGKILL)
    assert process._child is not None
    process._child.process.wait()
    assert process.compile("regex", "[ab]")


def test_a_process_that_does_not_start_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.executable", "/bin/false")
    grammars = make()
    with pytest.raises(BusyError, match="does not start"):
        grammars.constraint(structured("regex", "[ab]"))
    grammars.close()


class _Counted:
    """A stand-in for the process that counts what it compiles."""

    def __init__(self, real: Grammars) -> None:
        self._process = real._prepare()
        self.sources: list[str] = []
        self.gate = threading.Event()
        self.gate.set()

    def compile(self, kind: str, text: str) -> bytes:
        self.sources.append(text)
        assert self.gate.wait(30)
        return self._process.compile(kind, text)

    def start(self) -> None:
        self._process.start()

    def close(self, *, forever: bool = False) -> None:
        self._process.close(forever=forever)


def _counted(**limits: Any) -> tuple[Grammars, _Counted]:
    grammars = make(**limits)
    counted = _Counted(grammars)
    grammars._process = counted  # type: ignore[assignment]
    return grammars, counted


def test_grammars_and_refusals_are_remembered_and_the_oldest_forgotten() -> None:
    grammars, counted = _counted(cache_entries=3)
    for regex in ("a", "b", "a"):
        grammars.constraint(structured("regex", regex))
    for _ in range(2):
        with pytest.raises(RequestError, match="parenthesis"):
            grammars.constraint(structured("regex", "("))
    assert counted.sources == ["a", "b", "("]
    for regex in ("c", "a", "b"):
        grammars.constraint(structured("regex", regex))
    assert counted.sources == ["a", "b", "(", "c", "b"]
    grammars.close()
    with pytest.raises(BusyError, match="closing"):
        grammars.constraint(structured("regex", "d"))
    assert grammars.constraint(structured("regex", "c")) is not None, "what is remembered needs no process"


def test_callers_of_different_salts_share_no_grammar() -> None:
    grammars, counted = _counted()
    for salt in ("", "a", "b", "a", ""):
        grammars.constraint(structured("regex", "x"), salt=salt)
    assert counted.sources == ["x"] * 3
    grammars.close()


def test_the_cache_is_bounded_in_bytes() -> None:
    cache = compiler_module._Cache(entries=100, size=10)
    for name in "abc":
        cache.put(("", "regex", name), Problem(name), 4)
    assert [cache.get(("", "regex", name)) is None for name in "abc"] == [True, False, False]
    cache.put(("", "regex", "d"), Problem("d"), 40)
    assert cache.get(("", "regex", "d")) is not None, "the newest stays, however big"
    assert cache.get(("", "regex", "c")) is None


def test_who_waits_for_the_same_grammar_compiles_nothing() -> None:
    grammars, counted = _counted()
    counted.gate.clear()
    threads = [threading.Thread(target=grammars.constraint, args=(structured("regex", "a"),)) for _ in range(3)]
    for thread in threads:
        thread.start()
    while not counted.sources:
        time.sleep(0.01)
    counted.gate.set()
    for thread in threads:
        thread.join()
    assert counted.sources == ["a"]
    assert accepts(grammars.constraint(structured("regex", "b")), "b")
    grammars.close()


def test_without_xgrammar_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler_module, "find_spec", lambda _name: None)
    grammars = make()
    grammars.start()
    with pytest.raises(RequestError, match=r"pip install 'paceline\[serve\]'"):
        grammars.constraint(structured("json_object", True))
    grammars.close()


def test_a_model_without_end_tokens_is_refused() -> None:
    grammars = Grammars(make_byte_tokenizer(), BYTE_VOCAB, ())
    with pytest.raises(RequestError, match="needs an end token"):
        grammars.constraint(structured("json_object", True))


def test_text_is_tokenized_as_in_the_middle_of_a_text() -> None:
    """A tokenizer that puts a space in front of every text would spell a jump wrongly."""
    grammars = make()

    @dataclasses.dataclass
    class Encoded:
        ids: list[int]

    class Backend:
        def encode(self, text: str, add_special_tokens: bool) -> Encoded:
            assert not add_special_tokens
            return Encoded([99, *map(ord, text)])

    grammars._tokenizer = type("T", (), {"backend_tokenizer": Backend()})()
    assert grammars._tokens_of("ab") == (99, 97, 98)
    grammars._info = type("I", (), {"add_prefix_space": True})()  # type: ignore[assignment]
    assert grammars._tokens_of("ab") == (97, 98)


# What is checked without compiling


@pytest.mark.parametrize(
    ("grammar", "endless"),
    [
        ('root ::= (("a" root) | ("b"))', set()),
        ('root ::= (("a" root))', {"root"}),
        ("root ::= ((x))\nx ::= ((y))\ny ::= ((x))", {"root", "x", "y"}),
        ('root ::= ((x{0, 3} "a"))\nx ::= (("b" x))', {"x"}),
        ('root ::= ((x{1, -1} "a"))\nx ::= (("b" x))', {"root", "x"}),
        ('root ::= ((x* "a"))\nx ::= (("b" x))', {"x"}),
        ('root ::= ("a" (x | "b") root?)\nx ::= (("b" x))', {"x"}),
        ('root ::= (("a")) (=(x))\nx ::= (("(" x))', {"x"}),
        ('root ::= (([)("] "::= x" x)) \nx ::= "" # root', set()),
        ('root ::= TagDispatch(\n  ("<a>", x),\n  loop_after_dispatch=true\n)\nx ::= (("a" x))', {"x"}),
        ('root ::= (Regex("^(a$", json_string=true) root_1)\nroot_1 ::= ("")', set()),
        ("root ::= (" + "(x | y) " * 12 + ')\nx ::= ("a")\ny ::= ("b")', set()),
    ],
)
def test_rules_that_never_end(grammar: str, endless: set[str]) -> None:
    assert endless_rules(read_rules(grammar)) == endless


def test_whether_the_first_rule_is_used() -> None:
    assert uses(read_rules('root ::= (("a" root) | ("b"))'), "root")
    assert uses(read_rules('root ::= ((x))\nx ::= ("" | (root))'), "root")
    assert not uses(read_rules('root ::= ((root_1 "root"))\nroot_1 ::= ("")'), "root")


def test_property_names_are_no_keywords() -> None:
    check_schema(schema(type="object", properties={"not": {"type": "string"}, "if": True, "multipleOf": {}}))
    check_schema(schema(const={"not": {}}))
    check_schema(schema(type="object", properties={"a": {"anyOf": [{}], "title": "A", "default": None}}))
    check_structural_tag('{"format": {"tags": [{"begin": "not", "content": {"type": "any_text"}}]}}')
