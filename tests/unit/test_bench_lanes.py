"""`paceline bench lanes`: the sweep, the table, the chart, and what a machine's times say."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from fakes import make_llm

from paceline.bench.lane_table import SCHEDULES, Sweep
from paceline.bench.lane_times import SIZES, Machine, measure
from paceline.cli.bench_lanes import table_of, verdict
from paceline.cli.main import main
from paceline.lanes.choice import LaneTimes
from paceline.llm import LLM


def test_the_sweep() -> None:
    rows = list(Sweep((4.0,), (0.3, 0.9), tokens=60).rows())
    speed = {(row.acceptance, row.schedule): row.over_none for row in rows}
    assert [row.schedule for row in rows] == [*SCHEDULES, *SCHEDULES]
    assert speed[0.3, "none"] == speed[0.9, "none"] == 1.0
    assert speed[0.9, "PEARL"] > 1.2 * speed[0.9, "speculation"]
    assert speed[0.9, "PEARL"] > speed[0.9, "PEARL, post only"] > speed[0.9, "speculation"]
    assert table_of(rows).row_count == 2


def test_a_target_that_slows_down_with_its_tokens() -> None:
    def pearl(growth: float) -> float:
        return next(r.over_none for r in Sweep((4.0,), (0.9,), growth, tokens=60).rows() if r.schedule == "PEARL")

    assert pearl(0.3) < pearl(0.0)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "lanes.json"
    common = ["bench", "lanes", "--clock-only", "--ratio", "3", "--tokens", "20"]
    assert main([*common, "--acceptance", "0.5,0.8", "--json", str(out)]) == 0
    assert "PipeInfer" in capsys.readouterr().out
    found = json.loads(out.read_text())
    assert len(found["rows"]) == 2 * len(SCHEDULES)
    assert (tmp_path / "lanes.png").stat().st_size > 1000
    assert main([*common, "--acceptance", "1"]) == 2
    assert "--acceptance" in capsys.readouterr().err


def test_what_times_say() -> None:
    free = LaneTimes({1: 0.004, 16: 0.004}, 0.001)
    busy = LaneTimes({1: 0.009, 16: 0.009}, 0.003)
    assert "Lanes would pay: PEARL with length 4" in verdict(Machine(16, free, free, 0.8))
    assert "would not pay: speculation with length" in verdict(Machine(2, free, busy, 0.8))
    assert "would not pay: none is faster" in verdict(Machine(2, free, busy, 0.01))


@pytest.fixture
def llm() -> Iterator[LLM]:
    llm = make_llm()
    yield llm
    llm.close()


def test_measuring_gives_threads_and_blocks_back(llm: LLM) -> None:
    threads = torch.get_num_threads()
    machine = measure(llm, llm, [[5, 9, 11, 3]], 12)
    assert set(machine.alone.target) == set(machine.beside.target) == set(SIZES)
    assert machine.acceptance > 0.9, "the model is its own draft"
    assert torch.get_num_threads() == threads == machine.threads
    assert llm.engine.stages.scheduler.blocks.counts().used == 0
