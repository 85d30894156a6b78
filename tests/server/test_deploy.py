"""What is shipped under deploy/ fits the server: metric names, flags, versions, and files that parse."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import subprocess
import tomllib
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from paceline.config import EngineConfig, SamplingParams
from paceline.engine.request import FinishReason, Request
from paceline.engine.types import RequestOutput
from paceline.server.config import ServerConfig
from paceline.server.metrics import EngineGauges, Metrics

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
DASHBOARD: dict[str, Any] = json.loads((DEPLOY / "grafana" / "paceline.json").read_text())
PANELS: list[dict[str, Any]] = DASHBOARD["panels"]
KEYS = {field.name for config in (EngineConfig, ServerConfig) for field in dataclasses.fields(config)}
KNOWN = KEYS | {"model", "speculative_config", "config", "home"}  # PACELINE_HOME is the store's


def exported_names() -> set[str]:
    """Names of all series after one of everything has happened."""
    metrics = Metrics("m", lambda: EngineGauges(1, 1, 4, 1, 1, 1.0, 2.0, 0.5))
    request = Request("r", [1, 2], 1, SamplingParams(), seed=0)
    request.stats.drafted_by["ngram"] = 1
    news = RequestOutput("r", token_ids=(2,), drafters=("ngram",), finish_reason=FinishReason.STOP, num_draft_tokens=1)
    metrics.on_news(request, news)
    metrics.on_http("/health", 200, 0.1)
    metrics.on_rejected("invalid")
    families = text_string_to_metric_families(metrics.render()[0].decode())
    return {sample.name for family in families for sample in family.samples}


def expressions() -> list[str]:
    found = [target["expr"] for panel in PANELS for target in panel.get("targets", ())]
    return found + [variable["query"]["query"] for variable in DASHBOARD["templating"]["list"]]


def test_every_metric_of_the_dashboard_is_exported() -> None:
    used = {name for text in expressions() for name in re.findall(r"\b(?:vllm|paceline|process)[:_]\w+", text)}
    assert len(used) > 20
    assert used - exported_names() == set()


def test_expressions_are_balanced() -> None:
    for text in expressions():
        for opening, closing in ("()", "{}", "[]"):
            assert text.count(opening) == text.count(closing), text


def test_the_dashboard_has_its_rows() -> None:
    rows = [panel["title"] for panel in PANELS if panel["type"] == "row"]
    assert rows == ["Traffic", "Latency", "Speculation", "Memory", "Errors"]


def test_panels_have_ids_of_their_own_and_do_not_overlap() -> None:
    ids = [panel["id"] for panel in PANELS]
    assert len(set(ids)) == len(ids)
    for grid in (panel["gridPos"] for panel in PANELS):
        assert grid["w"] > 0
        assert grid["h"] > 0
        assert 0 <= grid["x"] <= 24 - grid["w"]
    for one, other in combinations(PANELS, 2):
        a, b = one["gridPos"], other["gridPos"]
        beside = a["x"] + a["w"] <= b["x"] or b["x"] + b["w"] <= a["x"]
        below = a["y"] + a["h"] <= b["y"] or b["y"] + b["h"] <= a["y"]
        assert beside or below, (one["title"], other["title"])


def test_the_dashboard_asks_for_its_datasource() -> None:
    (asked,) = DASHBOARD["__inputs"]
    assert (asked["name"], asked["pluginId"]) == ("DS_PROMETHEUS", "prometheus")
    for panel in PANELS:
        if panel["type"] != "row":
            sources = [panel["datasource"], *(target["datasource"] for target in panel["targets"])]
            assert {source["uid"] for source in sources} == {"${DS_PROMETHEUS}"}
            references = [target["refId"] for target in panel["targets"]]
            assert len(set(references)) == len(references)


def test_the_example_config_has_keys_that_exist_and_values_that_are_taken() -> None:
    given = tomllib.loads((DEPLOY / "config.example.toml").read_text())
    assert set(given) <= KNOWN
    for config in (EngineConfig, ServerConfig):
        config(**{field.name: given[field.name] for field in dataclasses.fields(config) if field.name in given})
    assert "api_key" not in given


@pytest.mark.parametrize("name", ["Containerfile", "paceline.service", "README.md", "config.example.toml"])
def test_variables_belong_to_flags(name: str) -> None:
    variables = re.findall(r"\bPACELINE_([A-Z][A-Z_]*[A-Z])\b", (DEPLOY / name).read_text())
    assert {variable.lower() for variable in variables} <= KNOWN


def test_the_image_installs_the_torch_that_the_project_wants() -> None:
    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    (torch,) = (item for item in wanted if item.startswith("torch"))
    assert f"'{torch}'" in (DEPLOY / "Containerfile").read_text()


def test_the_image() -> None:
    text = (DEPLOY / "Containerfile").read_text()
    stages = dict(re.findall(r"^\s*(CMD|ENTRYPOINT) (\[.*\])$", text, re.MULTILINE))
    assert json.loads(stages["ENTRYPOINT"]) == ["paceline", "serve"]
    python, flag, program = json.loads(stages["CMD"])
    assert (python, flag) == ("python", "-c")
    compile(program, "healthcheck", "exec")
    for line in ("FROM python:3.12-slim", "USER 10001", "VOLUME /models", "STOPSIGNAL SIGTERM"):
        assert f"\n{line}\n" in text
    copied = [path for paths in re.findall(r"^COPY (.*) \S+$", text, re.MULTILINE) for path in paths.split()]
    assert all((ROOT / path).exists() for path in copied)


def test_the_unit_drains_before_it_is_killed() -> None:
    lines = (DEPLOY / "paceline.service").read_text().splitlines()
    for line in ("KillSignal=SIGTERM", "KillMode=mixed", "Restart=on-failure", "DynamicUser=yes"):
        assert line in lines
    (timeout,) = (line for line in lines if line.startswith("TimeoutStopSec="))
    assert int(timeout.removeprefix("TimeoutStopSec=")) >= 120


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not installed")
def test_systemd_reads_the_unit(tmp_path: Path) -> None:
    """With the program replaced by one that exists, nothing is left to complain about."""
    unit = tmp_path / "paceline.service"
    text = (DEPLOY / "paceline.service").read_text()
    unit.write_text(text.replace("ExecStart=/opt/paceline/bin/paceline serve", "ExecStart=/bin/true"))
    result = subprocess.run(["systemd-analyze", "verify", str(unit)], capture_output=True, text=True, check=False)
    assert [line for line in result.stderr.splitlines() if "paceline.service" in line] == []
