"""The native forward against the same weights run by `transformers`, and against itself in other company."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from fakes import make_loaded

from paceline.cache.paged_kv import PagedKV
from paceline.model.head_subset import cut_head
from paceline.model.loader import LoadedModel
from paceline.model.native.decoder import runs_natively
from paceline.model.path import ForwardPath
from paceline.model.runner import ForwardBatch, ModelRunner, SequenceInput, kv_shape
from paceline.model.tiled_linear import tile_linears

SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
BLOCK = 4
ARCHITECTURES = ("llama", "qwen2", "qwen3")


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def runner(architecture: str, native: bool, **changes: Any) -> ModelRunner:
    """A runner over a random model; the same weights natively or not."""
    loaded = make_loaded(architecture, **SIZES, **changes)
    if native:
        tile_linears(loaded.model)
        assert runs_natively(loaded.model)
    return over(loaded)


def over(loaded: LoadedModel) -> ModelRunner:
    """A runner with a cache of its own."""
    kv = PagedKV(kv_shape(loaded.config, torch.float32), 128, BLOCK, loaded.device)
    made = ModelRunner(loaded.model, kv, loaded.device)
    assert (made._native is not None) == runs_natively(loaded.model)
    return made


def chunk(tokens: list[int], start: int, blocks: list[int]) -> SequenceInput:
    """The next tokens of a sequence."""
    return SequenceInput(tokens, np.arange(start, start + len(tokens)), start, blocks)


def tree(parents: list[int], tokens: list[int], context: int, blocks: list[int]) -> SequenceInput:
    """A draft tree behind a context."""
    visible = np.zeros((len(parents),) * 2, dtype=np.bool_)
    for node, parent in enumerate(parents):
        visible[node] = visible[parent] if parent >= 0 else False
        visible[node, node] = True
    return SequenceInput(tokens, context + visible.sum(axis=1) - 1, context, blocks, visible)


def everything(run: ModelRunner) -> list[torch.Tensor]:
    """Logits and hidden states of a prompt, then of a decode batch with a tree."""
    rng = np.random.default_rng(3)
    long, short = rng.integers(3, 90, 41).tolist(), rng.integers(3, 90, 6).tolist()
    blocks = [list(range(1, 20)), [30, 22, 27, 21]]
    found = list(
        run.forward_with_hidden(ForwardBatch((chunk(long, 0, blocks[0]), chunk(short, 0, blocks[1])), [40, 3, 46]))
    )
    shape = tree([-1, 0, 0, 1, 2, 2], rng.integers(3, 90, 6).tolist(), 41, blocks[0])
    batch = ForwardBatch((shape, chunk([7, 8], 6, blocks[1])), list(range(8)))
    return found + list(run.forward_with_hidden(batch))


def near(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    """Equal to fp32 rounding, which random weights of this size magnify."""
    return ours.shape == theirs.shape and bool((ours - theirs).norm() < 1e-4 * theirs.norm())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_it_computes_what_transformers_does(architecture: str) -> None:
    for ours, theirs in zip(
        everything(runner(architecture, True)), everything(runner(architecture, False)), strict=True
    ):
        assert near(ours, theirs)


@pytest.mark.parametrize("path", [ForwardPath.without(3, [1]), ForwardPath(((0,), (1, 2))), ForwardPath(((2,),))])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_parts_of_the_model(architecture: str, path: ForwardPath) -> None:
    """Layers skipped, layers side by side; and the whole model keeps its bits."""
    native, modules = runner(architecture, True), runner(architecture, False)
    prompt, one = chunk([5, 9, 11, 40, 7], 0, [3, 8]), chunk([6], 5, [3, 8])
    found = []
    for run in (native, modules):
        run.forward(ForwardBatch((prompt,), [4]))
        found.append(run.forward(ForwardBatch((one,), [0], path)).clone())
    assert near(*found)
    before = everything(runner(architecture, True))
    native.forward(ForwardBatch((one,), [0], path))
    assert all(torch.equal(a, b) for a, b in zip(everything(native), before, strict=True))


@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": "linear", "factor": 2.0},
        {
            "rope_type": "llama3",
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    ],
)
def test_scaled_rotary_embeddings(scaling: dict[str, Any]) -> None:
    changes = {"rope_parameters": {"rope_theta": 10000.0, **scaling}}
    for ours, theirs in zip(
        everything(runner("llama", True, **changes)), everything(runner("llama", False, **changes)), strict=True
    ):
        assert near(ours, theirs)


@pytest.mark.parametrize("threads", [2, 3])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_threads_change_no_bit(architecture: str, threads: int) -> None:
    torch.set_num_threads(1)
    expected = everything(runner(architecture, True))
    torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(everything(runner(architecture, True)), expected, strict=True))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_path_of_a_tree_is_as_if_it_were_alone(architecture: str) -> None:
    run, rng = runner(architecture, True), np.random.default_rng(5)
    prompt, blocks = rng.integers(3, 90, 23).tolist(), list(range(2, 20))
    run.forward(ForwardBatch((chunk(prompt, 0, blocks),), [22]))
    parents, tokens = [-1, 0, 0, 1, 1, 2, 5], rng.integers(3, 90, 7).tolist()
    nodes = run.forward(ForwardBatch((tree(parents, tokens, 23, blocks),), list(range(7))))
    for node in range(7):
        path = [node]
        while parents[path[0]] >= 0:
            path.insert(0, parents[path[0]])
        for at, step in enumerate(path):  # token by token, as plain decoding goes
            alone = run.forward(ForwardBatch((chunk([tokens[step]], 23 + at, blocks),), [0]))
        assert torch.equal(alone[0], nodes[node])


def test_long_chunks_go_in_groups_and_change_no_bit() -> None:
    run, rng = runner("llama", True), np.random.default_rng(7)
    tokens, blocks = rng.integers(3, 90, 300).tolist(), list(range(1, 80))
    wanted = [299, 0, 255, 256, 17]  # in any order
    whole = run.forward(ForwardBatch((chunk(tokens, 0, blocks),), wanted))
    for start in range(0, 300, 60):
        part = run.forward(ForwardBatch((chunk(tokens[start : start + 60], start, blocks),), list(range(60))))
        for row, at in enumerate(wanted):
            if start <= at < start + 60:
                assert torch.equal(part[at - start], whole[row])


def test_a_cut_head() -> None:
    loaded, plain = (make_loaded("llama", **SIZES) for _ in range(2))
    for each in (loaded, plain):
        cut_head(each, [5, 9, 60])
    tile_linears(loaded.model)
    ours, theirs = everything(over(loaded))[0], everything(over(plain))[0]
    assert torch.equal(torch.isinf(ours), torch.isinf(theirs))
    assert near(ours[~torch.isinf(ours)], theirs[~torch.isinf(theirs)])


@pytest.mark.parametrize(
    ("architecture", "changes"),
    [
        ("gemma2", {}),
        ("mistral", {}),
        ("llama", {"hidden_act": "gelu"}),
        ("llama", {"mlp_bias": True}),
        ("llama", {"head_dim": 24, "hidden_size": 96}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0}),
    ],
)
def test_others_run_through_transformers(architecture: str, changes: dict[str, Any]) -> None:
    loaded = make_loaded(architecture, **{**SIZES, **changes})
    tile_linears(loaded.model)
    assert not runs_natively(loaded.model)
    plain = make_loaded(architecture, **{**SIZES, **changes})
    for ours, theirs in zip(everything(over(loaded)), everything(over(plain)), strict=True):
        assert near(ours, theirs)
