"""`paceline bench systems`: catalogue, table, tests that fail, and systems on a tiny model by the same code."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import fakes
import numpy as np
import pytest
import torch
from lossless.reference import chi_square
from lossless.test_enumeration import EXACT

from paceline.bench.laws import error_of, random_laws, sampled_chain
from paceline.bench.spec import Question
from paceline.bench.systems import base, registry, replays
from paceline.bench.systems import context as context_module
from paceline.bench.systems.base import Row, System, above, at_least, at_most, exactly, rows_of, suite
from paceline.bench.systems.context import Context
from paceline.bench.systems.measures import NoResidual, law_p_value
from paceline.bench.systems.real_laws import joint_law, law_error, next_rows, real_laws
from paceline.cli import bench_systems
from paceline.cli.main import main
from paceline.config import SamplingParams
from paceline.errors import InputError
from paceline.model.loader import load_model
from paceline.verify.rejection import RejectionRule

DOCS = Path(__file__).parents[2] / "docs" / "systems.md"


def test_the_catalogue_is_complete() -> None:
    assert [s.number for s in registry.SYSTEMS] == list(range(1, 65))
    assert len({s.name for s in registry.SYSTEMS}) == len({s.title for s in registry.SYSTEMS}) == 64
    assert len({s.arxiv for s in registry.SYSTEMS}) == 64
    assert all(re.fullmatch(r"\d{4}\.\d{5}", s.arxiv) for s in registry.SYSTEMS)
    assert all(re.fullmatch(r"[a-z0-9+-]+", s.name) for s in registry.SYSTEMS)
    groups = [s.group for s in registry.SYSTEMS]
    assert {g: groups.count(g) for g in groups}["speculation"] == 28


def test_every_system_that_is_in_can_be_loaded() -> None:
    found = [s for s in registry.SYSTEMS if s.run]
    assert len(found) >= 6
    assert all(callable(s.load()) for s in found)


def test_the_docs_name_every_system_and_its_code() -> None:
    lines = [line for line in DOCS.read_text().splitlines() if line.startswith("| ") and "arxiv.org" in line]
    cells = [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in lines]
    assert [(row[0], row[1].split("]")[0].strip("[")) for row in cells] == [(s.name, s.arxiv) for s in registry.SYSTEMS]
    for (_, _, _, code), system in zip(cells, registry.SYSTEMS, strict=True):
        assert (code == base.NOT_YET) == (system.run is None), system.name
        for path in re.findall(r"`([^`]+)`", code):
            assert (DOCS.parents[1] / path).exists(), path


def test_names_that_do_not_exist_list_close_ones() -> None:
    with pytest.raises(InputError, match=r"no system is called 'seqoia'.*Did you mean sequoia"):
        registry.find(["seqoia"])
    with pytest.raises(InputError, match="smartspec"):
        registry.find(["smart-spec"])
    with pytest.raises(InputError, match="--list"):
        registry.find(["xyzzy"])
    assert [s.name for s in registry.find(["chen", "bass"])] == ["bass", "chen"]
    assert len(registry.find([])) == 64


@pytest.mark.parametrize(
    ("row", "passed"),
    [
        (at_least("t", 1.0, 1.0), True),
        (at_least("t", float("nan"), 1.0), False),
        (at_most("t", 1.01, 1.0), False),
        (above("t", 1.0, 1.0), False),
        (exactly("t", 3, 3), True),
        (exactly("t", "a, b", "a"), False),
    ],
)
def test_bounds(row: Row, passed: bool) -> None:
    assert row.passed is passed


def _good(_context: Context) -> Iterator[Row]:
    """A test that passes."""
    yield at_least("speed", 2.0, 1.5, "measured")


def _raises(_context: Context) -> Iterator[Row]:
    """A test that raises after a row."""
    yield exactly("before", 1, 1)
    raise ValueError("the cat is on the keyboard")


def _empty(_context: Context) -> Iterator[Row]:
    """A test that measures nothing."""
    return iter(())


def _interrupted(_context: Context) -> Iterator[Row]:
    """Ctrl-C."""
    yield exactly("first", 1, 1)
    raise KeyboardInterrupt


good = suite(_good)
bad = suite(_raises, _empty, _good)


def _terminated(_context: Context) -> Iterator[Row]:
    """A service manager ends the run."""
    yield exactly("first", 1, 1)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(5)
    yield exactly("never", 1, 1)


def _printed(_context: Context) -> Iterator[Row]:
    """What stands in the file and on stdout while a later system runs."""
    found = json.loads(Path(os.environ["SYSTEMS_JSON"]).read_text())
    yield exactly("rows in the file", len(found["rows"]), 1)
    yield exactly("complete", str(found["complete"]), "False")
    yield exactly("printed", str("measured" in Path(os.environ["SYSTEMS_OUT"]).read_text()), "True")


stopped = suite(_interrupted)
terminated = suite(_terminated)
printed = suite(_printed)
HERE = __name__


def test_a_test_that_raises_is_a_failed_row_and_the_others_go_on() -> None:
    rows = list(rows_of(System(1, "one", "T", "2401.00001", "g", f"{HERE}:bad"), Context()))
    assert [(row.test, row.passed) for row in rows] == [
        ("before", True),
        ("raises", False),
        ("empty", False),
        ("speed", True),
    ]
    assert rows[1].note == "ValueError: the cat is on the keyboard"
    assert {row.system for row in rows} == {"one"}
    (missing,) = rows_of(System(1, "one", "T", "2401.00001", "g", "paceline.nothing:run"), Context())
    assert missing.passed is False
    assert "ModuleNotFoundError" in missing.note


@pytest.fixture
def catalogue(monkeypatch: pytest.MonkeyPatch) -> None:
    systems = (
        System(1, "fine", "T", "2401.00001", "g", f"{HERE}:good"),
        System(2, "broken", "T", "2401.00002", "g", f"{HERE}:bad"),
        System(3, "later", "T", "2401.00003", "g"),
        System(4, "stopped", "T", "2401.00004", "g", f"{HERE}:stopped"),
        System(5, "terminated", "T", "2401.00005", "g", f"{HERE}:terminated"),
        System(6, "printed", "T", "2401.00006", "g", f"{HERE}:printed"),
    )
    monkeypatch.setattr(registry, "SYSTEMS", systems)
    monkeypatch.setattr(registry, "BY_NAME", {s.name: s for s in systems})


@pytest.mark.usefixtures("catalogue")
def test_table_json_and_exit_codes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "systems.json"
    assert main(["bench", "systems", "fine", "later", "--json", str(path)]) == 0
    out = capsys.readouterr().out
    assert re.search(r"fine +speed +2 +>= 1.5 +yes +measured", out)
    assert re.search(r"later +not yet", out)
    assert "1 of 1 tests of 1 systems hold; 1 systems are not in yet." in out
    found = json.loads(path.read_text())
    assert found["complete"] is True
    assert [(row["system"], row["passed"]) for row in found["rows"]] == [("fine", True), ("later", None)]
    assert main(["bench", "systems", "broken"]) == 1
    assert re.search(r"raises +no error +NO", capsys.readouterr().out)
    assert main(["bench", "systems", "latr"]) == 2
    assert "Did you mean later?" in capsys.readouterr().err


@pytest.mark.usefixtures("catalogue")
@pytest.mark.parametrize("ending", ["stopped", "terminated"])
def test_an_interrupt_keeps_the_finished_rows(ending: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, before = tmp_path / "systems.json", signal.getsignal(signal.SIGTERM)
    assert main(["bench", "systems", "fine", ending, "--json", str(path)]) == 130
    found = json.loads(path.read_text())
    assert found["complete"] is False
    assert [row["test"] for row in found["rows"]] == ["speed", "first"]
    out = capsys.readouterr().out
    assert re.search(rf"fine +speed .*\n.*{ending} +first", out)
    assert "Stopped early" in out
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.usefixtures("catalogue")
def test_rows_are_printed_and_written_when_their_system_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, out = tmp_path / "systems.json", tmp_path / "out"
    monkeypatch.setenv("SYSTEMS_JSON", str(path))
    monkeypatch.setenv("SYSTEMS_OUT", str(out))
    with out.open("w") as file, contextlib.redirect_stdout(file):
        assert main(["bench", "systems", "fine", "printed", "--json", str(path)]) == 0
    assert json.loads(path.read_text())["complete"] is True
    text = out.read_text()
    assert text.count("threshold") == 1, "columns are named once"
    assert re.search(r"printed +rows in the file +1 += 1 +yes", text)


@pytest.mark.usefixtures("catalogue")
def test_what_cannot_run_is_refused_before_the_first_test(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(context_module, "load_model", lambda *_, **__: fakes.make_loaded())
    (tmp_path / "empty").mkdir()
    path = tmp_path / "systems.json"
    for draft, says in (("/nope", "no such"), (str(tmp_path / "empty"), "neither a draft"), ("builtin", "no built-in")):
        assert main(["bench", "systems", "fine", "--draft", draft, "--json", str(path)]) == 2
        printed = capsys.readouterr()
        assert says in printed.err
        assert not printed.out
    for words in ((), ("--list",)):
        assert main(["bench", "systems", *words, "--json", str(tmp_path / "no" / "x.json")]) == 2
        assert f"Make the folder {tmp_path / 'no'} first." in capsys.readouterr().err
    assert not path.exists()


def test_the_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "systems", "--list"]) == 0
    out = capsys.readouterr().out
    assert all(s.name in out and s.arxiv in out for s in registry.SYSTEMS)
    assert main(["bench", "systems", "--list", "chen", "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert (found["arxiv"], found["in"]) == ("2302.01318", True)


def test_figures_that_json_cannot_hold() -> None:
    assert at_least("t", float("inf"), 1.0).as_json()["figure"] == "inf"
    assert bench_systems.shown(1e-12) == "1e-12"
    assert bench_systems.shown(None) == ""


@pytest.mark.parametrize("seed", range(6))
def test_the_chi_square_is_scipys(seed: int) -> None:
    random = np.random.default_rng(seed)
    law = random.dirichlet(np.full(30, 0.3)).reshape(5, 6)
    counts = random.multinomial(400, law.ravel()).reshape(5, 6).astype(np.float64)
    ours, theirs = law_p_value(counts, law), chi_square(counts, law)
    assert ours > 1e-3
    assert theirs > 1e-3
    skewed = counts + 40 * np.eye(5, 6)
    assert law_p_value(skewed, law) < 1e-3
    impossible = np.where(law == law.max(), 0.0, law)
    assert law_p_value(counts, impossible / impossible.sum()) == 0.0


def test_few_large_cells_give_scipys_p_value_exactly() -> None:
    law, counts = np.array([0.5, 0.3, 0.2]), np.array([60.0, 25.0, 15.0])
    assert law_p_value(counts, law) == pytest.approx(chi_square(counts, law), rel=1e-9)


def test_the_broken_rule_is_broken() -> None:
    p, q = random_laws(20, 3, SamplingParams()), random_laws(21, 3, SamplingParams())
    assert error_of(RejectionRule(), p, sampled_chain(q, 2), 3, length=2) < EXACT
    assert error_of(NoResidual(), p, sampled_chain(q, 2), 3, length=2) > 1e-3


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Context]:
    """A tiny model on disk, in quick mode."""
    folder = tmp_path_factory.mktemp("tiny")
    loaded = fakes.make_loaded(initializer_range=0.3)
    loaded.model.save_pretrained(folder)
    loaded.tokenizer.save_pretrained(folder)
    context = Context(load_model(str(folder), dtype="float32"), quick=True)
    random = np.random.default_rng(0)
    texts = [" ".join(f"w{t}" for t in random.integers(3, 96, 6 + i)) for i in range(12)]  # words that it knows
    context.questions = tuple(Question(i, "qa", (text,)) for i, text in enumerate(texts))
    yield context
    context.close()


def test_real_laws_are_the_models_own(tiny: Context) -> None:
    laws = real_laws(tiny)
    assert len(laws) == 10
    for at in laws:
        for law in (at.p, at.q):
            probabilities = law(()).probabilities(at.vocab)
            assert probabilities.sum() == pytest.approx(1.0)
            assert 1 < (probabilities > 0).sum() <= 8
    assert any(np.abs(at.p(()).probabilities(16) - at.q(()).probabilities(16)).max() > 0.01 for at in laws)
    error, places = law_error(tiny, RejectionRule(), lambda q: sampled_chain(q, 2))
    assert error < EXACT
    assert places == 10


def test_rows_after_a_prefix_are_those_of_the_plain_forward(tiny: Context) -> None:
    prefix, tokens = [5, 9, 11, 3], [7, 20]
    rows = next_rows(tiny.llm(), prefix, tokens)
    plain = fakes.make_model(fakes.make_config(initializer_range=0.3), attention="eager")  # a config of its own
    plain.load_state_dict(tiny.loaded.model.state_dict(), strict=False)
    with torch.inference_mode():
        wanted = [plain(torch.tensor([[*prefix, *more]])).logits[0, -1].numpy() for more in ([], [7], [20])]
    np.testing.assert_allclose(rows, np.stack(wanted), atol=1e-4)
    joint = joint_law(rows, tokens, top=4)
    assert joint.shape == (2, rows.shape[1])
    assert ((joint > 0).sum(axis=1) <= 4).all()


@pytest.mark.parametrize("name", ["chen", "ems_sd", "rsd", "sequoia", "cape", "pearl", "pipeinfer", "seed"])
def test_systems_run_on_a_tiny_model(tiny: Context, name: str) -> None:
    """Exactness holds on any model; how long drafts are accepted does not matter here."""
    rows = list(importlib.import_module(f"paceline.bench.systems.{name}").run(tiny))
    tiny.release()
    assert not [row for row in rows if "Error" in row.note]
    exact = [
        row for row in rows if row.test.startswith(("E0", "E1", "E2: ", "draft = target", "steps whose", "dynamic"))
    ]
    assert len(exact) >= {"sequoia": 1, "cape": 1, "pearl": 2, "pipeinfer": 1, "seed": 1}.get(name, 3)
    assert [row.test for row in exact if not row.passed] == []


def test_policies_replay_on_the_examples(tiny: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replays, "LOADS", (1,))
    rows = list(importlib.import_module("paceline.bench.systems.smartspec").run(tiny))
    assert not [row for row in rows if "Error" in row.note]
    assert {row.test: row.passed for row in rows}["auto: goodput over the best fixed length"] is True


def test_a_folder_without_traces_says_what_to_give(tmp_path: Path) -> None:
    context = Context(traces=tmp_path)
    with pytest.raises(InputError, match="--traces"):
        _ = context.traces
