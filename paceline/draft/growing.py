"""A draft tree while a draft model grows it: its nodes, and which of them went through the model."""

from __future__ import annotations

from dataclasses import dataclass, field

from paceline.config import SamplingParams
from paceline.draft.base import DraftContext
from paceline.draft.draft_model import Scratch
from paceline.draft.scored import Ranking, Scored
from paceline.draft.shapes.base import Growth
from paceline.engine.sampling import Law


@dataclass(eq=False, slots=True)
class GrowingTree:
    """One request's draft in the making. Node -1 is the root."""

    context: DraftContext
    scratch: Scratch
    growth: Growth
    levels: int
    """Most levels."""
    ranking: Ranking
    options: SamplingParams
    """The request's, but at temperature 0 those under which the likeliest tokens can be ranked."""
    tokens: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    keys: list[int] = field(default_factory=list)
    laws: list[Law] = field(default_factory=list)
    paths: dict[int, tuple[int, ...]] = field(default_factory=lambda: {-1: ()})
    fed: dict[int, int] = field(default_factory=lambda: {-1: -1})
    """Node -> fed node of the scratch."""
    survival: dict[int, float] = field(default_factory=lambda: {-1: 1.0})
    chain_survival: float = 1.0
    pending: list[int] = field(default_factory=lambda: [-1])
    """Nodes whose children are wanted."""
    scored: list[Scored] = field(default_factory=list)
    """Of the newest level."""
    guesses: int = 0
    """Tokens that may still be guessed."""

    @property
    def room(self) -> int:
        """Nodes that may still be added."""
        return self.context.budget - len(self.tokens)

    def unscored(self) -> list[int]:
        """Pending nodes that have to go through the model."""
        if self.scratch.root_row is None:
            return self.pending
        return [n for n in self.pending if not self.is_scored(n)]

    def is_scored(self, node: int) -> bool:
        """Whether a node whose parent went through the model did so too, maybe as a guess."""
        if node not in self.fed:
            found = self.scratch.place.get((self.fed[self.parents[node]], self.tokens[node]))
            if found is None:
                return False
            self.fed[node] = found
        return True

    def first_path(self) -> tuple[list[int], list[int]]:
        """The path of first children from the root down, and as far as it went through the model, its fed nodes."""
        first: dict[int, int] = {}
        for node, parent in enumerate(self.parents):
            first.setdefault(parent, node)
        nodes, node = list[int](), -1
        while node in first:
            node = first[node]
            nodes.append(node)
        fed = list[int]()
        if self.scratch.root_row is not None:
            for node in nodes:
                if not self.is_scored(node):
                    break
                fed.append(self.fed[node])
        return nodes, fed
