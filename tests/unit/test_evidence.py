"""What a request's record is worth is learned from labels."""

from __future__ import annotations

import numpy as np

from paceline.plan.evidence import MEMORIES, Evidence, Labels, offsets


def sticky(evidence: Evidence, records: np.ndarray, steps: int, *, stay: float) -> np.ndarray:
    """One request whose drafter is right or wrong for whole stretches; the offset before each step."""
    rng = np.random.default_rng(0)
    good, found = True, []
    for _ in range(steps):
        good = good if rng.random() < stay else not good
        offset = float(offsets(records.reshape(1, MEMORIES, 1), evidence.weights)[0, 0])
        found.append(offset if good else -offset)
        odds = float(evidence.odds()[0]) * np.exp(offset)
        chance = np.array([odds / (1 + odds)])
        zero = np.zeros(1, dtype=np.int64)
        evidence.learn(
            Labels(zero, zero, zero, chance, np.array([rng.random() < (0.95 if good else 0.05)])), records, zero
        )
    return np.array(found)


def test_a_record_counts_as_much_as_it_has_proved_to_be_worth() -> None:
    """In long stretches the last outcomes say much; where every outcome is independent they say nothing."""
    telling = sticky(Evidence(np.array([0.5]), 1), np.zeros((1, MEMORIES)), 600, stay=0.97)
    useless = sticky(Evidence(np.array([0.5]), 1), np.zeros((1, MEMORIES)), 600, stay=0.5)
    assert telling[300:].mean() > 1.0, "log-odds in the right direction"
    assert abs(useless[300:].mean()) < 0.3
    assert np.abs(useless[300:]).mean() < 0.5 * np.abs(telling[300:]).mean()
