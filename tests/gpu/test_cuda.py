"""The engine on a CUDA device (plain PyTorch there): same noise, same text with speculation on and off."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from conftest import REAL_MODEL
from fakes import ARCHITECTURES, make_llm, make_loaded

from paceline import LLM, SamplingParams
from paceline.engine.rng import Noise, Stream, philox_words_torch
from paceline.errors import DownloadError
from paceline.model.loader import LoadedModel, load_model

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
