"""Long prompts that ask about one passage each: a text made of what ships with Paceline, with passages hidden in it.

The text's paragraphs are those of the built-in questions and of the package's own documentation, in an order shuffled
once; the passages are spread evenly. All prompts share the text, so that an engine computes it once.
"""

from __future__ import annotations

import ast
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import paceline
from paceline.bench.spec import builtin_questions
from paceline.llm import LLM

_LEAST_CHARS = 250
"""Of a paragraph."""
_BEGIN = "Read the following text. A question about it comes at its end.\n\n"


@dataclass(frozen=True, slots=True)
class Passage:
    """A place that only one passage of the text is about."""

    town: str
    house: str
    role: str
    name: str
    things: str

    @property
    def text(self) -> str:
        """As it stands in the long text."""
        return (
            f"The {self.house} of {self.town} has a {self.role} called {self.name}. "
            f"In the {self.house} of {self.town} visitors find {self.things}."
        )

    @property
    def question(self) -> str:
        """Answered by it alone."""
        return (
            f"Question: Who is the {self.role} of the {self.house} of {self.town}, and what do visitors find in the "
            f"{self.house} of {self.town}? Answer with the words of the text."
        )


PASSAGES = tuple(
    Passage(*fields)
    for fields in (
        ("Aldburg", "lighthouse", "keeper", "Anna Holt", "a blue lantern, two brass keys and a map of the north"),
        ("Velden", "bakery", "owner", "Peter Lund", "rye bread with caraway seeds, plum cake and almond rolls"),
        ("Merrow", "museum", "director", "Clara Finn", "a wooden clock, a painted sled and a captain's letters"),
        ("Kallis", "bridge", "engineer", "Tomas Berg", "forty stone arches, a copper rail and an old toll house"),
        ("Orrin", "library", "founder", "Ida Moss", "nine hundred atlases, a globe of glass and a tall ladder"),
        ("Tamsel", "orchard", "gardener", "Ruth Vale", "yellow pears, winter apples and a row of walnut trees"),
        ("Brisk", "theatre", "manager", "Oskar Reed", "a painted forest, three velvet thrones and a silver moon"),
        ("Loddon", "harbour", "master", "Lena Croft", "red buoys, a bronze bell and a crane made in Glasgow"),
        ("Harwick", "school", "teacher", "Hugo Marsh", "a telescope, a box of fossils and a chart of the stars"),
        ("Pell", "mill", "miller", "Nora Pike", "two grey stones, a broken sail and a ledger from 1791"),
        ("Stavely", "chapel", "organist", "Emil Stone", "a small organ, five oak benches and a silver fish"),
        ("Norrin", "station", "clerk", "Vera Lane", "a round stove, four timetables and a case full of gloves"),
    )
)


def long_prompts(llm: LLM, tokens: int, count: int) -> list[list[int]]:
    """Prompts of about `tokens` tokens that ask for one passage each; fewer tokens where there is not enough text.

    Args:
        llm: for its tokenizer and chat template.
        tokens: of the text, passages included.
        count: up to the number of passages.
    """
    text = _BEGIN + "\n\n".join(_long_text(llm.tokenizer, tokens)) + "\n\n"
    asked = [text + passage.question for passage in PASSAGES[:: len(PASSAGES) // count][:count]]
    if getattr(llm.tokenizer, "chat_template", None):
        return [llm.chat_prompt([{"role": "user", "content": one}]) for one in asked]
    return [list(llm.tokenizer.encode(one)) for one in asked]


def _long_text(tokenizer: Any, tokens: int) -> Sequence[str]:
    """Paragraphs and passages."""
    left = tokens - sum(len(tokenizer.encode(passage.text)) for passage in PASSAGES)
    body = list[str]()
    for paragraph in _paragraphs():
        left -= len(tokenizer.encode(paragraph))
        if left < 0:
            break
        body.append(paragraph)
    for i, passage in reversed(list(enumerate(PASSAGES))):
        body.insert((2 * i + 1) * len(body) // (2 * len(PASSAGES)), passage.text)
    return body


def _paragraphs() -> list[str]:
    """Text that ships with the package, always in the same order."""
    found = list(_shipped())
    random.Random(0).shuffle(found)
    return found


def _shipped() -> Iterator[str]:
    for line in builtin_questions().read_text(encoding="utf-8").splitlines():
        for turn in json.loads(line)["turns"]:
            yield from _long_enough(turn)
    root = Path(paceline.__file__).parent
    for path in sorted(root.rglob("*.py")):
        yield from _long_enough(ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "")


def _long_enough(text: str) -> list[str]:
    return [" ".join(part.split()) for part in text.split("\n\n") if len(part) >= _LEAST_CHARS]
