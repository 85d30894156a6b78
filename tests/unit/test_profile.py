"""Measuring costs on tiny models, the cache of what was measured, the roofline, and `paceline profile`."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engine_tools import llm, loaded
from fakes import make_engine, make_loaded

from paceline import LLM
from paceline.bench import roofline
from paceline.bench.roofline import Roofline, active_weights, rate
from paceline.cli import options
from paceline.cli import profile as command
from paceline.cli.main import main
from paceline.engine import profile, profile_cache
from paceline.engine.profile import SIZES, Shape, cost_table, measure_costs, new_cost_table, profile_key
from paceline.engine.profile_cache import ProfileKey, load_profile, save_profile
from paceline.model.packed_linear import pack_linears
from paceline.plan.cost_model import CostTable

TABLE = CostTable((1, 2, 4, 64), (0.010, 0.0105, 0.012, 0.080), 1e-4, 1e-6, about={"model": "m"})
KEY = ProfileKey("shape", "float32", "machine", 1, 1152, "2.13", "5.23", "0.1.0")
ROOFLINE = Roofline(weights=1_000_000, bytes_per_weight=4, bytes_per_second=1e9, flops_per_second=1e9)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of its own."""
    monkeypatch.setenv("PACELINE_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Time each shape twice."""
    monkeypatch.setattr(profile, "_REPEATS", 2)


class Clock:
    """A clock that forwards move on."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now

    def run(self, seconds: Callable[[Shape], float]) -> Callable[[Shape], float]:
        def run(shape: Shape) -> float:
            taken = seconds(shape)
            self.now += taken
            return taken

        return run


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Stands in for the clock of the profiler."""
    made = Clock()
    monkeypatch.setattr(profile.time, "perf_counter", made.perf_counter)
    return made


def parts(engine: Any) -> tuple[Any, Any]:
    """Runner and blocks of an engine."""
    return engine.runner, engine.stages.scheduler.blocks


@pytest.mark.usefixtures("quick")
def test_a_tiny_model_gets_sane_costs_and_all_its_blocks_back() -> None:
    runner, blocks = parts(make_engine(loaded()))
    free = blocks.num_available
    seen: list[tuple[int, int]] = []
    table = measure_costs(runner, blocks, 512, lambda done, total: seen.append((done, total)))
    assert table.tokens == tuple(n for n in SIZES if n + 128 <= 512)
    assert all(0.0 < t < 10.0 for t in table.seconds)
    assert 0.0 <= table.per_sequence < 1.0
    assert 0.0 <= table.per_context_token < 0.1
    assert [n for n, _ in table.about["measured_sequences"]] == [4, 16]
    assert [done for done, _ in seen] == list(range(1, len(seen) + 1))
    assert seen[-1][0] == seen[-1][1]
    assert blocks.num_available == free
    blocks.check()
    json.dumps(table.to_json())


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("num_blocks", [1, 2, 3, 5, 9, 17, 33, 34, 45, 70])
def test_a_small_kv_cache_measures_fewer_shapes(num_blocks: int) -> None:
    runner, blocks = parts(make_engine(loaded()))
    taken: list[int] = []
    assert blocks.grow(taken, (blocks.num_available - num_blocks) * blocks.block_size)
    table = measure_costs(runner, blocks, 512)
    context, capacity = table.about["context"], num_blocks * blocks.block_size
    assert 0 < context <= capacity // 2
    assert context + table.tokens[-1] <= capacity
    assert blocks.num_available == num_blocks
    blocks.release(taken)


@pytest.mark.usefixtures("quick")
def test_a_cache_without_a_block_is_refused_and_nothing_is_lost() -> None:
    runner, blocks = parts(make_engine(loaded()))
    taken: list[int] = []
    assert blocks.grow(taken, blocks.num_available * blocks.block_size)
    with pytest.raises(MemoryError, match="too small"):
        measure_costs(runner, blocks, 512)
    blocks.release(taken)
    blocks.check()


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("length", [2, 3, 33, 300])
def test_a_short_model_is_measured_within_its_length(length: int) -> None:
    runner, blocks = parts(make_engine(loaded()))
    table = measure_costs(runner, blocks, length)
    assert table.about["context"] == min(128, length // 2)
    assert len(table.tokens) >= 2
    assert all(c < length for c, _ in table.about["measured_context"])


def linear(shape: Shape) -> float:
    """A machine whose costs are known."""
    new = shape.tokens * shape.sequences
    return 0.01 + 1e-4 * new + 3e-4 * (shape.sequences - 1) + 1e-6 * shape.sequences * shape.context


def shapes(room: int = 4096, num_blocks: int = 1024) -> list[Shape]:
    """All shapes of a model with `room`."""
    return profile._shapes(128, room, lambda tokens: -(-tokens // 16), num_blocks)


def test_the_costs_of_a_known_machine_are_told_apart(clock: Clock) -> None:
    table = profile._fit(profile._time(clock.run(linear), shapes(), lambda *_: None), 128)
    assert table.tokens == SIZES
    assert table.seconds == pytest.approx([0.01 + 1e-4 * n for n in SIZES])
    assert table.per_sequence == pytest.approx(3e-4)
    assert table.per_context_token == pytest.approx(1e-6)


def test_the_fastest_of_several_times_counts(clock: Clock) -> None:
    rng = np.random.default_rng(0)
    noisy = clock.run(lambda shape: linear(shape) * (1.0 + 3.0 * float(rng.random() < 0.3)))
    times = profile._time(noisy, shapes(), lambda *_: None)
    small = [shape for shape in times if shape.tokens <= 16]
    assert np.mean([times[s] == pytest.approx(linear(s)) for s in small]) > 0.9


def test_a_slow_machine_measures_fewer_sizes_in_seconds(clock: Clock) -> None:
    times = profile._time(clock.run(lambda shape: 30.0 * linear(shape)), shapes(), lambda *_: None)
    assert clock.now < 12.0
    assert 2 <= len(times) < len(SIZES)
    slowest = profile._time(clock.run(lambda _: 60.0), shapes(), lambda *_: None)
    assert len(slowest) == 2


def test_a_single_size_is_stretched_to_a_table() -> None:
    table = profile._fit({Shape(1, 1, 4): 0.5}, 4)
    assert table.tokens == (1, 2)
    assert table.seconds[1] == 2 * table.seconds[0]


def test_noise_gives_no_negative_costs() -> None:
    times = {Shape(1, 1, 128): 0.2, Shape(2, 1, 128): 0.1, Shape(1, 4, 128): 0.1, Shape(1, 1, 512): 0.1}
    table = profile._fit(times, 128)
    assert (table.per_sequence, table.per_context_token) == (0.0, 0.0)


def remembered(engine: Any, say: Callable[[str], None] = lambda _: None) -> CostTable:
    """The costs of the tiny model through the cache."""
    return cost_table(loaded(), *parts(engine), 512, say)


@pytest.mark.usefixtures("quick")
def test_measured_once_and_remembered(home: Path) -> None:
    engine = make_engine(loaded())
    said: list[str] = []
    first = remembered(engine, said.append)
    assert said[0].startswith("measuring step times (1/")
    assert {"model": "tiny-llama", "dtype": "float32"}.items() <= first.about.items()
    said.clear()
    assert remembered(engine, said.append) == first
    assert said == []
    assert len(list((home / "profiles").iterdir())) == 1, "no temporary file is left"
    again = new_cost_table(loaded(), *parts(engine), 512, lambda *_: None)
    assert again != first
    assert remembered(engine) == again


@pytest.mark.parametrize("change", [{"machine": "other"}, {"threads": 2}, {"dtype": "bfloat16"}, {"torch": "3"}])
def test_every_part_of_the_key_counts(change: dict[str, Any]) -> None:
    save_profile(KEY, TABLE)
    assert load_profile(KEY) == TABLE
    assert load_profile(replace(KEY, **change)) is None


def test_the_key_of_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    runner, blocks = parts(make_engine(loaded()))

    def key(made: Any, length: int = 512) -> ProfileKey:
        return profile_key(made, runner, blocks, length)

    first = key(loaded())
    renamed = make_loaded()
    renamed.config._name_or_path = "elsewhere"
    assert key(replace(renamed, name="other", path=Path("other"))) == first, "weights and names do not count"
    assert key(make_loaded(num_hidden_layers=2)) != first
    assert key(replace(loaded(), dtype=torch.bfloat16)) != first
    assert key(replace(loaded(), kept_kinds=("Q4_1",))) != first
    assert key(loaded(), 64) != first, "a short model measures fewer sizes"
    assert key(loaded(), 5000).longest == min(128 + SIZES[-1], blocks.num_blocks * blocks.block_size)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    assert key(loaded()) != first
    monkeypatch.setattr("paceline.__version__", "99")
    assert key(loaded()).paceline == "99"


@pytest.mark.parametrize(
    "damage",
    [
        lambda _: "",
        lambda text: text[: len(text) // 2],
        lambda _: "[" * 100_000,
        lambda _: "[]",
        lambda text: text.replace("paceline-cost/1", "paceline-cost/9"),
        lambda text: text.replace('"tokens": [1, 2, 4, 64]', '"tokens": [1, 4, 2, 64]'),
        lambda text: text.replace('"machine": "machine"', '"machine": "another"'),
        lambda text: json.dumps({"key": json.loads(text)["key"]}),
    ],
)
def test_a_damaged_or_foreign_file_is_measured_again_with_a_warning(
    damage: Callable[[str], str], caplog: pytest.LogCaptureFixture
) -> None:
    save_profile(KEY, TABLE)
    KEY.path().write_text(damage(KEY.path().read_text()))
    with caplog.at_level(logging.WARNING):
        assert load_profile(KEY) is None
    assert "measuring again" in caplog.text
    assert str(KEY.path()) in caplog.text
    save_profile(KEY, TABLE)
    caplog.clear()
    assert load_profile(KEY) == TABLE
    assert caplog.text == ""


def test_bytes_that_are_no_text_are_damage_too(caplog: pytest.LogCaptureFixture) -> None:
    save_profile(KEY, TABLE)
    KEY.path().write_bytes(b"\xff\xfe\x00")
    assert load_profile(KEY) is None
    assert "measuring again" in caplog.text


@pytest.mark.usefixtures("quick")
def test_a_damaged_file_is_replaced_at_the_next_start(caplog: pytest.LogCaptureFixture) -> None:
    engine = make_engine(loaded())
    remembered(engine)
    path = profile_key(loaded(), *parts(engine), 512).path()
    path.write_text("{")
    again = remembered(engine)
    assert "measuring again" in caplog.text
    assert remembered(engine) == again


def test_a_folder_that_cannot_be_written_costs_a_line_in_the_log(
    home: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    home.write_text("a file in the way")
    with caplog.at_level(logging.INFO):
        save_profile(KEY, TABLE)
    home.unlink()

    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError("read-only")

    monkeypatch.setattr(profile_cache.os, "replace", refuse)
    with caplog.at_level(logging.INFO):
        save_profile(KEY, TABLE)
    assert [record.levelname for record in caplog.records] == ["INFO", "INFO"]
    assert "read-only" in caplog.text
    assert list((home / "profiles").iterdir()) == [], "what was begun is cleared away"
    assert load_profile(KEY) is None


def test_roofline_is_memory_then_arithmetic() -> None:
    assert ROOFLINE.memory_seconds == pytest.approx(4e-3)
    assert ROOFLINE.seconds_per_token == pytest.approx(2e-3)
    assert ROOFLINE.ridge == pytest.approx(2.0)
    assert [ROOFLINE.seconds(n) for n in (1, 2, 4)] == pytest.approx([4e-3, 4e-3, 8e-3])
    assert (rate(31.94e9, "B"), rate(4.27e12, "B")) == ("31.9 GB/s", "4.27 TB/s")


def test_weights_that_a_token_meets() -> None:
    tied, untied = (make_loaded(tie_word_embeddings=tie) for tie in (True, False))
    table = 96 * 32
    everything = sum(p.numel() for p in untied.model.parameters())
    assert active_weights(untied.model, untied.config) == everything - table, "of the embedding only rows are read"
    assert active_weights(tied.model, tied.config) == everything - table, "tied, it is the output layer"
    pack_linears(untied.model)
    assert active_weights(untied.model, untied.config) == everything - table, "packed or not"
    experts = make_loaded("qwen3_moe")
    inside = sum(p.numel() for name, p in experts.model.named_parameters() if ".experts" in name)
    outside = sum(p.numel() for name, p in experts.model.named_parameters() if ".experts" not in name)
    assert inside > 0
    assert active_weights(experts.model, experts.config) == outside - table + round(inside * 2 / 6)


def test_roofline_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roofline, "_SECONDS", 0.0)
    monkeypatch.setattr(roofline, "_BUFFER", {"cpu": 1 << 20})
    monkeypatch.setattr(roofline, "_SIDE", {"cpu": 64})
    found = roofline.measure_roofline(loaded())
    assert 1e7 < found.bytes_per_second < 1e14
    assert 1e6 < found.flops_per_second < 1e15
    assert found.bytes_per_weight == 4


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> LLM:
    """`paceline profile` gets the tiny model and a known roofline."""
    made = llm()
    monkeypatch.setattr(profile, "_REPEATS", 2)
    monkeypatch.setattr(options, "open_llm", lambda *_: made)
    monkeypatch.setattr(roofline, "measure_roofline", lambda _: ROOFLINE)
    return made


@pytest.mark.usefixtures("tiny")
def test_command_prints_writes_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str], home: Path) -> None:
    path = tmp_path / "cost.json"
    assert main(["profile", "m", "--json", str(path)]) == 0
    out = capsys.readouterr().out
    for text in ("tokens/s", "Nearly free: up to", "Further sequence", "Roofline: 4.00 ms", "Measured now", str(home)):
        assert text in out
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    table = CostTable.load(path)
    assert {"host", "roofline", "measured_tokens", "measured_at"} <= set(table.about)
    assert table.about["roofline"]["ridge_tokens"] == pytest.approx(2.0)


@pytest.mark.usefixtures("tiny")
def test_command_uses_the_cache_unless_told_not_to(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chart = tmp_path / "c.png"
    assert main(["profile", "m", "--json", "--plot", str(chart)]) == 0
    first = capsys.readouterr()
    assert "Measured now" in first.err, "the table makes room for the JSON"
    assert chart.exists()
    assert main(["profile", "m", "--json"]) == 0
    second = capsys.readouterr()
    assert "--refresh measures again" in second.err
    assert json.loads(second.out)["seconds"] == json.loads(first.out)["seconds"]
    assert main(["profile", "m", "--json", "--refresh"]) == 0
    third = capsys.readouterr()
    assert "Measured now" in third.err
    assert json.loads(third.out)["seconds"] != json.loads(first.out)["seconds"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [("--json no/such/folder/c.json", "--json"), ("--plot no/such/c.png", "--plot"), ("--dtype int8", "--dtype")],
)
@pytest.mark.usefixtures("tiny")
def test_command_refuses_bad_arguments(arguments: str, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        code = main(["profile", "m", *arguments.split()])
    except SystemExit as ended:
        code = int(ended.code or 0)
    assert code == 2
    assert says in capsys.readouterr().err


def test_nearly_free_and_notes() -> None:
    assert command.nearly_free(TABLE) == 2, "4 tokens take a fifth longer"
    assert command.nearly_free(TABLE, share=0.2) == 4
    assert command.nearly_free(CostTable((1, 2), (1.0, 2.0))) == 1
    text = command.notes(TABLE, ROOFLINE)
    assert "up to 2 tokens" in text
    assert "0.100 ms" in text
    assert "1.00 µs" in text
    assert "below the roofline" in text, "64 tokens took 80 ms, and cannot take less than 128"
    slow = replace(ROOFLINE, flops_per_second=1e12)
    assert "below the roofline" not in command.notes(TABLE, slow)
