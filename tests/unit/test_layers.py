"""Layers: engine > lanes > stages > model, cache > types. A module imports from its own layer's package or below."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import paceline

ROOT = Path(paceline.__file__).parent
_VALUES = ("types", "constraint", "draft_progress", "draft_tree", "positional", "request", "sampling", "rng", "race")
TYPES = ("errors", "config", "arrays", "compiled", *(f"engine.{name}" for name in _VALUES))
STAGES = ("schedule", "plan", "draft", "verify")
RESOURCES = ("model", "constrain")
LAYERS = (
    TYPES,
    ("cache",),
    RESOURCES,
    STAGES,
    ("lanes",),
    ("engine",),
    ("outputs",),
    ("llm",),
    ("train",),
    ("integrations",),
    ("cli", "bench", "server"),
)


def modules() -> dict[str, Path]:
    """Every module by its name below `paceline`."""
    found = {}
    for path in ROOT.rglob("*.py"):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        if not name.endswith("__init__") and name != "__main__":
            found[name] = path
    return found


def layer_of(module: str) -> int:
    """Number of the module's layer, lowest first; a longer prefix wins."""
    best, layer = -1, -1
    for i, names in enumerate(LAYERS):
        for name in names:
            if (module == name or module.startswith(name + ".")) and len(name) > best:
                best, layer = len(name), i
    assert layer >= 0, f"{module} belongs to no layer: add it to LAYERS"
    return layer


def imports_of(path: Path) -> set[str]:
    """Paceline modules that a file imports, by their names below `paceline`."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "paceline":
            base = (node.module or "").removeprefix("paceline").lstrip(".")
            known = modules()
            for alias in node.names:
                full = f"{base}.{alias.name}".lstrip(".")
                found.add(full if full in known else base)
        elif isinstance(node, ast.Import):
            found |= {a.name.removeprefix("paceline.") for a in node.names if a.name.startswith("paceline.")}
    return found - {""}


def violations(module: str, imported: set[str]) -> list[str]:
    """Imports that go upward, and imports between two stages."""
    wrong = []
    for other in imported:
        if layer_of(other) > layer_of(module):
            wrong.append(f"{module} imports {other}, which is a layer above it")
        stages = {module.split(".")[0], other.split(".")[0]}
        if stages <= set(STAGES) and len(stages) == 2:
            wrong.append(f"{module} imports {other}, which is another stage")
    return wrong


@pytest.mark.parametrize("module", sorted(modules()))
def test_imports_go_downward(module: str) -> None:
    assert violations(module, imports_of(modules()[module])) == []


def test_the_check_sees_what_it_should() -> None:
    assert violations("draft.ngram", {"plan.spec"})
    assert violations("model.runner", {"verify.base"})
    assert violations("engine.types", {"cache.paged_kv"})
    assert not violations("engine.engine", {"draft.base", "model.runner"})


def test_only_commit_appends_tokens() -> None:
    """One writer: no other module grows a request's token list (benches that play the engine run none)."""
    writers = []
    for name, path in modules().items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                target = node.func.value
                grows = node.func.attr in ("append", "extend", "insert")
                played = name.startswith(("bench.replay", "bench.accepted", "bench.tree_rounds"))
                if grows and not played and isinstance(target, ast.Attribute) and target.attr == "token_ids":
                    writers.append(name)
    assert writers == ["engine.commit"]


def test_public_names() -> None:
    names = ["LLM", "RequestSpeculation", "SamplingParams", "StructuredOutput", "__version__", "errors"]
    assert sorted(paceline.__all__) == names
    assert all(getattr(paceline, name) is not None for name in paceline.__all__)
