"""The cost model: its table, its file, and how it follows measured steps. No real clock is read."""

from __future__ import annotations

import json
import runpy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engine_tools import make_request, step_stats

from paceline.errors import InputError
from paceline.plan.cost_model import CostModel, CostTable, DraftCost
from paceline.plan.tracker import Tracker

TABLE = CostTable((1, 16, 64, 256), (0.010, 0.011, 0.014, 0.030), 1e-4, 1e-6, 5e-4)
EXAMPLES = Path(__file__).parent.parent.parent / "examples" / "costs"
REQUESTS = tuple(make_request([3, 4]) for _ in range(32))


def at(table: CostTable, tokens: float, sequences: int = 1, context: float = 0.0) -> float:
    """Seconds of one size, by the table alone."""
    return float(CostModel(table, adapt=False).table_seconds(np.array([float(tokens)]), sequences, context)[0])


def feed(
    model: CostModel,
    steps: int,
    slowness: Callable[[int], float],
    sizes: tuple[int, ...] = (0, 3, 7),
    *,
    requests: int = 1,
    noise: float = 0.05,
) -> None:
    """Steps of a machine that takes `slowness(draft nodes)` times what the table says."""
    rng = np.random.default_rng(0)
    for _ in range(steps):
        nodes = int(rng.choice(sizes))
        verified = np.zeros(requests, dtype=np.int64)
        verified[0] = nodes
        seconds = at(model.table, requests + nodes, requests, 10 * requests) * slowness(nodes)
        seconds *= float(np.exp(noise * rng.standard_normal()))
        model.learn(step_stats(requests=REQUESTS[:requests], verified=verified, step_seconds=seconds))


def factors(model: CostModel, *sizes: int, requests: int = 1) -> list[float]:
    """What the model has learned to multiply the table by, at some numbers of draft nodes."""
    learned = model.step_seconds(requests, max(sizes), requests, 0.0)
    return [float(learned[n]) / at(model.table, requests + n, requests) for n in sizes]


def test_linear_between_sizes_and_steeper_parts_added() -> None:
    assert at(TABLE, 1) == pytest.approx(0.0105)
    assert at(TABLE, 40) == pytest.approx(0.0125 + 5e-4)
    assert at(TABLE, 16, sequences=4, context=1000) == pytest.approx(0.011 + 3e-4 + 1e-3 + 5e-4)
    assert at(TABLE, 0.5) == at(TABLE, 1), "nothing is cheaper than the smallest forward"


def test_padded_forwards_cost_what_their_size_does() -> None:
    padded = replace(TABLE, padded=True)
    assert at(padded, 17) == at(padded, 64) == at(TABLE, 64)
    assert at(padded, 16) == at(TABLE, 16)
    steps = CostModel(padded).step_seconds(1, 20, 1, 0.0)
    assert np.flatnonzero(np.diff(steps) > 0.0).tolist() == [0, 15]


@pytest.mark.parametrize("padded", [False, True])
def test_beyond_the_table_it_goes_on_as_over_its_upper_half(padded: bool) -> None:
    table = CostTable((1, 128, 256), (0.010, 0.010, 0.030), padded=padded)
    assert at(table, 512) == pytest.approx(0.030 + 256 * 0.020 / 128)
    flat = CostTable((1, 2), (0.01, 0.01))
    assert 0.01 < at(flat, 1000) < 0.0101, "never quite free"


def test_a_size_measured_in_a_busy_moment_is_not_believed() -> None:
    assert at(CostTable((1, 2, 4, 8), (0.010, 0.5, 0.011, 0.020)), 2) == pytest.approx(0.011)


def test_step_seconds_start_at_the_committed_tokens() -> None:
    steps = CostModel(TABLE).step_seconds(5, 3, 2, 100.0)
    assert steps == pytest.approx([at(TABLE, n, 2, 100.0) for n in (5, 6, 7, 8)])
    assert CostModel(TABLE).step_seconds(5, 0, 2, 100.0).shape == (1,)


def test_follows_a_machine_that_slows_down_and_keeps_the_shape() -> None:
    model = CostModel(TABLE)

    def host(nodes: int) -> float:
        return 1.0 + 0.04 * nodes

    feed(model, 200, host)
    assert factors(model, 0, 3, 7) == pytest.approx([1.0, 1.12, 1.28], rel=0.05)
    feed(model, 50, lambda nodes: 2.0 * host(nodes))
    assert factors(model, 0, 3, 7) == pytest.approx([2.0, 2.24, 2.56], rel=0.07)


def test_sizes_that_are_not_used_follow_the_level() -> None:
    model = CostModel(TABLE)
    feed(model, 300, lambda nodes: 1.0 + 0.03 * nodes)
    feed(model, 50, lambda _: 2.0, sizes=(0,))
    assert factors(model, 0, 7) == pytest.approx([2.0, 2.42], rel=0.1)
    feed(model, 50, lambda _: 1.0, sizes=(0,))
    assert factors(model, 0, 7) == pytest.approx([1.0, 1.21], rel=0.1), "a slow spell does not stick to them"


def test_a_size_that_only_looked_dear_is_tried_again() -> None:
    model = CostModel(TABLE)
    feed(model, 100, lambda nodes: 1.5 if nodes else 1.0, sizes=(0, 7))
    assert factors(model, 7) == pytest.approx([1.5], rel=0.1)
    feed(model, 5000, lambda _: 1.0, sizes=(0,))
    assert factors(model, 7) == pytest.approx([1.0], abs=0.1)


@pytest.mark.parametrize("nodes", [0, 7])
def test_a_pause_does_not_disturb(nodes: int) -> None:
    model = CostModel(TABLE)
    feed(model, 200, lambda _: 1.0)
    before = np.array(factors(model, 0, 1, 3, 7, 15))
    feed(model, 1, lambda _: 100.0, sizes=(nodes,))
    after = np.array(factors(model, 0, 1, 3, 7, 15))
    assert after == pytest.approx(before, rel=0.05)
    assert np.ptp(after / before) < 0.03, "what decides about a look-ahead is the ratio of two sizes"


def test_a_pause_at_the_first_step_is_overcome() -> None:
    model = CostModel(TABLE)
    feed(model, 1, lambda _: 100.0)
    feed(model, 100, lambda _: 1.0)
    assert factors(model, 0, 3, 7) == pytest.approx([1.0] * 3, rel=0.15)


def test_learned_at_the_sizes_seen_and_little_said_about_others() -> None:
    model = CostModel(TABLE)
    feed(model, 300, lambda nodes: 1.3 if nodes == 3 else 1.0)
    learned = factors(model, 0, 3, 7, 1023)
    assert learned[:3] == pytest.approx([1.0, 1.3, 1.0], rel=0.06)
    assert learned[3] == pytest.approx(1.0, abs=0.12)


def test_batches_of_another_size_start_from_what_is_known_and_learn_on_their_own() -> None:
    model = CostModel(TABLE)
    feed(model, 200, lambda _: 2.0)
    assert factors(model, 0, requests=16) == pytest.approx([2.0], rel=0.05)
    feed(model, 100, lambda _: 3.0, requests=16)
    assert factors(model, 0, 7, requests=16) == pytest.approx([3.0, 3.0], rel=0.1)
    assert factors(model, 0, 7) == pytest.approx([2.0, 2.0], rel=0.05)


def test_prompt_chunks_and_a_model_that_does_not_adapt_teach_nothing() -> None:
    fixed, model = CostModel(TABLE, adapt=False), CostModel(TABLE)
    for _ in range(20):
        fixed.learn(step_stats(step_seconds=1.0, draft_depths={"draft": 2}, draft_seconds={"draft": 0.5}))
        model.learn(step_stats(step_seconds=1.0, num_prompt_tokens=100))
        model.learn(step_stats(requests=REQUESTS[:1], step_seconds=0.0, num_prompt_tokens=1))
    assert factors(fixed, 0, 7) == factors(model, 0, 7) == pytest.approx([1.0, 1.0])
    assert fixed.draft_seconds("draft", 2, 1) == 0.0


def test_drafting_is_not_the_forwards_time() -> None:
    model = CostModel(TABLE)
    seconds = at(TABLE, 1, 1, 10)
    for _ in range(50):
        model.learn(step_stats(step_seconds=seconds + 0.02, draft_depths={"d": 4}, draft_seconds={"d": 0.02}))
    assert factors(model, 0) == pytest.approx([1.0], rel=0.01)


def teach_drafts(
    model: CostModel, steps: int, truth: Callable[[int, int], float], shapes: list[tuple[int, int]], first: float = 1.0
) -> None:
    """Drafts of `(requests, depth)` that take `truth` of them, the first one longer."""
    rng = np.random.default_rng(0)
    for i in range(steps):
        requests, depth = shapes[int(rng.integers(len(shapes)))]
        seconds = truth(requests, depth) * float(np.exp(0.05 * rng.standard_normal())) * (1.0 if i else first)
        model.learn(
            step_stats(requests=REQUESTS[:requests], draft_depths={"draft": depth}, draft_seconds={"draft": seconds})
        )


def draft_truth(requests: int, depth: int) -> float:
    """A draft model's time: mostly its forwards."""
    return 2e-4 + 2e-3 * depth + 1e-4 * requests * depth


def check_drafts(model: CostModel, truth: Callable[[int, int], float], shapes: list[tuple[int, int]]) -> None:
    """The model expects the true times, within 15%."""
    for requests, depth in shapes:
        assert model.draft_seconds("draft", depth, requests) == pytest.approx(truth(requests, depth), rel=0.15)


@pytest.mark.parametrize("first", [0.01, 1.0, 100.0])
def test_a_drafters_cost_is_split_by_depth_and_batch(first: float) -> None:
    model = CostModel(TABLE)
    assert model.draft_seconds("draft", 3, 1) == 0.0, "not measured yet"
    shapes = [(requests, depth) for requests in (1, 2, 4, 8) for depth in (1, 2, 3, 5)]
    teach_drafts(model, 150, draft_truth, shapes, first)
    check_drafts(model, draft_truth, [(1, 4), (1, 5), (8, 3), (8, 8), (4, 1)])


def test_where_only_one_depth_was_seen_depth_is_taken_to_cost() -> None:
    model = CostModel(TABLE)
    teach_drafts(model, 100, draft_truth, [(1, 4)])
    four, five = (model.draft_seconds("draft", depth, 1) for depth in (4, 5))
    assert four == pytest.approx(draft_truth(1, 4), rel=0.05)
    assert 0.1 * four < five - four <= 0.25 * four


def test_measured_draft_costs_are_kept_where_steps_cannot_tell_and_followed_where_they_do() -> None:
    known = replace(TABLE, draft={"draft": DraftCost(per_step=4e-3, per_depth=1e-3)})
    model = CostModel(known)
    assert model.draft_seconds("draft", 4, 1) == pytest.approx(8e-3)
    teach_drafts(model, 100, lambda _, depth: 4e-3 + 1e-3 * depth, [(1, 4)])
    assert model.draft_seconds("draft", 8, 1) == pytest.approx(12e-3, rel=0.05)
    teach_drafts(model, 60, lambda _, depth: 8e-3 + 2e-3 * depth, [(1, 2), (1, 4), (1, 6)])
    check_drafts(model, lambda _, depth: 8e-3 + 2e-3 * depth, [(1, 1), (1, 4), (1, 8)])


def test_draft_costs_stay_sane_whatever_is_measured() -> None:
    rng = np.random.default_rng(0)
    model = CostModel(TABLE)
    for _ in range(2000):
        requests, depth = int(rng.integers(1, 9)), int(rng.integers(0, 9))
        seconds = float(np.exp(rng.normal(-6.0, 2.0)))
        model.learn(
            step_stats(requests=REQUESTS[:requests], draft_depths={"draft": depth}, draft_seconds={"draft": seconds})
        )
        assert 0.0 <= model.draft_seconds("draft", 8, 8) < 10.0
    teach_drafts(model, 300, draft_truth, [(requests, depth) for requests in (1, 4) for depth in (1, 4)])
    check_drafts(model, draft_truth, [(1, 2), (4, 4)])


def test_draft_costs_are_never_negative() -> None:
    model = CostModel(TABLE)
    teach_drafts(model, 100, lambda _, depth: 1e-2 if depth == 1 else 1e-3, [(1, 1), (1, 5)])
    costs = [model.draft_seconds("draft", depth, requests) for depth in range(20) for requests in (0, 1, 64)]
    assert min(costs) >= 0.0
    model.learn(step_stats(draft_depths={"idle": 0}, draft_seconds={"idle": 0.0}))
    assert model.draft_seconds("idle", 3, 1) >= 0.0


def test_tracker_tells_values_apart_and_forgets_what_is_not_measured() -> None:
    tracker = Tracker(np.zeros(2), np.eye(2), np.array([1.0, 0.9]))
    for i in range(100):
        row = np.array([1.0, float(i % 2)])
        tracker.learn(row, float(row @ [3.0, 1.0]), 0.01, np.array([0.01, 0.0]))
    assert tracker.values == pytest.approx([3.0, 1.0], abs=0.1)
    for _ in range(100):
        tracker.learn(np.array([1.0, 0.0]), 3.0, 0.01, np.array([0.01, 0.0]))
    assert tracker.values == pytest.approx([3.0, 0.0], abs=0.01)


def test_json_round_trip(tmp_path: Path) -> None:
    table = replace(TABLE, padded=True, draft={"eagle": DraftCost(1e-4, 2e-4, 3e-4, 4e-4)}, about={"model": "m"})
    path = tmp_path / "cost.json"
    path.write_text(json.dumps(table.to_json()))
    assert CostTable.load(path) == table
    least = {"format": "paceline-cost/1", "tokens": [1, 2], "seconds": [1, 0.5], "draft": {"e": {"per_depth": 1}}}
    assert CostTable.from_json(least) == CostTable((1, 2), (1, 0.5), draft={"e": DraftCost(per_depth=1)})


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"format": "paceline-cost/2"}, '"format"'),
        ({"tokens": None}, "list of tokens"),
        ({"tokens": "12"}, "list of tokens"),
        ({"seconds": {"1": 2}}, "list of seconds"),
        ({"tokens": [1, 2, 3]}, "a time for each"),
        ({"tokens": [1], "seconds": [0.1]}, "two sizes"),
        ({"tokens": [2, 1]}, "ascending"),
        ({"tokens": [1, 1]}, "ascending"),
        ({"tokens": [0, 1]}, "whole number"),
        ({"tokens": [1, 2.5]}, "whole number"),
        ({"tokens": [True, 2]}, "whole number"),
        ({"tokens": [1, 10**400]}, "whole number"),
        ({"seconds": [0.0, 0.1]}, "takes no time"),
        ({"seconds": [0.1, -0.1]}, "not a number of seconds"),
        ({"seconds": [0.1, "0.1"]}, "not a number of seconds"),
        ({"seconds": [0.1, None]}, "not a number of seconds"),
        ({"seconds": [0.1, float("nan")]}, "not a number of seconds"),
        ({"seconds": [0.1, float("inf")]}, "not a number of seconds"),
        ({"per_step": "fast"}, "not a number of seconds"),
        ({"per_context_token": -1.0}, "not a number of seconds"),
        ({"per_sequence": 10**400}, "not a number of seconds"),
        ({"padded": 1}, "true or false"),
        ({"about": [1]}, "object for about"),
        ({"draft": [1]}, "object for draft"),
        ({"draft": {"e": 1}}, "no cost table"),
        ({"draft": {"e": {"per_dept": 1.0}}}, "per_dept"),
        ({"draft": {"e": {"per_depth": -1.0}}}, "draft cost"),
        ({"per_request": 1.0}, "per_request"),
    ],
)
def test_a_malformed_table_is_refused_by_name(change: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=r"^--cost: ") as refused:
        CostTable.from_json({**TABLE.to_json(), "tokens": [1, 2], "seconds": [0.1, 0.2], **change}, "--cost")
    assert says in str(refused.value)
    assert "0x" not in str(refused.value)


@pytest.mark.parametrize("value", [None, [], 3, "cost", {}])
def test_what_is_no_table_is_refused(value: object) -> None:
    with pytest.raises(InputError, match="is no cost table"):
        CostTable.from_json(value)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[" * 100_000, b"[1, 2]"])
def test_a_file_that_cannot_be_read_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "cost.json"
    path.write_bytes(content)
    for wrong in (path, tmp_path, tmp_path / "missing.json"):
        with pytest.raises(InputError, match=r"^cost: (cannot read|is no cost table)"):
            CostTable.load(wrong)


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.json")), ids=lambda path: path.stem)
def test_example_tables_load_and_say_where_they_are_from(path: Path) -> None:
    table = CostTable.load(path)
    assert {"hardware", "seconds", "per_context_token", "per_step", "draft", "made_by"} <= set(table.about)
    assert at(table, 1) < 1.25 * at(table, 64), "a GPU verifies dozens of tokens for almost nothing"
    assert CostModel(table).draft_seconds("eagle", 4, 1) == pytest.approx(1e-3 if "8b" in path.stem else 0.0)


def test_the_script_that_made_them_follows_its_formula() -> None:
    script = runpy.run_path(str(EXAMPLES / "from_products.py"))
    products = {"hardware": "h", "what": "w", "copy_bytes_per_s": 1e12, "models": {}}
    products["models"]["m"] = {"products_ms": [[1, 2.0], [8, 3.0]], "kv_bytes_per_context_token": 8000}
    table = script["table_of"](products, "m")
    assert at(table, 8, 1, 1000) == pytest.approx(3e-3 + 1000 * 8000 / 0.8e12 + 0.35e-3)
    assert CostTable.from_json(table.to_json()) == table
