"""`bench accept` on handmade traces whose accepted lengths can be counted by hand."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from paceline.bench.accepted import Accepted, AcceptSetting, Successors, check_reader, replay_accepted
from paceline.bench.replay_traces import Recorded
from paceline.cli.main import main
from paceline.errors import InputError

TEXT = tuple(range(10, 40))
READERS = ("ngram", "recycling", "suffix")


def item(number: int, prompt: tuple[int, ...], output: tuple[int, ...]) -> Recorded:
    return Recorded(str(number), prompt, output, {})


def total(trace: list[Recorded], *drafters: str, nodes: int = 8, **options: object) -> Accepted:
    *_, found = replay_accepted(trace, AcceptSetting(drafters, nodes, **options))  # type: ignore[arg-type]
    return found


def test_a_copied_prompt_is_accepted_as_far_as_the_budget_goes() -> None:
    trace = [item(0, (*TEXT, 1, 10, 11), TEXT[2:])]
    for name in ("ngram", "suffix"):
        found = total(trace, name, nodes=6)
        assert found.tokens == 28
        assert found.steps == 4, "7 tokens each time"
        assert found.mean_accepted_length == 7.0
        assert found.nodes == 4 * 6


def test_nothing_known_is_one_token_a_step() -> None:
    trace = [item(0, (1, 2, 3), TEXT)]
    for name in READERS:
        found = total(trace, name)
        assert (found.tokens, found.steps, found.nodes) == (30, 30, 0)
        assert found.mean_accepted_length == 1.0


def test_history_counts_and_the_warm_up_does_not() -> None:
    trace = [item(0, (1, 2), TEXT), item(1, (3, 4), TEXT), item(2, (5, 6), TEXT)]
    everything, later = total(trace, "suffix"), total(trace, "suffix", warmup=1)
    assert everything.tokens == 90
    assert later.tokens == 60
    assert everything.steps == later.steps + 30
    assert later.mean_accepted_length > 5
    assert total(trace, "recycling", warmup=1).mean_accepted_length > 3
    assert total(trace, "ngram", warmup=1).mean_accepted_length == 1.0, "it reads its own request only"


def test_a_merged_tree_has_what_both_know() -> None:
    trace = [item(0, (1, 2), TEXT), item(1, (3, 4), TEXT)]
    for i in range(2, 10):
        copied = tuple(range(50 + 20 * i, 70 + 20 * i))
        trace.append(item(i, (*copied, 7, *copied[:3]), (*copied[3:], *TEXT)))
    merged = total(trace, "ngram", "recycling", nodes=16)
    best = max(total(trace, name, nodes=16).mean_accepted_length for name in ("ngram", "recycling"))
    assert merged.mean_accepted_length > 1.2 * best


def test_what_is_expected_follows_what_is_accepted() -> None:
    rng = np.random.default_rng(0)
    outputs = [tuple(rng.integers(0, 3, 80).tolist()) for _ in range(12)]
    found = total([item(i, (5, 6), output) for i, output in enumerate(outputs)], "suffix", nodes=4)
    assert 1.0 + found.expected / found.steps == pytest.approx(found.mean_accepted_length, rel=0.1)


def test_controls_take_away_what_they_say() -> None:
    trace = [item(i, (1, 2, 100_000), TEXT) for i in range(4)]
    assert total(trace, "suffix").mean_accepted_length > 2
    for name in READERS:
        assert total(trace, name, control="zero").mean_accepted_length == 1.0
        assert total(trace, name, control="random").mean_accepted_length < 1.05
    assert total(trace, "suffix", control="random").nodes > 0
    whole = total(trace, "suffix").mean_accepted_length
    assert total(trace, "suffix", control="shuffle").mean_accepted_length < 0.6 * whole
    assert total(trace, "suffix", control="shuffle").tokens == 4 * len(TEXT)


def test_successors_are_the_latest_different_ones() -> None:
    successors = Successors()
    rows, table = successors.rows([1, 2, 1, 3, 1, 2])
    assert rows.tolist() == [1, 2, 1, 3, 1]
    assert table[:, :3].tolist() == [[2, -1, -1], [1, -1, -1], [3, 2, -1], [1, -1, -1], [2, 3, -1]]
    _, table = successors.rows([1, *(x for t in range(20, 40) for x in (t, 1))])
    assert table[-2].tolist() == list(range(39, 31, -1))


def test_drafters_that_need_a_model_are_refused() -> None:
    for name in READERS:
        check_reader(name)
    with pytest.raises(InputError, match="reads more than tokens"):
        check_reader("draft")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "talk.jsonl"
    rows = [{"prompt_token_ids": [1, 2, i + 60], "generated_token_ids": list(TEXT)} for i in range(5)]
    path.write_text("".join(json.dumps({"id": str(i), **row}) + "\n" for i, row in enumerate(rows)))
    return path


@pytest.mark.parametrize("jobs", ["1", "2"])
def test_the_command_writes_rows(file: Path, jobs: str, capsys: pytest.CaptureFixture[str]) -> None:
    out = file.with_name("rows.json")
    words = ["bench", "accept", "--trace", str(file), "--nodes", "4,8", "--warmup", "1", "--jobs", jobs]
    assert main([*words, "--drafter", "ngram", "suffix", "ngram+suffix", "--json", str(out)]) == 0
    result = json.loads(out.read_text())
    assert result["complete"] is True
    assert result["settings"] == {"warmup": 1, "requests": None, "control": "none", "seed": 0}
    assert [(r["nodes"], r["drafter"]) for r in result["rows"]] == [
        (nodes, drafter) for nodes in (4, 8) for drafter in ("ngram", "suffix", "ngram+suffix")
    ]
    _, alone, merged = result["rows"][:3]
    assert alone["tokens"] == merged["tokens"] == 4 * len(TEXT)
    assert alone["over_best_single"] is None
    assert merged["over_best_single"] == merged["mean_accepted_length"] / alone["mean_accepted_length"]
    shown = capsys.readouterr().out
    assert "the first 1 requests of each file are not counted" in shown
    assert "times the best single drafter" in shown


def test_a_control_is_named_and_json_goes_to_stdout(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["bench", "accept", "--trace", str(file), "--nodes", "4", "--jobs", "1", "--drafter", "suffix"]
    assert main([*words, "--control", "zero", "--requests", "2", "--json", "-"]) == 0
    shown = capsys.readouterr()
    assert json.loads(shown.out)["settings"]["control"] == "zero"
    assert "dropped after every request" in shown.err


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--trace", "missing.jsonl"], "missing.jsonl"),
        (["--drafter", "draft"], "reads more than tokens"),
        (["--drafter", "sufix"], "unknown drafter"),
        (["--drafter", "ngram+"], "unknown drafter"),
        (["--warmup", "5"], "--warmup"),
        (["--json", "/nowhere/rows.json"], "--json"),
    ],
)
def test_bad_input_ends_with_two(file: Path, words: list[str], reason: str, capsys: pytest.CaptureFixture[str]) -> None:
    trace = [] if words[0] == "--trace" else ["--trace", str(file)]
    assert main(["bench", "accept", *trace, *words]) == 2
    assert reason in capsys.readouterr().err


def test_a_broken_file_is_named_by_line(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file.write_text(file.read_text() + "{\n")
    assert main(["bench", "accept", "--trace", str(file)]) == 2
    assert "line 6" in capsys.readouterr().err


def test_two_files_of_one_name_are_refused(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "accept", "--trace", str(file), str(file)]) == 2
    assert "same name" in capsys.readouterr().err
