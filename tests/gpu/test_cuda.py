"""The engine on a CUDA device: same noise, same text with speculation on and off, in kernels and in plain PyTorch."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from conftest import REAL_MODEL
from fakes import ARCHITECTURES, make_llm, make_loaded

from paceline import LLM, SamplingParams
from paceline.cache.paged_kv import PagedKV
from paceline.engine.rng import Noise, Stream, philox_words_torch
from paceline.errors import DownloadError
from paceline.model.loader import LoadedModel, load_model
from paceline.model.runner import ForwardBatch, ModelRunner, SequenceInput, StepLimits, kv_shape

pytestmark = pytest.mark.gpu
PROMPTS = [[5, 6, 7, 8] * 6, [11, 12, 13, 11, 12, 13], [9], list(range(20, 90))]


def on_cuda(loaded: LoadedModel, device: torch.device) -> LoadedModel:
    """The same model on the device."""
    return dataclasses.replace(loaded, model=loaded.model.to(device), device=device)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_speculation_does_not_change_the_text(cuda: torch.device, architecture: str, temperature: float) -> None:
    loaded = on_cuda(make_loaded(architecture), cuda)
    params = SamplingParams(temperature=temperature, seed=3, max_tokens=48, ignore_eos=True)
    texts = [
        [g.token_ids for g in make_llm(loaded, speculation=spec, max_num_batched_tokens=32).generate(PROMPTS, params)]
        for spec in ("none", "ngram:k=5", "recycling:k=20", "ngram:k=4+recycling:k=12", "auto")
    ]
    assert all(text == texts[0] for text in texts[1:])


FUSED = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
"""Heads that tensor cores take: these models run in our own kernels."""


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "mistral"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("eager", [False, True])
def test_kernels_give_the_text_of_the_cpu(
    cuda: torch.device, architecture: str, temperature: float, eager: bool
) -> None:
    """In fp32, with and without speculation, captured and eager; the samples are drawn on the device."""
    params = SamplingParams(temperature=temperature, seed=3, max_tokens=48, ignore_eos=True)
    plain = make_llm(make_loaded(architecture, **FUSED), speculation="none", max_num_batched_tokens=32)
    expected = [g.token_ids for g in plain.generate(PROMPTS, params)]
    loaded = on_cuda(make_loaded(architecture, **FUSED), cuda)
    for spec in ("none", "ngram:k=5", "recycling:k=20", "ngram:k=4+recycling:k=12", "auto"):
        llm = make_llm(loaded, speculation=spec, max_num_batched_tokens=32, eager=eager)
        assert llm.engine.runner.draws
        assert [g.token_ids for g in llm.generate(PROMPTS, params)] == expected


@torch.inference_mode()
def test_a_row_has_the_same_bits_alone_in_a_batch_and_in_a_tree(cuda: torch.device) -> None:
    loaded = on_cuda(make_loaded("llama", **FUSED), cuda)
    model = loaded.model.to(torch.bfloat16)
    kv = PagedKV(kv_shape(loaded.config, torch.bfloat16), 64, 16, cuda)
    runner = ModelRunner(model, kv, cuda, StepLimits(128, 16, 512, 128))

    def prompt(n: int, first: int) -> SequenceInput:
        return SequenceInput([(7 * i + first) % 90 for i in range(n)], np.arange(n), 0, range(first, first + 8))

    starts = [(40, 0), (100, 8), (17, 16), (5, 24)]
    for n, first in starts:
        runner.forward(ForwardBatch((prompt(n, first),), [n - 1]))
    steps = [SequenceInput([11 + first], np.array([n]), n, range(first, first + 8)) for n, first in starts]
    together = runner.forward(ForwardBatch(tuple(steps), range(4))).clone()
    for row, step in enumerate(steps):
        assert torch.equal(runner.forward(ForwardBatch((step,), [0]))[0], together[row])
    n, first = starts[1]
    visible = np.eye(20, dtype=np.bool_)
    visible[:, 0] = True
    root, kids = 11 + first, list(range(20, 39))
    tree = SequenceInput([root, *kids], np.array([n] + [n + 1] * 19), n, range(first, first + 8), visible, num_causal=1)
    scores = runner.forward(ForwardBatch((tree,), range(20))).clone()
    assert torch.equal(scores[0], together[1])
    runner.forward(ForwardBatch((steps[1],), [0]))
    child = SequenceInput([kids[4]], np.array([n + 1]), n + 1, range(first, first + 8))
    assert torch.equal(runner.forward(ForwardBatch((child,), [0]))[0], scores[5])


def test_the_device_gives_the_same_noise(cuda: torch.device) -> None:
    noise = Noise(2**63 + 11, 4)
    for position, stream in ((0, Stream.TARGET), (8191, Stream.DRAFT)):
        host = noise.words(position, stream, 49_152)
        device = philox_words_torch(noise, position, stream, 49_152, cuda).cpu().numpy()
        assert (host == device).all()


@pytest.mark.real_model
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_real_model(cuda: torch.device, temperature: float) -> None:
    try:
        loaded = load_model(REAL_MODEL, dtype="float32", device=str(cuda))
    except DownloadError as error:
        pytest.skip(f"the built-in model cannot be fetched here: {error}")
    chats: list[list[dict[str, Any]]] = [
        [{"role": "user", "content": text}] for text in ("Count from 1 to 30.", "Write a story about a fox.")
    ]
    params = SamplingParams(temperature=temperature, seed=5, max_tokens=96)
    texts = [
        [g.token_ids for g in LLM(loaded, speculation=spec).chat(chats, params)]
        for spec in ("none", "ngram:k=6", "recycling:k=24", "auto")
    ]
    assert all(text == texts[0] for text in texts[1:])
