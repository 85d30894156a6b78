"""Policies that are asked after every draft forward: what they answer, the heads they need, and what `auto` gains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engine_tools import decoding
from fakes import make_head, make_llm, make_loaded, save_heads
from plan_tools import SimDrafter, World, cheap, cost_of

from paceline.draft.registry import DRAFTERS
from paceline.engine.draft_progress import DraftProgress
from paceline.errors import CorruptFileError, ModelNotFoundError, SpeculationSpecError, UnsupportedModelError
from paceline.plan.base import DrafterLimits
from paceline.plan.cost_model import DraftCost
from paceline.plan.draft_levels import DraftLevels, PricedStop
from paceline.plan.heads import FILE, AcceptanceHead, load_head, save_head
from paceline.plan.registry import check_policy, create_policy
from paceline.plan.spec import parse_speculation
from paceline.plan.specdec import AcceptanceStop
from paceline.plan.survival import AcceptanceEstimates
from paceline.plan.svip import EntropyStop


def progress(depth: int = 1, **changes: Any) -> DraftProgress:
    """Of two requests."""
    plain: dict[str, Any] = {
        "rows": np.array([0, 1]),
        "nodes": np.array([depth, depth]),
        "survival": np.array([0.9, 0.2]),
        "chain_survival": np.array([0.9, 0.2]),
        "entropy": np.array([0.1, 2.0]),
        "confidence": np.array([0.9, 0.2]),
    }
    return DraftProgress(depth, **{**plain, **changes})


# SVIP


def test_svip_stops_above_the_papers_entropy() -> None:
    """h = 0.3 and c = 0.15: more than 0.6 nats stop."""
    entropies = np.array([0.0, 0.599, 0.601, 3.0])
    answers = EntropyStop(0.3, 0.15).keep(progress(rows=np.arange(4), entropy=entropies))
    assert answers.tolist() == [True, True, False, False]


def test_svip_drafts_longer_where_the_draft_is_sure() -> None:
    """Sure classes have an entropy of 0.04, unsure ones of 4.6; no node follows an unsure one."""
    drafter = SimDrafter(
        "draft",
        cost_per_token=True,
        most=8,
        key=lambda rng, *_: int(rng.integers(2)),
        odds=lambda _s, key, _r: (0.1, 0.98)[key],
        prior=np.array([0.5, 0.5]),
    )
    steps = World([drafter], policy="svip", requests=3).run(60)
    keys = [tree.key.tolist() for step in steps for tree in step.kept.trees]
    assert all(key == 1 for chain in keys for key in chain[:-1])
    assert all(chain[-1] == 0 for chain in keys if len(chain) < 8)
    assert 1.6 < np.mean([len(chain) for chain in keys]) < 2.4, "2 on average"


# SpecDec++


def sure_head(certain: float) -> AcceptanceHead:
    """Judges every token alike."""
    head = AcceptanceHead(4, blocks=1)
    with torch.no_grad():
        head.classes.weight.zero_()
        head.classes.bias.copy_(torch.tensor([0.0, float(np.log(certain / (1 - certain)))]))
    return head


def test_specdec_multiplies_judgements_and_lags_by_a_forward() -> None:
    """At 0.8 each and h = 0.5: 1 - 0.8^3 stays below, 1 - 0.8^4 does not. The first forward judges nothing."""
    stop = AcceptanceStop(sure_head(0.8), 0.5, 2)
    hidden = torch.zeros(2, 4)
    answers = [stop.keep(progress(depth, hidden=hidden)).tolist() for depth in range(1, 6)]
    assert answers == [[True] * 2] * 4 + [[False] * 2]
    hopeless = AcceptanceStop(sure_head(0.01), 0.5, 2)
    assert hopeless.keep(progress(1, hidden=hidden)).all(), "two tokens at least"
    assert not hopeless.keep(progress(2, hidden=hidden)).any()


def test_specdec_keeps_requests_apart() -> None:
    stop = AcceptanceStop(sure_head(0.6), 0.5, 2)
    one = progress(2, rows=np.array([1]), nodes=np.array([2]), hidden=torch.zeros(1, 4))
    assert stop.keep(one).tolist() == [True]
    assert stop.keep(progress(3, hidden=torch.zeros(2, 4))).tolist() == [True, False]


def test_specdec_drafts_twenty_at_most() -> None:
    limits = [DrafterLimits("draft", 64, True, hidden_size=4)]
    estimates = AcceptanceEstimates({"draft": np.array([0.5])}, by_depth=["draft"])
    policy = create_policy("specdec++", {"head": sure_head(0.9)}, limits, estimates, lambda: cost_of(cheap))
    assert policy.plan(decoding(1), 1000).limits["draft"].tolist() == [20]  # type: ignore[union-attr]


def test_blocks_of_a_head_are_their_own_and_begin_as_the_identity() -> None:
    """The published code repeats one block; the paper has D of them."""
    head = AcceptanceHead(6, blocks=3)
    assert len({p.data_ptr() for p in head.parameters()}) == 8
    hidden = torch.randn(5, 6)
    torch.testing.assert_close(head(hidden), torch.log_softmax(head.classes(hidden), dim=-1))


# Heads and their files


def test_a_head_comes_back_as_it_was(tmp_path: Path) -> None:
    for policy, kind in (("specdec++", "acceptance"), ("decision", "decision")):
        head = make_head(policy, 6)
        path = save_head(tmp_path, head, {"draft": "x"})
        inputs = torch.randn(4, head.inputs)
        for name in (tmp_path, path):
            torch.testing.assert_close(load_head(str(name), kind)(inputs), head(inputs))


def test_a_head_of_another_kind_is_refused(tmp_path: Path) -> None:
    save_head(tmp_path, make_head("decision"), {})
    with pytest.raises(UnsupportedModelError, match="kind decision, and acceptance is needed"):
        load_head(str(tmp_path), "acceptance")


def test_damaged_and_missing_heads_are_named(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match="no head"):
        load_head(str(tmp_path), "acceptance")
    path = save_head(tmp_path, make_head("specdec++", 6), {})
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[-3] ^= 1
    for damaged in (b"", b"{}", whole[:-9], bytes(flipped)):
        path.write_bytes(damaged)
        with pytest.raises(CorruptFileError, match=FILE):
            load_head(str(tmp_path), "acceptance")


@pytest.mark.parametrize("drafter", [name for name, entry in DRAFTERS.items() if entry.has_model])
def test_a_head_for_another_hidden_size_is_refused(drafter: str, tmp_path: Path) -> None:
    loaded = make_loaded()
    folder = tmp_path / "draft"
    loaded.model.save_pretrained(folder)
    loaded.tokenizer.save_pretrained(folder)
    size = int(loaded.config.hidden_size)
    for fits in (True, False):
        heads = save_heads(tmp_path / str(fits), size if fits else size + 8)
        spec = f'{drafter}:model="{folder}"@specdec++:head="{heads / "specdec++"}",h=0.9'
        if fits:
            make_llm(make_loaded(), speculation=spec).close()
        else:
            words = f"size {size + 8}, and those of drafter {drafter} have {size}"
            with pytest.raises(UnsupportedModelError, match=words):
                make_llm(make_loaded(), speculation=spec)


def test_a_policy_says_that_it_needs_a_head() -> None:
    spec = parse_speculation("draft:model=x@specdec++:h=0.5")
    assert (spec.policy, spec.policy_options) == ("specdec++", {"h": "0.5"})
    with pytest.raises(SpeculationSpecError, match=r"needs head=FOLDER.*train acceptance-head"):
        check_policy(spec.policy, spec.policy_options)


# auto


def test_auto_drops_who_does_not_pay_for_a_slot() -> None:
    """Chance 0.5: gains of 0.45 and 0.1 against a slot of 0.2; then the forward costs more than both bring."""
    times = np.linspace(1.0, 3.0, 11)
    chances = np.full((2, 4), 0.5)
    common = {"chances": chances, "per_node": 0.0, "width": 1.0, "least": 1}
    stop = PricedStop(times=times, goodput=1.0, per_forward=0.1, **common)  # type: ignore[arg-type]
    assert stop.keep(progress(1)).tolist() == [True, False]
    stop = PricedStop(times=times, goodput=1.0, per_forward=0.3, **common)  # type: ignore[arg-type]
    assert stop.keep(progress(1)).tolist() == [False, False]
    stop = PricedStop(times=times, goodput=1.0, per_forward=0.3, **{**common, "least": 3})  # type: ignore[arg-type]
    assert stop.keep(progress(2)).tolist() == [True, True], "a look further than it pays"


@pytest.mark.parametrize("requests", [1, 4])
def test_auto_gains_where_the_draft_tells_good_tokens_from_bad(requests: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Goodput by the true odds of what was verified, with the stop over without it (a planned depth alone)."""
    odds = np.array([0.1, 0.3, 0.5, 0.7, 0.97])

    def run() -> float:
        drafter = SimDrafter(
            "draft",
            cost_per_token=True,
            most=8,
            seconds=0.001,
            key=lambda rng, *_: int(rng.choice(5, p=[0.1, 0.1, 0.1, 0.2, 0.5])),
            odds=lambda _s, key, _r: float(odds[key]),
            prior=np.full(5, 0.5),
        )
        world = World([drafter], requests=requests, seconds=lambda n: 0.010 + 0.0003 * n)
        world.run(200)
        steps = world.run(250)
        gained = [np.cumprod(odds[tree.key]).sum() for step in steps for tree in step.kept.trees if len(tree)]
        return float((sum(gained) + 250 * requests) / sum(step.stats.step_seconds for step in steps))

    dynamic = run()
    plan = DraftLevels.plan

    def planned_only(self: DraftLevels, *arguments: Any) -> tuple[int, None]:
        self._dynamic = False
        return plan(self, *arguments)[0], None

    monkeypatch.setattr(DraftLevels, "plan", planned_only)
    assert dynamic > 1.02 * run()


def test_auto_asks_again_what_deeper_levels_are_worth() -> None:
    """A draft that becomes good at depth: the looks of `Usage.probe` find it."""
    drafter = SimDrafter(
        "draft",
        cost_per_token=True,
        most=6,
        seconds=0.0005,
        key=lambda _rng, _step, depth: min(depth, 2),
        odds=lambda step, key, _r: 0.95 if key < 2 or step > 300 else 0.02,
        prior=np.full(3, 0.5),
    )
    world = World([drafter], seconds=cheap, cost=cost_of(cheap, {"draft": DraftCost(per_depth=0.0005)}))
    before = np.mean([len(s.kept.trees[0]) for s in world.run(300)[200:]])
    after = np.mean([len(s.kept.trees[0]) for s in world.run(700)[500:]])
    assert before < 3.5
    assert after > 4.5
