"""`paceline train` from the command line, on a tiny target."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from fakes import make_loaded

from paceline.cli.main import main
from paceline.model.draft_weights import load_draft
from paceline.model.loader import LoadedModel


@pytest.fixture
def target(monkeypatch: pytest.MonkeyPatch) -> LoadedModel:
    loaded = make_loaded()
    monkeypatch.setattr("paceline.model.loader.load_model", lambda *_, **__: loaded)
    return loaded


def train(*words: str) -> int:
    return main(["train", *words])


SMALL = ("--tokens", "400", "--batch", "16", "--length", "32", "--steps", "3", "--batch-tokens", "200", "--layers", "2")


def test_draft_and_vocab(
    target: LoadedModel, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    monkeypatch.setattr("sys.argv", ["paceline", "train", "draft", "tiny", "--out", str(run)])
    assert train("draft", "tiny", "--out", str(run), *SMALL) == 0
    out, err = capsys.readouterr()
    assert f"Draft: {run / 'draft'}" in out
    assert "written: 100%" in err
    assert "step      3" in err
    assert load_draft(str(run / "draft"), target).config.num_hidden_layers == 2
    made = json.loads((run / "draft" / "draft.json").read_text())
    assert made["command"] == "paceline train draft tiny --out run", "folders of this machine are not recorded"
    assert made["target"]["name"] == "tiny-llama"
    card = (run / "draft" / "README.md").read_text()
    assert f"acceptance {made['heldout']['acceptance']:.3f} at" in card
    assert str(tmp_path) not in card + json.dumps(made)

    listing = tmp_path / "vocab.json"
    assert train("vocab", "tiny", str(run / "text"), "--size", "20", "--out", str(listing)) == 0
    kept = json.loads(listing.read_text())
    assert len(kept["token_ids"]) == 20
    assert 2 in kept["token_ids"]
    assert f"cover {kept['coverage']:.2%}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("draft m --layers 2 --out FILE", "is, or lies below, a file"),
        ("draft m --layers 2 --out FILE/run", "is, or lies below, a file"),
        ("acceptance-head m --draft d --out FILE/run", "is, or lies below, a file"),
        ("vocab m FILE --size 5 --out RUN/no/v.json", "Make the folder"),
        ("draft m", "--out"),
        ("draft m --out RUN --tokens none", "such as 500, 20k or 5M"),
        ("draft m --out RUN --layers 9", "layers: is 9, and the target has 3 layers"),
        ("draft m --out RUN --layers 2 --intermediate 8", "intermediate: is 8"),
        ("draft m --out RUN --tv-weight 2", "tv-weight: is 2.0; give 0 to 1"),
        ("draft m --out RUN --layers 2 --prompts missing.txt", "missing.txt"),
        ("draft m --out RUN --layers 2 --text RUN/none", "holds no training text"),
        ("vocab m missing.txt --size 10 --out v.json", "missing.txt"),
        ("vocab m missing.txt --size 10 --out v.txt", "end the name with .npy or .json"),
    ],
)
@pytest.mark.usefixtures("target")
def test_mistakes(words: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("text")
    places = {"RUN": tmp_path / "run", "FILE": tmp_path / "file"}
    try:
        code = train(*re.sub("RUN|FILE", lambda m: str(places[m[0]]), words).split())
    except SystemExit as exit_:
        code = int(exit_.code or 0)
    assert code == 2
    assert message in capsys.readouterr().err
