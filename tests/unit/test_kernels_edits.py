"""Logit edits and the trim on the device: the numbers of `edit_logits`, the nodes of a stable sort."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from sampling_tools import DEVICE, drawn_by_cpu, host, limits, places, temperatures

from paceline.config import SamplingParams
from paceline.engine.rng import Noise
from paceline.engine.sampling import build_law, edit_logits
from paceline.errors import RequestError
from paceline.model.kernels.draw import draw_rows
from paceline.model.kernels.edits import Masks, edit_rows, entries_of, entries_on
from paceline.model.kernels.limits import find_cut
from paceline.model.kernels.peaks import find_peaks
from paceline.model.kernels.trim import trim_best, trim_best_twin

PENALTIES = (
    SamplingParams(repetition_penalty=1.3),
    SamplingParams(presence_penalty=0.7, frequency_penalty=-0.3, temperature=0.6),
    SamplingParams(logit_bias={2: 5.0, 0: -100.0, 6: 0.1}, top_k=4),
    SamplingParams(min_tokens=99, repetition_penalty=0.7, top_p=0.8),
    SamplingParams(temperature=0.0, logit_bias={1: 3.3}, frequency_penalty=0.1),
)


def packed(allowed: np.ndarray) -> np.ndarray:
    """A grammar mask in int32 words.  # bool [vocab] -> [ceil(vocab / 32)]"""
    bits = np.zeros(-(-len(allowed) // 32) * 32, dtype=np.uint8)
    bits[: len(allowed)] = allowed
    return np.packbits(bits, bitorder="little").view(np.int32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocab", [7, 1000, 2050])
def test_edits_are_the_cpus(vocab: int, dtype: torch.dtype) -> None:
    rng = np.random.default_rng(vocab)
    slots = 10
    raw = torch.from_numpy(rng.normal(0, 2, (slots + 3, vocab)).astype(np.float32)).to(dtype)
    raw[:, 3] = float("-inf")
    row = rng.permutation(slots + 3)[:slots]
    params = [PENALTIES[i % len(PENALTIES)] for i in range(slots)]
    prompts = [rng.integers(vocab, size=20).tolist() for _ in range(slots)]
    outputs = [rng.integers(vocab, size=int(rng.integers(30))).tolist() for _ in range(slots)]
    grammar = [None if i % 3 == 0 else rng.random(vocab) < 0.5 for i in range(slots)]
    for allowed in grammar:
        if allowed is not None:
            allowed[[0, 1]] = True
    ends = [[1, 5] if len(o) < p.min_tokens else [] for p, o in zip(params, outputs, strict=True)]
    parts = [entries_of(p, a, b, vocab) for p, a, b in zip(params, prompts, outputs, strict=True)]
    edited = edit_rows(raw.to(DEVICE), on_device(row), entries_on(parts, DEVICE), masks_of(grammar, ends, vocab))
    assert edited.possible.all()
    wanted = host(raw)
    for i in range(slots):
        want = edit_logits(wanted[row[i]], params[i], prompts[i], outputs[i], [1, 5], grammar[i])
        assert np.array_equal(edited.rows.edited[i].cpu().numpy(), want), params[i]
    check_draws(raw, row, params, prompts, outputs, grammar, edited.rows)


def check_draws(raw, row, params, prompts, outputs, grammar, rows) -> None:
    """Edited and raw rows side by side give the tokens of `build_law`."""
    vocab = raw.shape[1]
    plain = SamplingParams()
    slot_of = {int(r): i for i, r in enumerate(row)}
    mine = [params[slot_of[r]] if r in slot_of else plain for r in range(len(raw))]
    heat = temperatures(mine)
    peaks = find_peaks(rows, heat)
    cut = find_cut(rows, heat, limits(mine), peaks)
    noises = [Noise(8, r) for r in range(len(raw))]
    drawn = draw_rows(rows, places(noises, [4] * len(raw)), heat, cut, peaks).token.tolist()
    for r, values in enumerate(host(raw)):
        i = slot_of.get(r)
        history = ([], [], [], None) if i is None else (prompts[i], outputs[i], [1, 5], grammar[i])
        assert drawn[r] == drawn_by_cpu(build_law(values, mine[r], *history), noises[r], 4, vocab)


def on_device(numbers) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.int32, device=DEVICE)


def masks_of(grammar: list[np.ndarray | None], ends: list[list[int]], vocab: int) -> Masks:
    bits = [packed(np.ones(vocab, dtype=np.bool_)), *(packed(allowed) for allowed in grammar if allowed is not None)]
    number, mask = 0, []
    for allowed in grammar:
        number += allowed is not None
        mask.append(-1 if allowed is None else number)
    widest = max(map(len, ends))
    return Masks(
        torch.from_numpy(np.stack(bits)).to(DEVICE),
        on_device(mask),
        on_device([[*e, *[-1] * (widest - len(e))] for e in ends]).reshape(len(ends), widest),
    )


def test_min_tokens_beside_a_grammar_that_allows_only_an_end() -> None:
    vocab = 40
    raw = torch.randn(4, vocab, generator=torch.Generator().manual_seed(1))
    raw[3, 7] = float("-inf")
    only_ends = np.zeros(vocab, dtype=np.bool_)
    only_ends[[1, 5]] = True
    with_7 = only_ends.copy()
    with_7[7] = True
    grammar = [only_ends, with_7, np.zeros(vocab, dtype=np.bool_), with_7]
    ends = [[1, 5]] * 4
    nothing = entries_on([], DEVICE)
    edited = edit_rows(raw.to(DEVICE), on_device([0, 1, 2, 3]), nothing, masks_of(grammar, ends, vocab))
    assert edited.possible.tolist() == [True, True, False, True]
    params = SamplingParams(min_tokens=5)
    for i in (0, 1, 3):
        want = edit_logits(host(raw)[i], params, [], [], [1, 5], grammar[i])
        assert np.array_equal(edited.rows.edited[i].cpu().numpy(), want)
    with pytest.raises(RequestError):
        edit_logits(host(raw)[2], params, [], [], [1, 5], grammar[2])


@pytest.mark.parametrize("count", [1, 63, 700, *([5000] if DEVICE.type == "cuda" else [])])
def test_trim_keeps_the_nodes_of_a_stable_sort(count: int) -> None:
    rng = np.random.default_rng(count)
    parents = np.array([int(rng.integers(-1, i)) for i in range(count)])
    worth = np.ones(count)
    for i in range(count):  # halves and ones: many ties, between parents and children too
        worth[i] = (1.0 if parents[i] < 0 else worth[parents[i]]) * rng.choice([1.0, 0.5])
    order = np.argsort(-worth, kind="stable")
    args = (torch.from_numpy(worth).to(DEVICE), torch.from_numpy(parents).to(DEVICE))
    for size in {0, 1, count // 3, count}:
        capacity = max(size, 1) + 2
        got = trim_best(*args, on_device([size]), capacity)
        want = np.sort(order[:size])
        assert got.node[:size].tolist() == want.tolist()
        assert (got.node[size:] == -1).all()
        assert torch.equal(got.keep.nonzero()[:, 0].cpu(), torch.from_numpy(want))
        kept = got.node[:size].cpu().numpy()
        for i, parent in enumerate(got.parent[:size].tolist()):
            assert parent < i
            assert (parent < 0 and parents[kept[i]] < 0) or kept[parent] == parents[kept[i]]
        twin = trim_best_twin(*args, on_device([size]), capacity)
        assert torch.equal(got.node, twin.node)
        assert torch.equal(got.parent, twin.parent)


def test_fixed_nodes_stay() -> None:
    worth = torch.tensor([0.9, 0.1, 0.8, 0.1, 0.7], dtype=torch.float64, device=DEVICE)
    parents = torch.tensor([-1, -1, 0, 1, 2], device=DEVICE)
    fixed = torch.tensor([False, True, False, True, False], device=DEVICE)
    for size, want in ((1, [1, 3]), (3, [0, 1, 3]), (4, [0, 1, 2, 3])):
        got = trim_best(worth, parents, on_device([size]), 5, fixed)
        assert got.node[got.node >= 0].tolist() == want
        assert torch.equal(got.node, trim_best_twin(worth, parents, on_device([size]), 5, fixed).node)
