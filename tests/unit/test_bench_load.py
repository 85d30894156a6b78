"""`paceline bench load`: arrivals, requests, the measuring loop, the statistics, and the command over tiny engines."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fakes import make_byte_tokenizer, make_llm, make_loaded

from paceline.bench import arrivals, load, load_stats, workload
from paceline.bench.load import Answer, Observed, Run
from paceline.bench.load_charts import Axes, Series, lines, ticks
from paceline.bench.load_timeline import MAX_BINS, Reliability, Timeline
from paceline.bench.spec import Question
from paceline.cli import bench_load_table, options
from paceline.cli.main import main
from paceline.errors import InputError

HEADER = "TIMESTAMP,ContextTokens,GeneratedTokens\n"
QUESTIONS = tuple(Question(i, "qa", (f"question {i} " + "abc " * i,)) for i in range(6))


# Arrivals


def trace(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "trace.csv"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("2023-11-16 18:15:46.6805900", "2023-11-16 18:15:50.6805900"),  # Azure 2023
        ("2024-05-10 00:00:00.009930+00:00", "2024-05-10 00:00:04.009930+00:00"),  # Azure 2024
        ("2024-05-10T23:59:58Z", "2024-05-11T00:00:02Z"),
        ("17.5", "21.5"),
    ],
)
def test_traces_are_read(first: str, second: str, tmp_path: Path) -> None:
    rows = arrivals.read_trace(trace(tmp_path, f"\ufeff{HEADER}{first},374,44\n\n{second},20,1\n"))
    assert [(r.context, r.generated) for r in rows] == [(374, 44), (20, 1)]
    assert [r.seconds for r in rows] == pytest.approx([0.0, 4.0])


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ("5,10", "line 3 .*2 columns"),
        ("5,x,1", "line 3 .*ContextTokens 'x'"),
        ("5,10,0", "line 3 .*GeneratedTokens '0'"),
        ("5,10,-3", "line 3 .*GeneratedTokens"),
        ("yesterday,10,3", "line 3 .*TIMESTAMP 'yesterday'"),
        ("nan,10,3", "line 3 .*TIMESTAMP"),
        ("0.5,10,3", "line 3 .*earlier"),
    ],
)
def test_a_bad_row_is_named(row: str, says: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=says):
        arrivals.read_trace(trace(tmp_path, f"{HEADER}1,10,3\n{row}\n"))


@pytest.mark.parametrize(
    ("text", "says"), [("a,b,c\n1,2,3\n", "must begin"), ("", "must begin"), (HEADER, "no request")]
)
def test_files_that_are_no_trace(text: str, says: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=says):
        arrivals.read_trace(trace(tmp_path, text))
    with pytest.raises(InputError, match="cannot read"):
        arrivals.read_trace(tmp_path / "absent.csv")


def test_random_arrivals_have_their_rate_and_their_seed() -> None:
    point = arrivals.Poisson(4.0)
    times = point.times((0, 1), count=4000)
    assert times[0] == 0.0
    assert len(times) == 4000
    gaps = np.diff(times)
    assert gaps.mean() == pytest.approx(0.25, rel=0.08)  # five standard errors
    assert gaps.std() == pytest.approx(0.25, rel=0.15)
    assert times == point.times((0, 1), count=4000)
    assert times != point.times((0, 2), count=4000)
    assert max(point.times((0, 1), duration=5.0)) < 5.0


def test_a_replay_is_as_fast_as_asked() -> None:
    rows = tuple(arrivals.TraceRow(float(t), 1, 1) for t in (0, 4, 10))
    assert arrivals.Replay(rows, 2.0).times((0,)) == [0.0, 2.0, 5.0]
    assert arrivals.Replay(rows, 2.0).times((0,), duration=5.0) == [0.0, 2.0]
    assert arrivals.Replay(rows, 0.5).times((0,), count=2) == [0.0, 8.0]


# Requests


@pytest.fixture
def chat_tokenizer() -> Any:
    import copy

    tokenizer = copy.deepcopy(make_byte_tokenizer())
    tokenizer.chat_template = "<s>user: {{ messages[0]['content'] }}\nbot: "
    return tokenizer


@pytest.mark.parametrize("length", [1, 7, 19, 20, 21, 60, 500])
def test_prompts_have_exactly_the_length_asked_for(length: int, chat_tokenizer: Any) -> None:
    prompts = workload.TokenPrompts(chat_tokenizer)
    texts = ["how many of them are there?", "abc", "something else entirely"]
    ids = prompts.sized(texts, length)
    assert len(ids) == length
    text = chat_tokenizer.decode(ids)
    if length >= 60:
        assert text.startswith("<s>user: ")
        assert text.endswith(f"{texts[0]}\nbot: ")
        assert "abc" in text
    whole = chat_tokenizer.apply_chat_template([{"role": "user", "content": texts[0]}], tokenize=False)
    assert prompts.plain(texts[0]) == tuple(chat_tokenizer.encode(whole, add_special_tokens=False))


def test_a_model_without_a_template_gets_the_text(chat_tokenizer: Any) -> None:
    chat_tokenizer.chat_template = None
    prompts = workload.TokenPrompts(chat_tokenizer)
    assert chat_tokenizer.decode(prompts.plain("plain")) == "plain"
    assert len(prompts.sized(["plain"], 33)) == 33


def test_text_prompts_hold_lengths_by_characters() -> None:
    prompts = workload.TextPrompts(characters=3.0, overhead=10)
    assert prompts.sized(["x" * 200, "y"], 40) == "x" * 90
    filled = prompts.sized(["x" * 20, "y" * 30], 40)
    assert len(filled) == 90
    assert filled.endswith("x" * 20)
    assert filled.startswith("y" * 30)


class TextOnly:
    """Prompts that show what was asked of them."""

    def plain(self, text: str) -> str:
        return text

    def sized(self, texts: Any, length: int) -> str:
        return f"{texts[0]}|{length}"


def take(work: workload.Workload, repeat: int, count: int) -> list[workload.Work]:
    import itertools

    return list(itertools.islice(work.requests(repeat, TextOnly()), count))


def test_every_repeat_has_its_own_order_and_all_settings_the_same() -> None:
    work = workload.Workload(QUESTIONS, 9, seed=3)
    first, again, other = take(work, 0, 8), take(work, 0, 8), take(work, 1, 8)
    assert first == again
    assert first != other
    assert sorted(w.prompt for w in first[:6]) == sorted(q.turns[0] for q in QUESTIONS)
    assert first[6].prompt == first[0].prompt, "the pool begins anew"
    assert {w.max_tokens for w in first} == {9}
    assert take(workload.Workload(QUESTIONS, 9, seed=4), 0, 8) != first


def test_lengths_are_the_traces_scaled_and_capped() -> None:
    rows = tuple(arrivals.TraceRow(0.0, c, g) for c, g in ((100, 40), (1000, 7), (1, 1)))
    lengths = workload.Lengths(scale=0.5, max_context=90, max_output=15)
    works = take(workload.Workload(QUESTIONS, 64, 0, rows, lengths), 0, 9)
    assert [int(str(w.prompt).split("|")[1]) for w in works] == [50, 90, 1]
    assert [w.max_tokens for w in works] == [15, 4, 1]


# The measuring loop


class FakeClient:
    """Answers after `seconds`; tokens come one by one, all at the end."""

    def __init__(self, log: list[Any], name: str, seconds: float = 0.01) -> None:
        self.log, self.name, self.seconds = log, name, seconds
        self.prompts = TextOnly()
        self.open = self.most_open = 0
        self.fail: BaseException | None = None
        self.error: str | None = None

    async def ask(self, work: workload.Work, due: float, started: float, salt: str) -> Answer:
        self.log.append((self.name, work.prompt, salt, due - started))
        self.open += 1
        self.most_open = max(self.most_open, self.open)
        try:
            await asyncio.sleep(self.seconds)
        finally:
            self.open -= 1
        if self.fail is not None and work.index == 3:
            raise self.fail
        return answer(work.index, due=due - started, seconds=time.perf_counter() - due, error=self.error)

    @asynccontextmanager
    async def watch(self, started: float) -> AsyncIterator[Observed]:  # noqa: ARG002
        yield Observed()


def answer(index: int = 0, *, due: float = 0.0, seconds: float = 1.0, tokens: int = 4, **fields: Any) -> Answer:
    chunks = tuple((seconds * (i + 1) / tokens, 1.0) for i in range(tokens))
    return Answer(**{"index": index, "due": due, "seconds": seconds, "chunks": chunks, "prompt_tokens": 5, **fields})


def measure(clients: dict[str, FakeClient], *points: Any, **extent: Any) -> list[Run]:
    work = workload.Workload(QUESTIONS, 4)
    with asyncio.Runner() as runner:
        return list(load.measure(clients, points, work, load.Extent(**extent), runner))


@pytest.fixture
def log() -> list[Any]:
    return []


@pytest.fixture
def clients(log: list[Any]) -> dict[str, FakeClient]:
    return {name: FakeClient(log, name) for name in ("none", "fast", "slow")}


def test_settings_take_turns_with_the_same_requests(clients: dict[str, FakeClient], log: list[Any]) -> None:
    points = arrivals.Closed(1), arrivals.Closed(3)
    runs = measure(clients, *points, repeats=2, requests=6)
    order = [(r.repeat, r.point.users, r.setting) for r in runs]
    assert [s for r, u, s in order if (r, u) == (0, 1)] == ["none", "fast", "slow"]
    assert [s for r, u, s in order if (r, u) == (0, 3)] == ["fast", "slow", "none"]
    assert [s for r, u, s in order if (r, u) == (1, 1)] == ["fast", "slow", "none"]
    asked = {name: [prompt for n, prompt, *_ in log if n == name] for name in clients}
    assert asked["none"] == asked["fast"] == asked["slow"]
    assert len({salt for _, _, salt, _ in log}) == 4, "nothing learnt in one run serves another"
    assert all([a.index for a in run.answers] == list(range(6)) for run in runs)


def test_a_closed_loop_has_as_many_requests_open_as_users(clients: dict[str, FakeClient]) -> None:
    (run, *_) = measure({"none": clients["none"]}, arrivals.Closed(4))
    assert clients["none"].most_open == 4
    assert len(run.answers) == 16
    assert 0.03 < run.seconds < 1.0
    (run,) = measure({"none": clients["none"]}, arrivals.Closed(2), duration=0.1)
    assert 4 <= len(run.answers) <= 20
    assert max(a.due for a in run.answers) < 0.1


def test_users_wait_after_a_failure(clients: dict[str, FakeClient]) -> None:
    client = clients["fast"]
    client.seconds, client.error = 0.0, "gone"
    (run,) = measure({"fast": client}, arrivals.Closed(1), duration=0.25)
    assert 1 <= len(run.answers) <= 4


def test_open_loops_do_not_wait_for_answers(clients: dict[str, FakeClient], log: list[Any]) -> None:
    client = clients["slow"]
    client.seconds = 0.1
    rows = tuple(arrivals.TraceRow(0.02 * i, 1, 1) for i in range(5))
    (run,) = measure({"slow": client}, arrivals.Replay(rows, 2.0))
    assert client.most_open == 5
    assert [due for *_, due in log] == pytest.approx([0.0, 0.01, 0.02, 0.03, 0.04])
    assert run.seconds == pytest.approx(0.14, abs=0.1)


def test_waiting_for_the_client_counts_as_latency() -> None:
    """A client that sends late does not hide a queue."""

    class Busy(FakeClient):
        async def ask(self, *args: Any) -> Answer:
            time.sleep(0.03)  # holds up the event loop
            return await super().ask(*args)

    rows = tuple(arrivals.TraceRow(0.0, 1, 1) for _ in range(4))
    (run,) = measure({"busy": Busy([], "busy")}, arrivals.Replay(rows, 1.0))
    assert max(a.seconds for a in run.answers) > 0.1


def test_errors_come_out_by_themselves(clients: dict[str, FakeClient]) -> None:
    clients["fast"].fail = InputError("broken.")
    with pytest.raises(InputError, match="broken"):
        measure(clients, arrivals.Closed(2), requests=6)


# Statistics


def run_of(setting: str, repeat: int, seconds: float, users: int = 1, **fields: Any) -> Run:
    answers = tuple(answer(i, seconds=seconds, **fields) for i in range(4))
    return Run(setting, arrivals.Closed(users), repeat, 4 * seconds, answers, Observed())


def test_latency_counts_tokens_not_chunks() -> None:
    one = answer(chunks=((0.5, 2.0), (0.9, 4.0), (1.0, 1.0)))
    found = load_stats.latencies([one, answer(error="x")])
    assert found.ttft.tolist() == [0.5]
    assert found.itl == pytest.approx([0.1] * 5)
    assert found.gap == pytest.approx([0.4, 0.1])
    assert one.output_tokens == 7
    assert one.mean_itl == pytest.approx(0.1)
    assert answer(tokens=1).mean_itl is None


def test_an_slo_is_kept_in_every_part_or_not_at_all() -> None:
    one = answer(chunks=((0.5, 1.0), (0.7, 1.0)), seconds=0.7)
    assert load_stats.SLO(0.5, 0.2001, 0.7).holds(one)
    assert load_stats.SLO(None, None, None).holds(one)
    for broken in (load_stats.SLO(0.4, None, None), load_stats.SLO(None, 0.1, None), load_stats.SLO(None, None, 0.6)):
        assert not broken.holds(one)
    assert not load_stats.SLO(None, None, None).holds(answer(error="failed"))


def test_failures_are_shown_and_bring_no_tokens() -> None:
    answers = (answer(0), answer(1, error="gone"))
    found = load_stats.figures([Run("a", arrivals.Closed(1), 0, 2.0, answers, Observed())], load_stats.SLO(itl=None))
    assert (found["requests"], found["failed"], found["output_tokens"]) == (2, 1, 4)
    assert found["tokens_per_second"] == pytest.approx(2.0)
    assert found["slo_attainment"] == pytest.approx(0.5)


def test_ratios_pool_repeats() -> None:
    runs = [run_of("none", r, 1.0 + 0.1 * r) for r in range(4)] + [run_of("fast", r, 0.5 + 0.05 * r) for r in range(4)]
    none, fast = load_stats.summarise(runs, ["none", "fast"], load_stats.SLO())
    assert "throughput_ratio" not in none
    assert fast["throughput_ratio"] == pytest.approx({"value": 2.0, "low": 2.0, "high": 2.0})
    assert fast["latency_ratio"]["value"] == pytest.approx(2.0)
    assert (fast["repeats"], fast["requests"]) == (4, 16)


def test_the_best_fixed_setting_is_chosen_on_the_other_half() -> None:
    """`lucky` is best in even repeats only, so odd ones must be compared with it and even ones with `steady`."""
    runs = []
    for r in range(4):
        runs += [run_of("none", r, 2.0), run_of("steady", r, 1.0), run_of("auto", r, 1.0)]
        runs += [run_of("lucky", r, 0.5 if r % 2 == 0 else 4.0)]
    settings = ["none", "steady", "lucky", "auto"]
    rows = {r["setting"]: r for r in load_stats.summarise(runs, settings, load_stats.SLO(), fixed=settings[:3])}
    over = rows["auto"]["over_best_fixed"]
    assert over["chosen"] == ["lucky", "steady"]
    assert over["value"] == pytest.approx((32 / 16) / (32 / (2 * 16 + 2 * 4)), rel=1e-6)
    assert "over_best_fixed" not in rows["steady"]
    few = load_stats.summarise([r for r in runs if r.repeat == 0], settings, load_stats.SLO(), fixed=settings[:3])
    assert few[-1]["over_best_fixed"] is None


def test_what_not_every_setting_has_run_is_left_out() -> None:
    runs = [run_of("none", 0, 1.0), run_of("fast", 0, 1.0), run_of("none", 1, 1.0), run_of("none", 0, 1.0, users=4)]
    assert load_stats.complete(runs, ["none", "fast"]) == runs[:2]


def test_accepted_length_comes_from_requests_or_from_the_server() -> None:
    own = run_of("a", 0, 1.0, target_forwards=2, draft_tokens=6, accepted_tokens=2)
    assert load_stats.figures([own], load_stats.SLO())["mean_accepted_length"] == pytest.approx(2.0)
    told = Run("b", arrivals.Closed(1), 0, 1.0, (answer(tokens=10),), Observed(draft_tokens=9, accepted_tokens=5))
    found = load_stats.figures([told], load_stats.SLO())
    assert (found["mean_accepted_length"], found["draft_tokens"]) == (2.0, 9)
    silent = load_stats.figures([run_of("c", 0, 1.0)], load_stats.SLO())
    assert silent["mean_accepted_length"] is None


def test_time_bins_weigh_their_samples() -> None:
    line = Timeline(per_bin=4)
    for i in range(8):
        line.add(0.1 * i, {"draft_nodes": (float(i), 1.0 if i else 3.0), "idle": (0.0, 0.0)})
    binned = line.binned(0.8)
    assert binned["seconds"] == [0.2, 0.6]
    assert binned["series"]["draft_nodes"] == pytest.approx([6 / 6, 22 / 4])
    assert binned["series"]["idle"] == [None, None]
    long = Timeline(1, [i / 100 for i in range(9000)], [{"x": (1.0, 1.0)}] * 9000)
    assert len(long.binned(90.0)["seconds"]) == MAX_BINS
    assert Timeline().binned(1.0) == {"seconds": [], "series": {}}


def test_reliability_compares_predictions_with_what_happened() -> None:
    first, second = Reliability(), Reliability()
    names = ("ngram", "other")
    first.add(names, np.array([0, 0, 1]), np.array([0.91, 0.93, 1.0]), np.array([True, False, True]))
    second.add(names, np.array([0, 0]), np.array([0.92, 0.1]), np.array([True, False]))
    first.merge(second)
    found = first.diagrams()
    assert found["ngram"]["nodes"] == [1, 3]
    assert found["ngram"]["predicted"] == pytest.approx([0.1, 0.92])
    assert found["ngram"]["observed"] == pytest.approx([0.0, 0.6667])
    assert found["ngram"]["calibration_error"] == pytest.approx((0.1 + 0.76) / 4)
    assert found["other"]["observed"] == [1.0]


# The charts


def test_ticks_are_round_and_inside() -> None:
    assert ticks(10.0) == pytest.approx([0, 5, 10])
    assert ticks(0.043) == pytest.approx([0, 0.02, 0.04])
    for top in (0.001, 0.37, 1.0, 8.2, 12345.0):
        assert 2 <= len(ticks(top)) <= 6
        assert ticks(top)[-1] <= top * 1.0001


def test_lines_break_where_nothing_was_measured() -> None:
    chart = lines([Series("a<b", "s0", [0, 1, 2, 3], [1.0, None, 2.0, 3.0])], Axes("t"))
    assert "a&lt;b" in chart
    path = chart.split('class="line s0" d="')[1].split('"')[0]
    assert path.count("M") == 2
    assert "nothing was measured" in lines([Series("a", "s0", [0], [None])], Axes("t"))


# The command


@pytest.fixture
def question_file(tmp_path: Path) -> str:
    path = tmp_path / "questions.jsonl"
    texts = [" ".join(f"w{3 + (i * 7 + j) % 11}" for j in range(20 + i)) for i in range(4)]
    lines_ = [{"question_id": i, "category": "qa", "turns": [text]} for i, text in enumerate(texts)]
    path.write_text("\n".join(map(json.dumps, lines_)))
    return str(path)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = make_loaded()
    opened = lambda _model, settings, _console: make_llm(loaded, speculation=settings["speculation"])  # noqa: E731
    monkeypatch.setattr(options, "open_llm", opened)


def command(question_file: str, *more: str) -> list[str]:
    start = ["bench", "load", "m", "--speculation", "auto", "ngram:k=4", "--questions", question_file]
    return [*start, "--requests", "3", "--max-tokens", "40", *more]


@pytest.mark.usefixtures("tiny")
def test_command_measures_engines(question_file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    json_path, html_path = tmp_path / "l.json", tmp_path / "l.html"
    files = ("--json", str(json_path), "--html", str(html_path))
    assert main(command(question_file, "--users", "1,3", "--repeats", "2", *files)) == 0
    result = json.loads(json_path.read_text())
    assert result["complete"] is True
    assert result["settings"] == ["none", "auto", "ngram:k=4"]
    assert len(result["rows"]) == 2 * 2 * 3
    assert {row["output_tokens"] for row in result["rows"]} == {120}
    assert {row["failed"] for row in result["rows"]} == {0}
    by_setting = {row["setting"]: row for row in result["summary"]}
    assert by_setting["none"]["mean_accepted_length"] == 1.0
    assert by_setting["ngram:k=4"]["accepted_tokens"] > 0
    assert by_setting["ngram:k=4"]["mean_accepted_length"] > 1.0
    assert set(by_setting["auto"]["over_best_fixed"]["chosen"]) <= {"none", "ngram:k=4"}
    series = [item["series"] for item in result["over_time"] if item["setting"] == "ngram:k=4"]
    assert len(series) == 4
    assert max(value or 0 for item in series for value in item["draft_nodes"]) > 0
    assert any(value is not None for item in series for value in item["acceptance/ngram"])
    assert any(any(item["used/ngram"]) for item in series)
    assert "none" not in result["reliability"]
    assert sum(result["reliability"]["ngram:k=4"]["ngram"]["nodes"]) > 0
    assert "3 users" in capsys.readouterr().out
    check_page(html_path.read_text())


@pytest.mark.usefixtures("tiny")
def test_a_trace_decides_the_lengths(question_file: str, tmp_path: Path) -> None:
    path = trace(tmp_path, HEADER + "0,30,5\n0.02,300,9\n0.04,8,2\n0.06,9,3\n")
    out = tmp_path / "l.json"
    more = ("--trace", str(path), "--rate-factor", "2", "--max-context", "60", "--json", str(out))
    assert main(command(question_file, *more)) == 0
    asked = [r for r in json.loads(out.read_text())["requests"] if r["setting"] == "auto"]
    assert [(r["prompt_tokens"], r["output_tokens"]) for r in asked] == [(30, 5), (60, 9), (8, 2)]
    assert [r["due"] for r in asked] == pytest.approx([0.0, 0.01, 0.02])


@pytest.mark.usefixtures("tiny")
def test_a_request_that_cannot_run_is_counted(
    question_file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = trace(tmp_path, HEADER + "0,30,5\n0,5000,9\n")
    assert main(command(question_file, "--trace", str(path))) == 0
    assert "3 request(s) failed" in capsys.readouterr().out
    path.write_text(HEADER + "0,5000,9\n")
    assert main(command(question_file, "--trace", str(path))) == 1
    assert "5000 tokens" in capsys.readouterr().err


@pytest.mark.usefixtures("tiny")
def test_interrupting_keeps_what_was_measured(
    question_file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = load.measure

    def interrupted(*args: Any) -> Any:
        for number, item in enumerate(plain(*args)):
            if number == 4:
                raise KeyboardInterrupt
            yield item

    monkeypatch.setattr(load, "measure", interrupted)
    json_path, html_path = tmp_path / "l.json", tmp_path / "l.html"
    files = ("--json", str(json_path), "--html", str(html_path))
    assert main(command(question_file, "--users", "1", "--repeats", "2", *files)) == 130
    result = json.loads(json_path.read_text())
    assert result["complete"] is False
    assert len(result["rows"]) == 4
    assert {row["repeats"] for row in result["summary"]} == {1}
    assert "Stopped early" in capsys.readouterr().out
    assert "Stopped early" in html_path.read_text()
    check_page(html_path.read_text())


@pytest.mark.usefixtures("tiny")
def test_json_to_stdout_is_all_of_stdout(question_file: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command(question_file, "--rate", "200", "--json")) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["points"] == [{"label": "200 req/s", "axis": "requests per second", "load": 200.0}]
    assert "200 req/s" in captured.err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["m", "--users", "1"], "--speculation"),
        (["m", "--speculation", "auto"], "--users N"),
        (["m", "--speculation", "auto", "--users", "0"], "at least 1"),
        (["m", "--speculation", "auto", "--users", "1", "--rate", "2"], "not allowed with"),
        (["m", "--speculation", "auto", "--rate", "0"], "above 0"),
        (["m", "--speculation", "auto", "--users", "1", "--rate-factor", "2"], "--trace FILE"),
        (["m", "--speculation", "warp:k=3", "--users", "1"], "warp"),
        (["m", "--url", "a=http://x", "--users", "1"], "excludes MODEL"),
        (["--url", "a=http://x", "--users", "1", "--dtype", "float32"], "--dtype"),
        (["--url", "a=http://x", "--url", "a=http://y", "--users", "1"], "alike"),
        (["--url", "localhost:8000", "--users", "1"], "NAME=http"),
        (["m", "--speculation", "auto", "--users", "1", "--html", "/no/such/folder/x.html"], "--html"),
    ],
)
def test_impossible_commands_exit_with_2(arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        code = main(["bench", "load", *arguments])
    except SystemExit as exit_:
        code = exit_.code
    assert code == 2
    assert says in capsys.readouterr().err


class Page(HTMLParser):
    """Whether tags are closed, and what a browser would fetch."""

    void = frozenset({"meta", "br", "hr", "img", "link", "input"})

    def __init__(self) -> None:
        super().__init__()
        self.stack: list[str] = []
        self.fetched: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.fetched += [str(value) for name, value in attrs if name in ("src", "href")]
        if tag not in self.void:
            self.stack.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.fetched += [str(value) for name, value in attrs if name in ("src", "href")]

    def handle_endtag(self, tag: str) -> None:
        assert self.stack.pop() == tag


def check_page(text: str) -> None:
    page = Page()
    page.feed(text)
    assert page.stack == []
    assert page.fetched == []
    assert "script" not in page.tags
    assert page.tags.count("svg") >= 6
    assert "nan" not in text.lower().replace("finance", "")


def test_losing_cells_are_red_and_names_are_escaped() -> None:
    row = {"value": 0.8, "low": 0.7, "high": 0.9}
    assert bench_load_table._times(row) == "[red]0.80x[/red]"
    assert bench_load_table._interval(row) == "[red]0.70–0.90[/red]"
    assert bench_load_table._interval({**row, "high": 1.1}) == "0.70–1.10"
    from paceline.bench.load_report import html

    runs = [run_of(name, r, 1.0 + (name != "none") * 0.1) for r in range(2) for name in ("none", "<b>")]
    result = {
        **load_stats.document(runs, ["none", "<b>"], load_stats.SLO()),
        "complete": True,
        "mode": "in process",
        "model": "m<i>",
        "host": {"device": "d", "python": "3", "versions": {}, "command": "c", "time": "t"},
        "extent": {"repeats": 2},
        "workload": {"questions": "q", "distinct_prompts": 3, "trace": None},
        "sampling": {},
    }
    text = html(result)
    check_page(text)
    assert "<b>" not in text
    assert "<i>" not in text
    assert '<td class="bad">0.91×</td>' in text
