"""Training of acceptance heads: labels, loss, AUC, going on, and what the files are."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from fakes import make_loaded

from paceline.errors import ConfigError, CorruptFileError
from paceline.model.draft_weights import fingerprint
from paceline.plan.heads import load_head
from paceline.train.acceptance_head import (
    HeadSettings,
    HeadTrainer,
    auc,
    head_loss,
    train_acceptance_head,
)
from paceline.train.documents import Documents, save_shard, shard_path
from paceline.train.judgements import Judge, Judgements

CPU = torch.device("cpu")


def documents(count: int = 40, length: int = 24) -> Documents:
    rng = np.random.default_rng(0)
    own = np.tile(np.arange(length) >= 6, count)
    tokens = rng.integers(3, 90, count * length).astype(np.int32)
    return Documents(tokens, own, np.full(count, length, dtype=np.int64))


def test_auc_against_all_pairs() -> None:
    rng = np.random.default_rng(1)
    judged, accepted = rng.integers(0, 6, 60) / 5.0, rng.random(60)
    above = np.sign(judged[:, None] - judged[None]) * 0.5 + 0.5
    pairs = accepted[:, None] * (1.0 - accepted)[None]
    assert auc(judged, accepted) == pytest.approx((above * pairs).sum() / pairs.sum())
    assert auc(accepted, (accepted > 0.5).astype(float)) == 1.0


def test_the_loss_is_the_published_one() -> None:
    accepted = torch.tensor([1.0, 0.25, 0.0])
    judged = torch.tensor([0.9, 0.5, 0.2])
    log_judged = torch.stack([torch.log(1 - judged), torch.log(judged)], dim=1)
    weights = accepted + 6.0 * (1.0 - accepted)
    wanted = -(accepted * judged.log() + 6.0 * (1.0 - accepted) * (1.0 - judged).log()).sum() / weights.sum()
    torch.testing.assert_close(head_loss(log_judged, accepted, 6.0), wanted)


def test_labels_of_a_draft_that_is_the_target() -> None:
    """Everything is accepted; the prompt is never judged; mixing leaves its share of the places out."""
    texts = documents()
    places = int(texts.own.sum())
    for mixing in (0.0, 0.15, 1.0):
        judge = Judge(make_loaded(), make_loaded(), kind="acceptance", mixing=mixing, seed=0)
        made = judge.part(texts, np.arange(40), 0)
        torch.testing.assert_close(made.accepted, torch.ones(len(made.accepted)), atol=1e-4, rtol=0.0)
        assert len(made.accepted) / places == pytest.approx(1.0 - mixing, abs=0.05)


def test_labels_of_another_draft_are_likelihood_ratios() -> None:
    """Their mean is the acceptance rate sum min(p, q), which is computed here from the logits."""
    target, draft = make_loaded(seed=0, initializer_range=0.3), make_loaded(seed=5, initializer_range=0.3)
    texts = documents(count=60)
    judge = Judge(target, draft, kind="decision", mixing=0.15, seed=0)
    made = judge.part(texts, np.arange(60), 0)
    tokens = torch.from_numpy(texts.tokens.astype(np.int64)).view(60, 24)
    with torch.no_grad():
        p, q = (m.model(input_ids=tokens, use_cache=False).logits.softmax(-1)[:, 5:-1] for m in (target, draft))
    assert float(made.accepted.mean()) == pytest.approx(float(torch.minimum(p, q).sum(-1).mean()), abs=0.03)
    assert made.inputs.shape == (60 * 18, 11)
    torch.testing.assert_close(made.inputs[:18, 1].float(), q[0].max(-1).values, atol=2e-3, rtol=0.0)


def easy(count: int = 1200, shuffled: bool = False) -> Judgements:
    """States whose first number says how likely the token is accepted."""
    rng = torch.Generator().manual_seed(0)
    states = torch.randn(count, 8, generator=rng)
    accepted = torch.sigmoid(3.0 * states[:, 0])
    if shuffled:
        accepted = accepted[torch.randperm(count, generator=rng)]
    return Judgements(states.half(), accepted, torch.arange(count) // 30)


def test_a_head_learns_what_there_is_to_learn() -> None:
    """And nothing from shuffled labels."""
    found = []
    for shuffled in (False, True):
        trainer = HeadTrainer(easy(shuffled=shuffled), HeadSettings(batch=64, learning_rate=1e-2), CPU)
        while trainer.progress < 1.0:
            trainer.train_step()
        found.append(trainer.measure().auc)
    assert found[0] > 0.8
    assert 0.3 < found[1] < 0.7


def test_training_goes_on_to_the_last_bit() -> None:
    settings = HeadSettings(batch=128)
    whole, half = (HeadTrainer(easy(), settings, CPU) for _ in range(2))
    for _ in range(12):
        whole.train_step()
    for _ in range(7):
        half.train_step()
    again = HeadTrainer(easy(), settings, CPU)
    again.restore(*half.state())
    for _ in range(5):
        again.train_step()
    for a, b in zip(whole.head.parameters(), again.head.parameters(), strict=True):
        assert torch.equal(a, b)


def write(folder: Path) -> None:
    """What an earlier run left."""
    folder.mkdir()
    save_shard(shard_path(folder, 0), documents())
    about = {"target": {"name": "x", **fingerprint(make_loaded())}, "settings": None}
    (folder / "text.json").write_text(json.dumps(about))


@pytest.mark.parametrize("kind", ["acceptance", "decision"])
def test_the_whole_run(kind: str, tmp_path: Path) -> None:
    """A run twice (the second goes on from the end), one with other options, one with a damaged part."""
    write(tmp_path / "text")
    run, settings = tmp_path / "run", HeadSettings(kind=kind, epochs=2)

    def train(settings: HeadSettings = settings) -> Path:
        return train_acceptance_head(make_loaded(), make_loaded(seed=5), run, settings, text=tmp_path / "text")

    folder = train()
    first = (folder / "head.safetensors").read_bytes()
    assert load_head(str(folder), kind).kind == kind
    assert "AUC" in (folder / "README.md").read_text()
    assert train() == folder
    assert (folder / "head.safetensors").read_bytes() == first
    with pytest.raises(ConfigError, match="epochs 2, now 3"):
        train(HeadSettings(kind=kind, epochs=3))
    part = run / "labels" / "part-00000.safetensors"
    part.write_bytes(part.read_bytes()[:-5])
    with pytest.raises(CorruptFileError, match="part-00000"):
        train()
