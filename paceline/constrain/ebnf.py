"""Reading a grammar as xgrammar prints it: which rules can ever end, and whether the first one is used by others.

A rule that cannot derive any finite text (`root ::= "a" root`, a schema that refers to itself without a way out)
compiles well and makes a model write for ever, so such grammars are refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

_TOKEN = re.compile(
    r"""
    (?P<skip>\s+|\#[^\n]*) | (?P<text>"(?:\\.|[^"\\])*") | (?P<set>\[(?:\\.|[^\]\\])*\]) |
    (?P<repeat>\{\s*-?\d+\s*(?:,\s*-?\d*\s*)?\}|[*+?]) | (?P<ahead>\(=) |
    (?P<call>[A-Za-z_]\w*\() | (?P<name>[A-Za-z_][\w.\-]*) | (?P<sign>.)
    """,
    re.VERBOSE | re.DOTALL,
)
_RULE = re.compile(r"^([A-Za-z_][\w.\-]*) ::= ", re.MULTILINE)
Alternatives = list[list[str]]
"""What a rule may be: the names of the rules that each alternative needs."""


def endless_rules(rules: Mapping[str, Alternatives]) -> set[str]:
    """Rules that derive no finite text."""
    ending: set[str] = set()
    users: dict[str, list[tuple[str, int]]] = {}  # rule -> (rule, alternative) that need it
    missing: dict[tuple[str, int], int] = {}
    ready: list[str] = []
    for name, alternatives in rules.items():
        for i, needed in enumerate(alternatives):
            wanted = {n for n in needed if n in rules}
            missing[name, i] = len(wanted)
            for other in wanted:
                users.setdefault(other, []).append((name, i))
            if not wanted:
                ready.append(name)
    while ready:
        name = ready.pop()
        if name in ending:
            continue
        ending.add(name)
        for user in users.get(name, ()):
            missing[user] -= 1
            if not missing[user]:
                ready.append(user[0])
    return set(rules) - ending


def read_rules(grammar: str) -> dict[str, Alternatives]:
    """The rules of a grammar as xgrammar prints it: `name ::= body`, one after another."""
    starts = list(_RULE.finditer(grammar))
    ends = [match.start() for match in starts[1:]] + [len(grammar)]
    return {
        match[1]: _alternatives(_tokens(grammar[match.end() : end])) for match, end in zip(starts, ends, strict=True)
    }


def _tokens(body: str) -> Iterator[tuple[str, str]]:
    for match in _TOKEN.finditer(body):
        if match.lastgroup and match.lastgroup != "skip":
            yield match.lastgroup, match[0]


def _alternatives(tokens: Iterator[tuple[str, str]]) -> Alternatives:
    """Alternatives up to the closing parenthesis. A nested choice becomes what its shortest alternatives need.

    Calls such as `TagDispatch(...)` and `Regex(...)` count as ending: their arguments are no rules, or need not be
    entered.
    """
    found: Alternatives = [[]]
    items: list[Alternatives] = []  # of the last alternative, each with its own choices
    for kind, text in tokens:
        if kind in ("ahead", "call"):  # a lookahead is a hint to the compiler and derives nothing
            _alternatives(tokens)
        elif text == "(":
            items.append(_alternatives(tokens))
        elif text == ")":
            break
        elif text == "|":
            found[-1:] = [*_product(items), []]
            items = []
        elif kind == "name":
            items.append([[text]])
        elif kind == "repeat" and items and (text in "*?" or text.lstrip("{ ").startswith("0")):
            items[-1] = [[]]
    found[-1:] = _product(items)
    return found


def uses(rules: Mapping[str, Alternatives], name: str) -> bool:
    """Whether any rule needs the one of that name."""
    return any(name in needed for alternatives in rules.values() for needed in alternatives)


_MOST_CHOICES = 64


def _product(items: list[Alternatives]) -> Alternatives:
    """All ways through a sequence of choices. Beyond 64 ways the choice is dropped, as if it could always end."""
    ways: Alternatives = [[]]
    for choices in items:
        if len(ways) * len(choices) > _MOST_CHOICES:
            choices = [[]] if [] in choices or len(choices) > 1 else choices
        ways = [[*way, *choice] for way in ways for choice in choices]
    return ways
