"""Learning from labels: the vectorised form against the plain one, and what is learned."""

from __future__ import annotations

import numpy as np
import pytest

from paceline.plan.evidence import MEMORIES, Evidence, Labels

DRAFTERS, CLASSES = 3, 12


def step(rng: np.random.Generator, count: int, requests: int) -> Labels:
    drafter = rng.integers(0, DRAFTERS, count)
    return Labels(
        drafter=drafter,
        place=drafter * 4 + rng.integers(0, 4, count),
        request=rng.integers(0, requests, count),
        predicted=rng.uniform(0.05, 0.95, count),
        accepted=rng.random(count) < 0.6,
    )


@pytest.mark.parametrize("seed", range(5))
def test_both_forms_learn_the_same(seed: int) -> None:
    rng = np.random.default_rng(seed)
    few, many = (Evidence(np.full(CLASSES, 0.5), DRAFTERS) for _ in range(2))
    first = rng.normal(size=(8, MEMORIES * DRAFTERS))
    records = [first.copy(), first.copy()]
    for _ in range(30):
        rows = rng.permutation(8)[: int(rng.integers(1, 8))]
        labels = step(rng, int(rng.integers(1, 40)), len(rows))
        few.learn_few(labels, records[0], rows)
        many.learn_many(labels, records[1], rows)
        np.testing.assert_allclose(records[0], records[1], rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(few.counts, many.counts, rtol=1e-9)
        probe = first[None, :1].reshape(1, MEMORIES, DRAFTERS)
        np.testing.assert_allclose(few.offsets(probe), many.offsets(probe), rtol=1e-9)


def sticky(evidence: Evidence, records: np.ndarray, steps: int, *, stay: float) -> np.ndarray:
    """One request whose drafter is right or wrong for whole stretches; the offset before each step."""
    rng = np.random.default_rng(0)
    good, offsets = True, []
    for _ in range(steps):
        good = good if rng.random() < stay else not good
        offset = float(evidence.offsets(records.reshape(1, MEMORIES, 1))[0, 0])
        offsets.append(offset if good else -offset)
        odds = float(evidence.odds()[0]) * np.exp(offset)
        chance = np.array([odds / (1 + odds)])
        zero = np.zeros(1, dtype=np.int64)
        evidence.learn(
            Labels(zero, zero, zero, chance, np.array([rng.random() < (0.95 if good else 0.05)])), records, zero
        )
    return np.array(offsets)


def test_a_record_counts_as_much_as_it_has_proved_to_be_worth() -> None:
    """In long stretches the last outcomes say much; where every outcome is independent they say nothing."""
    telling = sticky(Evidence(np.array([0.5]), 1), np.zeros((1, MEMORIES)), 600, stay=0.97)
    useless = sticky(Evidence(np.array([0.5]), 1), np.zeros((1, MEMORIES)), 600, stay=0.5)
    assert telling[300:].mean() > 1.0, "log-odds in the right direction"
    assert abs(useless[300:].mean()) < 0.3
    assert np.abs(useless[300:]).mean() < 0.5 * np.abs(telling[300:]).mean()
