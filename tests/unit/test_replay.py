"""The replay bench: recorded tokens, modelled time, the engine's own policies."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from paceline.bench.replay import Outcome, Replay, Setting
from paceline.bench.replay_table import Point, rows_of
from paceline.bench.replay_traces import Recorded, Script, check_drafter, read_trace
from paceline.cli.main import main
from paceline.errors import InputError
from paceline.plan.cost_model import CostTable, DraftCost

TABLE = CostTable((1, 64, 128), (0.01, 0.0101, 0.02), draft={"eagle": DraftCost(per_depth=0.0005)})
"""64 tokens are nearly free, then every token costs its share."""


def recorded(seed: int, *, length: int = 60, accept: float = 0.7, number: int = 0) -> Recorded:
    """A request of random tokens whose recorded drafter is right with the given odds per token."""
    rng = np.random.default_rng([seed, number])
    output = tuple(rng.integers(5, 1000, length).tolist())
    right = np.zeros(length, dtype=np.int64)
    for position in range(length - 1, -1, -1):
        follows = right[position + 1] + 1 if position + 1 < length else 0
        right[position] = follows if rng.random() < accept else 0
    return Recorded(str(number), (1, 2, 3), output, {"eagle": np.minimum(right, np.arange(length, 0, -1))})


def trace(count: int = 12, **options: Any) -> list[Recorded]:
    return [recorded(7, number=i, **options) for i in range(count)]


def run(items: list[Recorded], policy: str, drafter: str = "recorded:eagle", **options: Any) -> Outcome:
    replay = Replay(items, {drafter: Script(items, drafter)}, TABLE)
    return replay.run(Setting(policy, drafter, **{"batch": 4, "tokens": 2000, **options}))


def test_without_look_ahead_a_step_brings_one_token_for_each() -> None:
    outcome = run(trace(), "none")
    assert outcome.tokens == 4 * outcome.steps
    assert outcome.seconds == pytest.approx(outcome.steps * np.interp(4, TABLE.tokens, TABLE.seconds))
    assert outcome.draft_tokens == 0


def test_a_fixed_length_pays_for_its_nodes_and_drafts() -> None:
    outcome = run(trace(accept=1.0, length=400), "fixed:k=3", tokens=1000)
    per_step = float(np.interp(16, TABLE.tokens, TABLE.seconds)) + 3 * 0.0005
    assert outcome.tokens == pytest.approx(16 * outcome.steps, rel=0.03), "everything is accepted but at the ends"
    assert outcome.seconds == pytest.approx(per_step * outcome.steps, rel=0.02)


def test_the_same_setting_gives_the_same_result() -> None:
    first, second = run(trace(), "auto"), run(trace(), "auto")
    assert first == second


def test_every_request_is_replayed_to_its_end() -> None:
    items = trace(length=37)
    arrivals = tuple(0.05 * i for i in range(len(items)))
    for policy in ("none", "fixed:k=5", "auto", "oracle"):
        outcome = run(items, policy, arrivals=arrivals)
        assert outcome.tokens == sum(len(item.output) for item in items), policy
        assert len(outcome.latencies) == len(items)


def test_the_oracle_wastes_nothing_and_beats_the_rest() -> None:
    items = trace(accept=0.5)
    oracle = run(items, "oracle")
    assert oracle.accepted_tokens == oracle.draft_tokens
    assert oracle.goodput > max(run(items, p).goodput for p in ("none", "fixed:k=1", "fixed:k=4", "auto"))


@pytest.mark.parametrize("batch", [1, 4, 16])
@pytest.mark.parametrize("accept", [0.1, 0.6, 0.95])
def test_auto_keeps_up_with_the_best_fixed_length(batch: int, accept: float) -> None:
    items = trace(24, accept=accept, length=120)
    options = {"batch": batch, "tokens": 4000 * min(batch, 4)}
    best = max(run(items, p, **options).goodput for p in ("none", *(f"fixed:k={k}" for k in (1, 2, 3, 5, 8))))
    assert run(items, "auto", **options).goodput > 0.97 * best


def test_prompts_cost_time_when_they_are_computed() -> None:
    items = [Recorded(r.id, tuple(range(100)), r.output, r.right) for r in trace()]
    arrivals = tuple(0.0 for _ in items)
    read, computed = (run(items, "none", arrivals=arrivals, prefill=p) for p in (0, 64))
    assert computed.tokens == read.tokens
    assert computed.seconds > read.seconds


def test_a_drafter_of_ours_runs_for_real() -> None:
    pattern = tuple(range(10, 22)) * 8
    items = [Recorded("0", pattern[:12], pattern, {})]
    outcome = run(items, "fixed:k=4", "ngram", batch=1, tokens=90)
    assert outcome.accepted_tokens > 0.6 * outcome.tokens


def test_reading_a_trace(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    row = {"id": "a", "prompt_token_ids": [1], "generated_token_ids": [5, 6, 7], "acc_eagle": {"acc_len": [3, 9]}}
    path.write_text(json.dumps(row) + "\n\n")
    (item,) = read_trace(path)
    assert item.right["eagle"].tolist() == [2, 2, 0], "cut at the end; no record means nothing was right"


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "line 2"),
        ('{"prompt_token_ids": [1]}', "lacks 'generated_token_ids'"),
        ('{"prompt_token_ids": [1], "generated_token_ids": []}', "some must be generated"),
        ('{"prompt_token_ids": ["a"], "generated_token_ids": [1]}', "whole numbers"),
        ('{"prompt_token_ids": [1], "generated_token_ids": [1], "acc_x": {"acc_len": [0]}}', "at least 1"),
        ('{"prompt_token_ids": [1], "generated_token_ids": [1], "acc_x": [1]}', "line 2"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, reason: str) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text('{"prompt_token_ids": [1], "generated_token_ids": [1]}\n' + line + "\n")
    with pytest.raises(InputError, match="line 2") as caught:
        read_trace(path)
    assert reason in str(caught.value)


def test_what_cannot_be_replayed_is_refused() -> None:
    with pytest.raises(InputError, match="recorded:eagle"):
        check_drafter(trace(), "recorded:medusa")
    with pytest.raises(InputError, match="reads more than tokens"):
        check_drafter(trace(), "draft")


@pytest.fixture
def files(tmp_path: Path) -> tuple[str, str]:
    """A trace file and a cost file."""
    path, cost = tmp_path / "talk.jsonl", tmp_path / "cost.json"
    lines = [
        {
            "id": item.id,
            "prompt_token_ids": item.prompt,
            "generated_token_ids": item.output,
            "acc_eagle": {"acc_len": (item.right["eagle"] + 1).tolist()},
        }
        for item in trace()
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    cost.write_text(json.dumps(TABLE.to_json()))
    return str(path), str(cost)


def test_the_command_writes_rows(files: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "rows.json"
    words = ["bench", "replay", "--trace", files[0], "--cost", files[1], "--batch", "1,4", "--tokens", "600"]
    words += ["--policy", "none", "auto", "best-fixed", "oracle", "--most", "3", "--jobs", "1", "--json", str(out)]
    assert main(words) == 0
    result = json.loads(out.read_text())
    assert [(r["drafter"], r["batch"], r["policy"]) for r in result["rows"]] == [
        (drafter, batch, policy)
        for drafter in ("recorded:eagle", "ngram")
        for batch in (1, 4)
        for policy in ("none", "auto", "best-fixed", "oracle")
    ]
    by_policy = {r["policy"]: r for r in result["rows"][:4]}
    assert by_policy["best-fixed"]["over_best_fixed"] == 1.0
    assert by_policy["best-fixed"]["goodput"] >= by_policy["none"]["goodput"]
    assert by_policy["auto"]["over_none"] == by_policy["auto"]["goodput"] / by_policy["none"]["goodput"]
    assert result["complete"] is True
    assert out.with_suffix(".png").exists()
    assert "times the best fixed length" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (["--policy", "nonsense"], "nonsense"),
        (["--policy", "fixed"], "k="),
        (["--policy", "auto:x=1"], "no option"),
        (["--drafter", "recorded:none"], "recorded:none"[9:]),
        (["--cost", "missing.json"], "missing.json"),
        (["--trace", "missing.jsonl"], "missing.jsonl"),
        (["--arrivals", "missing.csv"], "missing.csv"),
    ],
)
def test_bad_input_ends_with_two(
    files: tuple[str, str], change: list[str], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = {"--trace": files[0], "--cost": files[1], "--policy": "none", "--batch": "1"}
    words |= {change[0]: change[1]}
    assert main(["bench", "replay", *(part for pair in words.items() for part in pair)]) == 2
    assert reason in capsys.readouterr().err


def test_an_id_twice_and_broken_lengths_are_named(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    row = {"id": "a", "prompt_token_ids": [1], "generated_token_ids": [1]}
    path.write_text(f"{json.dumps(row)}\n{json.dumps(row)}\n")
    with pytest.raises(InputError, match=r"line 2 .* earlier"):
        read_trace(path)
    path.write_text(json.dumps({**row, "acc_x": {"acc_len": [2.7]}}))
    with pytest.raises(InputError, match=r"line 1 .* whole numbers"):
        read_trace(path)


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        (["--most", "17"], "--most"),
        (["--plot", "chart.xyz"], ".png"),
        (["--json", "rows.png"], ".json"),
    ],
)
def test_what_would_fail_after_the_work_is_refused_before(
    files: tuple[str, str], more: list[str], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["bench", "replay", "--trace", files[0], "--cost", files[1], "--policy", "none", "--batch", "1"]
    assert main([*words, *more]) == 2
    assert reason in capsys.readouterr().err


def test_with_arrivals_the_best_length_is_that_of_the_shortest_latency() -> None:
    items = trace(accept=0.9, length=80)
    arrivals = tuple(0.4 * i for i in range(len(items)))
    settings = tuple(
        Setting(policy, "recorded:eagle", 4, arrivals=arrivals) for policy in ("none", "fixed:k=1", "fixed:k=4")
    )
    replay = Replay(items, {"recorded:eagle": Script(items, "recorded:eagle")}, TABLE)
    outcomes = {setting.policy: replay.run(setting) for setting in settings}
    point = Point("x.jsonl", None, settings)
    (row,) = rows_of(point, outcomes, ["best-fixed"])
    assert row.best_k == 4
    assert row.mean_latency == min(o.mean_latency or 0.0 for o in outcomes.values())
    del outcomes["fixed:k=1"]
    assert not rows_of(point, outcomes, ["best-fixed"]), "an interrupted bench has no best of all"
    assert [r.policy for r in rows_of(point, outcomes, ["none", "auto"])] == ["none"]
