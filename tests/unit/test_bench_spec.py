"""`paceline bench spec`: the measuring loop, the statistics and the report, with stand-ins for engines."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from paceline.bench import spec
from paceline.cli import bench_spec, options
from paceline.cli.main import main
from paceline.config import SamplingParams
from paceline.errors import InputError, RequestError
from paceline.outputs import Completion, Generation, GenerationStats

GREEDY = SamplingParams(temperature=0.0, max_tokens=8)
QUESTIONS = tuple(spec.Question(i, "qa" if i < 3 else "rag", (f"q{i}", "and then?")) for i in range(5))


class FakeEngine:
    """Answers with eight tokens that depend on the question alone, `factor` times as fast as the baseline."""

    loaded = SimpleNamespace(precision="float32", device=SimpleNamespace(type="cpu"))

    def __init__(self, log: list[Any], name: str, factor: float = 1.0, accepted: int = 0) -> None:
        self.log, self.name, self.factor, self.accepted = log, name, factor, accepted
        self.edit: Any = lambda ids: ids
        self.fail_on: BaseException | None = None
        self.error: str | None = None

    def __enter__(self) -> FakeEngine:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def chat(self, messages: Any, params: SamplingParams, *, cache_salt: str = "") -> list[Generation]:
        self.log.append((self.name, messages[-1]["content"], len(messages), params, cache_salt))
        question = messages[0]["content"]
        if self.fail_on is not None and question == "q3":
            raise self.fail_on
        ids = self.edit(tuple(len(messages) * 100 + ord(question[-1]) + i for i in range(8)))
        seconds = 8 * 0.1 / self.factor
        stats = GenerationStats(
            target_forwards=len(ids) - self.accepted,
            draft_tokens=self.accepted * 2,
            accepted_tokens=self.accepted,
            mean_accepted_length=len(ids) / (len(ids) - self.accepted),
            seconds=1.0 + seconds,
            ttft_seconds=1.0,
            tokens_per_second=len(ids) / seconds,
            accepted_by={"ngram": self.accepted} if self.accepted else {},
            cached_tokens=0,
            preemptions=0,
        )
        output = Completion(
            index=0,
            text="text",
            token_ids=ids,
            finish_reason="length",
            logprobs=None,
            seed=0,
            stats=stats,
            error=self.error,
        )
        return [Generation(prompt=None, prompt_token_ids=(1,), prompt_logprobs=None, outputs=(output,))]


@pytest.fixture
def log() -> list[Any]:
    return []


@pytest.fixture
def engines(log: list[Any]) -> dict[str, Any]:
    return {
        "none": FakeEngine(log, "none"),
        "fast": FakeEngine(log, "fast", factor=2.0, accepted=4),
        "slow": FakeEngine(log, "slow", factor=0.8, accepted=1),
    }


def rows_of(engines: dict[str, Any], **options: Any) -> dict[tuple[str, str], spec.Row]:
    measured = list(spec.measure(engines, QUESTIONS, GREEDY, **options))
    return {(row.category, row.spec): row for row in spec.summarise(measured, list(engines))}


def test_engines_take_turns_in_rotating_order(engines: dict[str, Any], log: list[Any]) -> None:
    list(spec.measure(engines, QUESTIONS, GREEDY, repeats=2))
    order = [name for name, *_ in log]
    assert order[:9] == ["none", "fast", "slow", "fast", "slow", "none", "slow", "none", "fast"]
    assert Counter(order) == dict.fromkeys(engines, 10)
    asked = [content for _, content, *_ in log]
    assert asked[:3] == ["q0"] * 3
    assert {salt for *_, salt in log[:15]} == {"repeat 0"}
    assert {salt for *_, salt in log[15:]} == {"repeat 1"}


def test_later_turns_carry_the_answer(engines: dict[str, Any], log: list[Any]) -> None:
    measured = list(spec.measure(engines, QUESTIONS[:1], GREEDY, turns=2))
    assert [(content, length) for _, content, length, *_ in log[:2]] == [("q0", 1), ("and then?", 3)]
    assert [len(m.token_ids) for m in measured] == [2, 2, 2]


def test_warm_up_is_short_and_shares_nothing(engines: dict[str, Any], log: list[Any]) -> None:
    long = SamplingParams(max_tokens=500, min_tokens=300)
    spec.warm_up(engines, QUESTIONS[0], long)
    assert all(params.max_tokens <= 24 and params.min_tokens == 0 for *_, params, _ in log)
    assert {salt for *_, salt in log} == {"warm-up"}


def test_speedups_and_lengths(engines: dict[str, Any]) -> None:
    rows = rows_of(engines)
    assert [key for key in rows if key[1] == "none"] == [("qa", "none"), ("rag", "none"), ("all", "none")]
    none, fast, slow = rows["all", "none"], rows["all", "fast"], rows["all", "slow"]
    assert none.mean_accepted_length == 1.0
    assert none.speedup == spec.Ratio(1.0, 1.0, 1.0)
    assert none.tokens_per_second == pytest.approx(10.0)
    assert fast.speedup.value == pytest.approx(2.0)
    assert fast.speedup_total.value == pytest.approx(1.8 / 1.4)
    assert fast.mean_accepted_length == 2.0
    assert (fast.accepted_tokens, fast.draft_tokens, fast.questions) == (20, 40, 5)
    assert slow.speedup.value == pytest.approx(0.8)
    assert all(row.same_output == row.compared for row in rows.values())


@pytest.mark.parametrize(
    "edit",
    [
        pytest.param(lambda ids: ids[:-1], id="missing tail"),
        pytest.param(lambda ids: (*ids, 5), id="longer"),
        pytest.param(lambda ids: (*ids[:3], ids[3] + 1, *ids[4:]), id="changed token"),
        pytest.param(lambda _: (), id="empty"),
    ],
)
def test_a_different_output_is_counted(engines: dict[str, Any], edit: Any) -> None:
    engines["slow"].edit = edit
    rows = rows_of(engines, turns=2)
    assert rows["all", "slow"].same_output == 0
    assert rows["all", "fast"].same_output == rows["all", "fast"].compared == 5


def test_repeats_are_compared_each_but_count_as_one_question(engines: dict[str, Any]) -> None:
    row = rows_of(engines, repeats=3)["qa", "fast"]
    assert (row.questions, row.compared) == (3, 9)


def test_a_question_without_all_answers_is_left_out(engines: dict[str, Any]) -> None:
    measured = list(spec.measure(engines, QUESTIONS, GREEDY))[:8]  # two questions and two thirds of the third
    rows = spec.summarise(measured, list(engines))
    assert {row.questions for row in rows} == {2}
    assert spec.summarise(measured[:2], list(engines)) == []


def test_an_error_in_a_request_is_raised(engines: dict[str, Any]) -> None:
    engines["fast"].error = "broke"
    with pytest.raises(RequestError, match="question 0 failed with fast: broke"):
        list(spec.measure(engines, QUESTIONS, GREEDY))


def test_answers_without_decoding_have_no_speedup() -> None:
    nothing = np.zeros((4, 4))
    assert spec.speedup(nothing) == spec.Ratio(None, None, None)
    assert spec.speedup(np.array([[10.0, 1.0, 10.0, 2.0]])) == spec.Ratio(2.0, None, None)


def test_interval_covers_the_truth() -> None:
    """Log-normal times around a speedup of 1.5: 95% intervals miss about 1 in 20.

    With 40 questions a bootstrap covers a little less than 95%. Fewer than 170 hits in 200 trials would need
    a coverage below 0.92 and bad luck of more than three standard deviations.
    """
    rng = np.random.default_rng(7)
    hits = 0
    for trial in range(200):
        tokens = rng.integers(50, 128, size=40).astype(float)
        base = tokens / 20 * rng.lognormal(-0.02, 0.2, size=40)
        mine = tokens / 30 * rng.lognormal(-0.02, 0.2, size=40)
        ratio = spec.speedup(np.stack([tokens, mine, tokens, base], axis=1), seed=trial)
        assert ratio.low is not None
        assert ratio.high is not None
        hits += ratio.low <= 1.5 <= ratio.high
    assert 170 <= hits < 200


def test_own_questions() -> None:
    questions = spec.parse_questions(options.read_jsonl(spec.builtin_questions(), "--questions"))
    sizes = Counter(q.category for q in questions)
    assert len(sizes) >= 6
    assert set(sizes.values()) == {4}
    assert all(len(q.turns) == 2 for q in questions if q.category == "multi_turn")
    for question in questions:
        if question.category in ("summarization", "rag"):
            assert 100 <= len(question.turns[0].split()) <= 280


def test_limit_and_spec_bench_names() -> None:
    names = ["writing", "math", "writing", "rag", "rag", "rag"]
    lines = [(i, {"question_id": i, "category": name, "turns": ["a"]}) for i, name in enumerate(names, 1)]
    kept = spec.parse_questions(lines, limit=2)
    assert [(q.id, q.category) for q in kept] == [
        (1, "multi_turn"),
        (2, "multi_turn"),
        (4, "rag"),
        (5, "rag"),
    ]


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        ([], "no question"),
        ([{"category": "a", "turns": ["b"]}], "line 1"),
        ([{"question_id": 1, "turns": ["b"]}], "line 1"),
        ([{"question_id": 1, "category": "a", "turns": "b"}], "line 1"),
        ([{"question_id": 1, "category": "a", "turns": []}], "line 1"),
        ([{"question_id": 1, "category": "a", "turns": ["b"]}] * 2, "twice"),
    ],
)
def test_bad_questions_are_named(lines: list[dict[str, Any]], says: str) -> None:
    with pytest.raises(InputError, match=says):
        spec.parse_questions(enumerate(lines, 1))


@pytest.fixture
def question_file(tmp_path: Path) -> str:
    path = tmp_path / "questions.jsonl"
    lines = [{"question_id": q.id, "category": q.category, "turns": q.turns} for q in QUESTIONS]
    path.write_text("\n".join(map(json.dumps, lines)))
    return str(path)


@pytest.fixture
def opened(engines: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    by_spec = {"none": engines["none"], "ngram:k=4": engines["fast"], "recycling:k=8": engines["slow"]}
    monkeypatch.setattr(options, "open_llm", lambda _model, settings, _console: by_spec[settings["speculation"]])
    return by_spec


@pytest.mark.usefixtures("opened")
def test_command_writes_json_and_chart(question_file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "spec.json"
    command = ["bench", "spec", "m", "--speculation", "ngram:k=4", "recycling:k=8"]
    assert main([*command, "--questions", question_file, "--json", str(out)]) == 0
    result = json.loads(out.read_text())
    assert result["complete"] is True
    assert len(result["answers"]) == 15
    assert len(result["rows"]) == 9
    assert {"cpu", "cores", "torch_threads", "dtype", "versions", "command"} <= set(result["host"])
    assert result["sampling"]["temperature"] == 0.0
    assert (tmp_path / "spec.png").read_bytes().startswith(b"\x89PNG")
    table = capsys.readouterr().out
    assert "2.00x" in table
    assert "5/5" in table


@pytest.mark.usefixtures("opened")
def test_json_to_stdout_is_all_of_stdout(question_file: str, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["bench", "spec", "m", "--speculation", "ngram:k=4", "--questions", question_file, "--json"]
    assert main(command) == 0
    captured = capsys.readouterr()
    assert len(json.loads(captured.out)["rows"]) == 6
    assert "2.00x" in captured.err


@pytest.mark.parametrize(("error", "code"), [(KeyboardInterrupt(), 130), (RequestError("q3 broke."), 2)])
def test_what_was_measured_is_kept(
    error: BaseException,
    code: int,
    opened: dict[str, Any],
    question_file: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    opened["ngram:k=4"].fail_on = error
    out = tmp_path / "spec.json"
    command = ["bench", "spec", "m", "--speculation", "ngram:k=4", "--questions", question_file]
    assert main([*command, "--json", str(out)]) == code
    result = json.loads(out.read_text())
    assert result["complete"] is False
    assert {row["questions"] for row in result["rows"]} == {3}
    assert "Stopped early" in capsys.readouterr().out


def test_losing_cells_are_red(engines: dict[str, Any]) -> None:
    engines["slow"].edit = lambda ids: ids[:-1]
    rows = rows_of(engines)
    losing, winning = bench_spec._cells(rows["all", "slow"]), bench_spec._cells(rows["all", "fast"])
    assert [cell.startswith("[red]") for cell in losing] == [False, True, True, True, False, False, True]
    assert not any("[red]" in cell for cell in winning)
