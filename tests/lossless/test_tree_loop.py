"""E2 for a draft model's trees: the joint law of the first two tokens over the whole engine, for every shape and rule.

See `test_loop.py` for the odds of a false alarm. Texts at temperature 0, and under `coupled` with one seed, are those
without speculation.
"""

from __future__ import annotations

import itertools

import pytest
from lossless.loop import FALSE_ALARM, Tiny, exact_joint, make_tiny, run

from paceline import LLM, SamplingParams

SHAPES = (
    "chain",
    "branching:widths=3/1",
    "k-ary:k=2",
    "best-first:expand=2,width=3",
    "rsd-c:widths=2/2",
    "rsd-s:width=3",
    "sequoia",
    "cape",
)
RULES = ("coupled", "recursive", "multi")
CASES = [case for case in itertools.product(SHAPES, RULES) if not case[0].startswith("rsd") or case[1] != "multi"]
FAST = (
    ("rsd-s:width=3", "recursive"),
    ("rsd-c:widths=2/2", "recursive"),
    ("branching:widths=3/1", "multi"),
    ("sequoia", "recursive"),
    ("best-first:expand=2,width=3", "recursive"),
)
RUNS, FEW = 20_480, 2_048
SPEC = "draft:model=DRAFT,k=6"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return make_tiny(tmp_path_factory.mktemp("draft"))


def _law(tiny: Tiny, tree: str, rule: str, runs: int, **options: float) -> None:
    made = run(tiny.llm(SPEC, rule=rule, tree=tree), options, runs)
    law = made.law_p_value(exact_joint(tiny.plain, SamplingParams(max_tokens=9, **options)))
    print(f"{tree} {rule} {options}: p={law:.3g}, accepted {made.accepted} of {made.drafted} drafted")
    assert law > FALSE_ALARM
    assert made.independence_p_value() > FALSE_ALARM
    assert made.accepted > runs // 50, "too few drafts were accepted for the test to mean anything"


@pytest.mark.parametrize(("tree", "rule"), FAST)
def test_the_joint_law_of_two_tokens(tiny: Tiny, tree: str, rule: str) -> None:
    _law(tiny, tree, rule, FEW)


@pytest.mark.parametrize("temperature", [0.1, 0.03])
@pytest.mark.parametrize(("tree", "rule"), FAST[:3])
def test_peaked_laws(tiny: Tiny, tree: str, rule: str, temperature: float) -> None:
    """Late siblings come from far down the law, where fp32 weights have ended."""
    _law(tiny, tree, rule, FEW // 2, temperature=temperature)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"temperature": 0.7}, {"temperature": 0.1}, {"top_k": 3}], ids=str)
@pytest.mark.parametrize(("tree", "rule"), CASES)
def test_the_joint_law_of_two_tokens_at_length(tiny: Tiny, tree: str, rule: str, options: dict[str, float]) -> None:
    _law(tiny, tree, rule, RUNS, **options)


@pytest.mark.parametrize("tree", SHAPES)
def test_texts_do_not_change(tiny: Tiny, tree: str) -> None:
    """Greedy under every rule, and seeded at temperature 1 under `coupled`."""
    greedy = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)
    seeded = SamplingParams(temperature=1.0, seed=7, max_tokens=24, ignore_eos=True)
    none = tiny.llm("none")
    plain = {params.seed: _texts(none, params) for params in (greedy, seeded)}
    for rule in RULES:
        if (tree, rule) not in CASES:
            continue
        llm = tiny.llm(SPEC, rule=rule, tree=tree)
        for params in (greedy, seeded) if rule == "coupled" else (greedy,):
            assert _texts(llm, params) == plain[params.seed], (tree, rule, params.temperature)


def _texts(llm: LLM, params: SamplingParams) -> list[tuple[int, ...]]:
    made = llm.generate([[3, 4, 5], [6, 3, 6, 3, 6], [5]], params)
    return [tuple(generation.token_ids) for generation in made]
