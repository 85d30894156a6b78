"""Draft training end to end on a tiny target: it learns, resumes to the last bit, exports what was trained."""

from __future__ import annotations

import json
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fakes import make_llm, make_loaded

from paceline.errors import ConfigError, CorruptFileError, ModelNotFoundError, UnsupportedModelError
from paceline.model import draft_weights
from paceline.model.draft_weights import build_on_target, load_draft, own_parameters
from paceline.model.loader import LoadedModel
from paceline.model.packed_linear import PackedLinear, pack_linears
from paceline.train.checkpoint import load_checkpoint, save_checkpoint
from paceline.train.distil import Distiller, DistilSettings, learning_rate
from paceline.train.draft import DraftSettings, Events, train_draft
from paceline.train.laws import body, divergence, head
from paceline.train.student import choose_layers, make_student
from paceline.train.write import WriteSettings

WRITE = WriteSettings(length=40, batch=16)
DISTIL = DistilSettings(steps=12, batch_tokens=256, learning_rate=3e-3, heldout=0.1, chunk_rows=100)
SETTINGS = DraftSettings(DISTIL, WRITE, tokens=1200, layers="2", eval_every=4, save_every=5)


@pytest.fixture(scope="module")
def target() -> LoadedModel:
    return make_loaded()


@pytest.fixture(scope="module")
def finished(target: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that went through without interruption."""
    run = tmp_path_factory.mktemp("run")
    train_draft(target, run, SETTINGS, command="paceline train draft tiny", hardware="test")
    return run


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished draft, to be damaged."""
    return Path(shutil.copytree(finished / "draft", tmp_path / "draft"))


def weights(run: Path) -> dict[str, torch.Tensor]:
    found = load_checkpoint(run / "checkpoints")
    assert found is not None
    return found[0]


def logits(model: Any, tokens: list[int]) -> torch.Tensor:
    with torch.no_grad():
        out: torch.Tensor = model(input_ids=torch.tensor([tokens]), use_cache=False).logits
    return out


def test_it_learns(finished: Path) -> None:
    history = json.loads((finished / "draft" / "draft.json").read_text())["history"]
    assert [m["step"] for m in history] == [0, 4, 8, 12]
    losses = [m["loss"] for m in history]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.8 * losses[0]
    assert history[-1]["acceptance"] > history[0]["acceptance"] + 0.05


class Stop(Exception):
    """Stands for a kill."""


@pytest.mark.parametrize("stops", [(3,), (5, 11), (7,)])
def test_a_killed_run_goes_on_to_the_same_bits(
    stops: tuple[int, ...], target: LoadedModel, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Distiller.train_step
    left = list(stops)

    def step(self: Distiller) -> torch.Tensor:
        if left and self.step == left[0]:
            left.pop(0)
            raise Stop
        return original(self)

    monkeypatch.setattr(Distiller, "train_step", step)
    said: list[str] = []
    for _ in stops:
        with pytest.raises(Stop):
            train_draft(target, tmp_path, SETTINGS)
    folder = train_draft(target, tmp_path, SETTINGS, events=Events(say=said.append))
    assert said == ([] if stops[-1] < 5 else [f"going on from step {stops[-1] // 5 * 5}"])
    expected, found = weights(finished), weights(tmp_path)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    for file in (finished / "draft").glob("*.safetensors"):
        assert file.read_bytes() == (folder / file.name).read_bytes()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_saves_the_step_it_came_in(
    number: signal.Signals, target: LoadedModel, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Distiller.train_step

    def step(self: Distiller) -> torch.Tensor:
        if self.step == 6:
            os.kill(os.getpid(), number)
        return original(self)

    with monkeypatch.context() as patch:
        patch.setattr(Distiller, "train_step", step)
        with pytest.raises(KeyboardInterrupt):
            train_draft(target, tmp_path, SETTINGS)
    found = load_checkpoint(tmp_path / "checkpoints")
    assert found is not None
    assert found[1]["step"] == 7
    train_draft(target, tmp_path, SETTINGS)
    expected, found_weights = weights(finished), weights(tmp_path)
    assert all(torch.equal(expected[name], found_weights[name]) for name in expected)


def test_a_finished_run_does_nothing_more(target: LoadedModel, finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = (finished / "draft" / "draft.json").read_text()
    monkeypatch.setattr(Distiller, "train_step", lambda _: pytest.fail("it trained"))
    train_draft(target, finished, SETTINGS, command="paceline train draft tiny", hardware="test")
    assert (finished / "draft" / "draft.json").read_text() == before


@pytest.mark.parametrize("damage", ["truncated", "changed", "facts", "missing"])
def test_a_damaged_checkpoint_is_named(damage: str, target: LoadedModel, finished: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    path = run / "checkpoints" / "step-000012.safetensors"
    content = bytearray(path.read_bytes())
    if damage == "truncated":
        path.write_bytes(content[:-7])
    elif damage == "changed":
        content[-9] ^= 1
        path.write_bytes(content)
    elif damage == "missing":
        path.unlink()
    else:
        path = path.with_suffix(".json")
        path.write_text("{")
    with pytest.raises(CorruptFileError, match=r"Delete .* go on from step 10; --restart") as caught:
        train_draft(target, run, SETTINGS)
    assert caught.value.field == str(path)
    # Doing what it says works, and leads to the same weights.
    for file in (run / "checkpoints").glob("step-000012.*"):
        file.unlink()
    train_draft(target, run, SETTINGS)
    assert all(torch.equal(a, b) for a, b in zip(weights(finished).values(), weights(run).values(), strict=True))


def test_two_checkpoints_are_kept(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save_checkpoint(tmp_path, step, {"x": torch.full((2,), float(step))}, {"step": step})
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        f"step-00000{i}.{kind}" for i in (2, 3) for kind in ("json", "safetensors")
    ]
    (tmp_path / "step-000004.safetensors").write_bytes(b"cut off before its facts were written")
    found = load_checkpoint(tmp_path)
    assert found is not None
    assert found[1]["step"] == 3


def test_other_options_are_refused(target: LoadedModel, finished: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    other = replace(SETTINGS, distil=replace(DISTIL, learning_rate=1.0))
    with pytest.raises(ConfigError, match=r"learning_rate 0.003, now 1.0.*--restart"):
        train_draft(target, run, other)
    with pytest.raises(ConfigError, match="another target"):
        train_draft(make_loaded(vocab_size=90), run, SETTINGS)
    with pytest.raises(ConfigError, match="tokens in"):
        train_draft(target, run, replace(SETTINGS, tokens=4000))
    assert train_draft(target, run, other, restart=True).is_dir()
    (run / "run.json").write_text("{")
    with pytest.raises(CorruptFileError, match=r"run\.json.*--restart"):
        train_draft(target, run, other)
    shutil.rmtree(run / "checkpoints")
    assert train_draft(target, run, SETTINGS).is_dir(), "without a checkpoint there is nothing to protect"


def test_text_is_shared_by_several_drafts(target: LoadedModel, finished: Path, tmp_path: Path) -> None:
    wide = replace(SETTINGS, tokens=None, layers="0,2", intermediate=64)
    folder = train_draft(target, tmp_path, wide, text=finished / "text")
    assert not (tmp_path / "text").exists()
    draft = load_draft(str(folder), target)
    assert draft.config.intermediate_size == 64
    assert draft.config.num_hidden_layers == 2


def test_the_export_is_what_was_trained(target: LoadedModel, finished: Path) -> None:
    draft = load_draft(str(finished / "draft"), target)
    draft.model.set_attn_implementation("sdpa")
    student = make_student(target, (0, 2))
    for name, parameter in own_parameters(student).items():
        parameter.data = weights(finished)[f"weight/{name}"].bfloat16().float()
    tokens = [5, 9, 40, 2, 7, 7]
    assert torch.equal(logits(draft.model, tokens), logits(student, tokens))
    # Embedding and head are the target's own tensors, and the folder holds nothing of them.
    assert draft.model.get_input_embeddings() is target.model.get_input_embeddings()
    assert draft.model.get_output_embeddings() is target.model.get_output_embeddings()
    manifest = json.loads((finished / "draft" / "draft.json").read_text())
    assert {*manifest["files"]} == {p.name for p in (finished / "draft").iterdir()} - {"draft.json", "README.md"}
    size = sum(p.stat().st_size for p in (finished / "draft").glob("*.safetensors"))
    assert manifest["parameters"] == sum(p.numel() for p in own_parameters(student).values())
    assert size < 2 * manifest["parameters"] + 4096


def test_weights_may_lie_in_several_files(
    target: LoadedModel, finished: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("paceline.train.export._FILE_BYTES", 8000)
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    folder = train_draft(target, run, SETTINGS)
    assert len(list(folder.glob("*.safetensors"))) > 2
    one, many = load_draft(str(finished / "draft"), target), load_draft(str(folder), target)
    pairs = zip(own_parameters(one.model).values(), own_parameters(many.model).values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("changes", [{"vocab_size": 90}, {"hidden_size": 64}, {"architecture": "qwen2"}])
def test_another_target_is_refused(changes: dict[str, Any], finished: Path) -> None:
    with pytest.raises(UnsupportedModelError, match=r"made for tiny-llama.*paceline train draft"):
        load_draft(str(finished / "draft"), make_loaded(**changes))


def test_another_tokenizer_is_refused(finished: Path) -> None:
    other = make_loaded()
    other.tokenizer.add_tokens(["new"])
    with pytest.raises(UnsupportedModelError, match="another tokenizer"):
        load_draft(str(finished / "draft"), other)


@pytest.mark.parametrize("damage", ["draft.json", "config.json", "weights", "missing"])
def test_a_damaged_draft_is_named(damage: str, target: LoadedModel, copied: Path) -> None:
    path = copied / damage
    if damage in ("weights", "missing"):
        path = next(copied.glob("*.safetensors"))
        content = bytearray(path.read_bytes())
        content[-3] ^= 4
        path.write_bytes(content)
        if damage == "missing":
            path.unlink()
    else:
        path.write_text("{")
    with pytest.raises(CorruptFileError) as caught:
        load_draft(str(copied), target)
    assert caught.value.field == str(path)


def test_a_changed_config_is_damage(target: LoadedModel, copied: Path) -> None:
    """Another rope base is a config that can be read, and a draft that guesses nonsense."""
    path = copied / "config.json"
    changed = path.read_text().replace('"rope_theta": 10000.0', '"rope_theta": 10.0')
    assert changed != path.read_text()
    path.write_text(changed)
    with pytest.raises(CorruptFileError, match="SHA-256") as caught:
        load_draft(str(copied), target)
    assert caught.value.field == str(path)


def test_every_file_of_a_shipped_draft_is_vouched_for() -> None:
    for manifest in draft_weights._SHIPPED.glob("*/draft.json"):
        folder = manifest.parent
        files = draft_weights.read_manifest(folder)["files"]
        assert {*files} == {p.name for p in folder.iterdir()} - {"draft.json", "README.md"}
        for name, facts in files.items():
            assert draft_weights.file_facts(folder / name) == facts


def test_a_folder_that_is_no_draft_and_no_model(copied: Path, tmp_path: Path) -> None:
    """What a draft without its manifest is: its config and weights look like a model's."""
    (copied / "draft.json").unlink()
    (tmp_path / "empty").mkdir()
    for folder in (copied, tmp_path / "empty"):
        with pytest.raises(
            ModelNotFoundError, match=r"neither a draft \(it has no draft\.json\) nor a model.*train draft"
        ):
            make_llm(make_loaded(), speculation=f"draft:model={folder}")
    whole = tmp_path / "whole"
    make_loaded().model.save_pretrained(whole)
    make_loaded().tokenizer.save_pretrained(whole)
    draft_weights.check_is_draft_or_model(str(whole))


def test_builtin_says_for_which_targets_one_ships(
    target: LoadedModel, copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ModelNotFoundError, match=r"no built-in draft ships for tiny-llama.*paceline train draft"):
        load_draft("builtin", target)
    monkeypatch.setattr(draft_weights, "_SHIPPED", tmp_path / "drafts")
    shutil.copytree(copied, tmp_path / "drafts" / "smollm2-135m")
    named = [replace(target, name=name) for name in ("smollm2-135m", "builtin")]
    (tmp_path / "paceline.json").write_text('{"name": "smollm2-135m", "files": {}}')
    named.append(replace(target, name=str(tmp_path), path=tmp_path))
    assert [load_draft("builtin", t).path.name for t in named] == ["smollm2-135m"] * 3
    assert draft_weights.is_draft("builtin")
    assert draft_weights.is_draft(str(copied))
    assert not draft_weights.is_draft(str(tmp_path))


def test_a_run_folder_is_not_its_draft(target: LoadedModel, finished: Path) -> None:
    with pytest.raises(ModelNotFoundError, match=f"Give {finished / 'draft'}"):
        load_draft(str(finished), target)


def test_a_packed_head_is_shared(finished: Path) -> None:
    """The engine packs the target before it loads the draft; the draft then uses the same packed head."""
    own = make_loaded()
    tokens = [5, 9, 40]
    before = load_draft(str(finished / "draft"), own)
    before.model.set_attn_implementation("sdpa")
    expected = logits(before.model, tokens)
    if not pack_linears(own.model):
        pytest.skip("torch without oneDNN")
    draft = load_draft(str(finished / "draft"), own)
    pack_linears(draft.model)
    packed = draft.model.get_output_embeddings()
    assert isinstance(packed, PackedLinear)
    assert packed is own.model.get_output_embeddings()
    draft.model.set_attn_implementation("sdpa")
    assert torch.allclose(logits(draft.model, tokens), expected, atol=1e-4)


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma2", "granite", "gpt2", "olmo2"])
def test_a_student_of_all_layers_is_the_target(architecture: str) -> None:
    target = make_loaded(architecture)
    student = make_student(target, (0, 1, 2))  # and lets the target attend by the library's functions
    tokens = [5, 9, 40, 2, 7, 7]
    expected = logits(target.model, tokens)
    assert torch.allclose(logits(student, tokens), expected, atol=1e-5)
    with torch.no_grad():
        assert torch.allclose(head(student, body(student, torch.tensor([tokens]))), expected, atol=1e-5)
    trainable = {id(p) for p in student.parameters() if p.requires_grad}
    assert trainable == {id(p) for p in own_parameters(student).values()}


def test_widening_alone_changes_nothing() -> None:
    target = make_loaded()
    narrow, wide = make_student(target, (0, 2)), make_student(target, (0, 2), intermediate=80)
    tokens = [5, 9, 40, 2, 7, 7]
    assert torch.allclose(logits(narrow, tokens), logits(wide, tokens), atol=1e-5)
    new = wide.model.layers[0].mlp.gate_proj.weight[48:]
    assert float(new.detach().abs().min(dim=1).values.max()) > 0, "new neurons read something, so they can learn"
    with pytest.raises(ConfigError, match="48"):
        make_student(target, (0, 2), intermediate=40)


def test_layers() -> None:
    assert choose_layers("4", 30) == (0, 10, 19, 29)
    assert choose_layers("1", 30) == (0,)
    assert choose_layers("30", 30) == tuple(range(30))
    assert choose_layers("0,9,19,29", 30) == (0, 9, 19, 29)
    for wrong in ("31", "0", "x", "3,1", "1,1", "0,30", "-1,3"):
        with pytest.raises(ConfigError):
            choose_layers(wrong, 30)


def test_divergence_is_kl_and_overlap() -> None:
    torch.manual_seed(0)
    a, b = torch.randn(5, 7), torch.randn(5, 7, requires_grad=True)
    p, q = a.softmax(-1).numpy(), b.detach().softmax(-1).numpy()
    kl, overlap = (p * np.log(p / q)).sum(-1), np.minimum(p, q).sum(-1)
    for weight in (0.0, 0.3, 1.0):
        loss, found, same = divergence(a, b, weight)
        assert np.allclose(loss.detach().numpy(), (1 - weight) * kl + weight * (1 - overlap), atol=1e-6)
        assert np.allclose(found.numpy(), overlap, atol=1e-6)
        assert same.tolist() == (p.argmax(-1) == q.argmax(-1)).tolist()
    # The gradient of KL with respect to the student's logits is q - p.
    divergence(a, b, 0.0)[0].sum().backward()
    assert np.allclose(b.grad.numpy(), q - p, atol=1e-6)  # type: ignore[union-attr]


def test_the_rate_rises_and_falls() -> None:
    settings = DistilSettings(steps=10, warmup=0.1, final=0.1, learning_rate=1.0)
    rates = [learning_rate(settings, x) for x in (0.0, 0.05, 0.1, 0.55, 1.0)]
    assert rates == pytest.approx([0.01, 0.5, 1.0, 0.55, 0.1])


def test_a_budget_in_seconds_ends(target: LoadedModel, finished: Path, tmp_path: Path) -> None:
    timed = replace(SETTINGS, tokens=None, distil=replace(DISTIL, steps=None, seconds=0.3))
    manifest = json.loads((train_draft(target, tmp_path, timed, text=finished / "text") / "draft.json").read_text())
    assert 0.3 <= manifest["heldout"]["seconds"] < 5


def test_embeddings_of_a_padded_vocabulary(target: LoadedModel) -> None:
    """The model that is built for borrowed embeddings reports the target's vocabulary, not the placeholder's."""
    model = build_on_target(
        target.config, target.model, dtype=torch.float32, device=torch.device("cpu"), attention="sdpa"
    )
    assert model.config.vocab_size == model.vocab_size == 96
    assert model.config.pad_token_id == target.config.pad_token_id
