"""`paceline vllm`: arguments, the table, the dashboard. What needs vLLM itself is in `tests/in_vllm`."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import pytest

from paceline.cli.main import main, parse_args
from paceline.cli.vllm_serve import SCHEDULER, with_defaults
from paceline.errors import ConfigError, InputError
from paceline.integrations.vllm.metrics import NAMES, PRICE
from paceline.integrations.vllm.table import batch_table, best_lengths

DASHBOARD = Path(__file__).parents[2] / "deploy" / "grafana" / "paceline-vllm.json"


def test_all_arguments_are_vllms() -> None:
    given = ["MODEL", "--port", "8000", "--help", "-tp", "2", "--speculative-config", '{"method": "ngram"}']
    assert parse_args(["vllm", "serve", *given]).arguments == given
    assert parse_args(["vllm", "serve", "--model", "M"]).arguments == ["--model", "M"]


def test_defaults_are_added_where_nothing_is_given() -> None:
    made = with_defaults(["MODEL"])
    assert made[:3] == ["MODEL", "--scheduler-cls", SCHEDULER]
    assert json.loads(made[-1])["method"] == "custom_class"
    assert json.loads(with_defaults(["MODEL", "-tp", "2"])[-1])["method"] == "ngram", "workers in other processes"
    given = ["MODEL", "--speculative-config.method", "ngram", "--scheduler-cls", SCHEDULER]
    assert with_defaults(given) == given
    assert "-sc" in with_defaults(["MODEL", "-sc", "{}"])
    assert len(with_defaults(["MODEL", "-sc", "{}"])) == 5
    with pytest.raises(ConfigError, match="brings its own"):
        with_defaults(["MODEL", "--scheduler_cls=other.Scheduler"])


@pytest.mark.skipif(find_spec("vllm") is not None, reason="vLLM is installed")
@pytest.mark.parametrize("kind", ["serve", "tune"])
def test_without_vllm_the_command_says_what_to_install(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["vllm", kind, "MODEL"]) == 2
    assert "paceline[vllm]" in capsys.readouterr().err


@pytest.mark.skipif(find_spec("vllm") is not None, reason="vLLM is installed, and shows its own help behind ours")
@pytest.mark.parametrize("arguments", [[], ["--help"], ["MODEL", "-h"]])
def test_help_needs_no_vllm(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["vllm", "serve", *arguments]) == 0
    assert "examples:" in capsys.readouterr().out


def test_the_table_takes_the_shortest_length_that_nothing_beats() -> None:
    rates = {
        1: {0: 100.0, 2: 130.0, 4: 150.0},
        2: {0: 200.0, 2: 240.0, 4: 243.0},
        8: {0: 400.0, 2: 403.0, 4: 300.0},
        16: {0: 500.0, 2: 400.0, 4: 300.0},
    }
    best = best_lengths(rates)
    assert best == {1: 4, 2: 2, 8: 0, 16: 0}
    assert batch_table(best) == [[1, 1, 4], [2, 2, 2], [3, 16, 0]]
    with pytest.raises(InputError, match="0 among them"):
        best_lengths({1: {2: 100.0}})


def test_the_dashboard_shows_what_is_counted() -> None:
    text = DASHBOARD.read_text(encoding="utf-8")
    board = json.loads(text)
    queries = " ".join(target["expr"] for panel in board["panels"] for target in panel["targets"])
    for name in (*(f"{name}_total" for name in NAMES), PRICE):
        assert name in queries
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])
