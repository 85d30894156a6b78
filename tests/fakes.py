"""Small stand-ins that are real where it matters: random models of real architectures, tiny vocabularies."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from paceline.config import EngineConfig
from paceline.engine.builder import build_engine
from paceline.llm import LLM
from paceline.model import attention as _attention  # noqa: F401  registers the attention function
from paceline.model.loader import LoadedModel
from paceline.plan.heads import AcceptanceHead, DecisionHead, Head, save_head
from paceline.plan.registry import POLICIES

_SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.6,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "mlp_only_layers": [1]}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {"head_dim": 16},
    "mistral": {"sliding_window": 24},
    "gemma2": {"head_dim": 16, "sliding_window": 24, "query_pre_attn_scalar": 16},
    "gemma3_text": {
        "head_dim": 16,
        "sliding_window": 24,
        "query_pre_attn_scalar": 16,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            "full_attention": {"rope_type": "linear", "rope_theta": 1000.0, "factor": 4.0},
        },
        "initializer_range": 0.3,
        "tie_word_embeddings": False,
    },
    "phi3": {
        "sliding_window": 24,
        "rope_parameters": {
            "rope_type": "longrope",
            "partial_rotary_factor": 0.5,
            "short_factor": [1.0, 1.5],
            "long_factor": [4.0, 8.0],
            "factor": 4.0,
        },
        "original_max_position_embeddings": 512,
        "initializer_range": 0.5,
    },
    "gpt2": {"n_inner": 48, "num_key_value_heads": None, "tie_word_embeddings": False},
    "opt": {
        "ffn_dim": 48,
        "num_key_value_heads": None,
        "initializer_range": 0.9,
        "tie_word_embeddings": False,
    },
    "olmo2": {
        "num_key_value_heads": 4,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10.0},
        "initializer_range": 0.9,
    },
    "granite": {
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.5,
        "attention_multiplier": 0.3,
        "logits_scaling": 2.0,
    },
    "qwen2_moe": {**_EXPERTS, "shared_expert_intermediate_size": 40},
    "qwen3_moe": {**_EXPERTS, "head_dim": 16, "norm_topk_prob": True},
}


def make_config(architecture: str = "llama", vocab_size: int = 96, **changes: Any) -> Any:
    """A tiny configuration of a real architecture."""
    return transformers.AutoConfig.for_model(
        architecture, **{**_SMALL, "vocab_size": vocab_size, **ARCHITECTURES[architecture], **changes}
    )


def make_model(config: Any, seed: int = 0, attention: str = "paceline") -> torch.nn.Module:
    """A random model; the same seed gives the same weights whatever attention it uses."""
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()


def make_tokenizer(vocab_size: int = 96) -> PreTrainedTokenizerFast:
    """One word per token: token i is written `wi`."""
    vocabulary = {f"w{i}": i for i in range(vocab_size)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="w2", pad_token="w0")


def make_loaded(
    architecture: str = "llama", vocab_size: int = 96, seed: int = 0, eos: tuple[int, ...] = (2,), **changes: Any
) -> LoadedModel:
    """A random tiny model, as the loader would return it."""
    config = make_config(architecture, vocab_size, **changes)
    return LoadedModel(
        name=f"tiny-{architecture}",
        path=Path("tiny"),
        model=make_model(config, seed),
        tokenizer=make_tokenizer(vocab_size),
        config=config,
        dtype=torch.float32,
        device=torch.device("cpu"),
        eos_token_ids=eos,
        max_model_len=int(config.max_position_embeddings),
    )


def make_llm(loaded: LoadedModel | None = None, **options: Any) -> LLM:
    """An LLM over a tiny model."""
    defaults = {"speculation": "none", "kv_cache_memory": 4 << 20}
    return LLM(loaded or make_loaded(), **{**defaults, **options})


def make_engine(loaded: LoadedModel | None = None, **options: Any) -> Any:
    """An engine over a tiny model."""
    defaults = {"speculation": "none", "kv_cache_memory": 4 << 20}
    return build_engine(EngineConfig.from_options({**defaults, **options}), loaded or make_loaded())


BYTE_VOCAB = 384


@cache
def make_byte_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE with an end token and about a hundred tokens of several characters, many of them JSON's."""
    words = ["name", "age", "tags", "inner", "true", "false", "null", "red", "green", "kind", "value", "the", "and"]
    turns = [words[i:] + words[:i] for i in range(len(words))]
    corpus = [f'{{"{a}": "{b}", "{c}": [1, 2.5, 10], "{d}": {{"{e}": null}}}}' for a, b, c, d, e, *_ in turns]
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=BYTE_VOCAB, special_tokens=["<pad>", "<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(corpus * 4, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def make_byte_loaded(seed: int = 0, **changes: Any) -> LoadedModel:
    """A random tiny model that writes bytes, for output with a grammar."""
    loaded = make_loaded(vocab_size=BYTE_VOCAB, seed=seed, **changes)
    return replace(loaded, tokenizer=make_byte_tokenizer())


def make_head(policy: str, hidden_size: int = 64) -> Head:
    """The kind of head that a policy needs, with random weights: its judgements differ from token to token."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        head: Head = DecisionHead() if policy == "decision" else AcceptanceHead(hidden_size, blocks=2)
        with torch.no_grad():
            for parameter in head.parameters():
                parameter.normal_(0.0, 0.5 if policy == "decision" else 0.2)
    return head.eval()


def head_options(policy: str) -> dict[str, Any]:
    """The options that a policy cannot do without, as `check_policy` would make them."""
    return {option: make_head(policy) for option in POLICIES[policy].required}


def save_heads(folder: Path, hidden_size: int) -> Path:
    """A head for every policy that needs one, each in a folder of its policy's name."""
    for policy in POLICIES:
        if POLICIES[policy].required:
            (folder / policy).mkdir(parents=True)
            save_head(folder / policy, make_head(policy, hidden_size), {})
    return folder


def with_head(policy: str, folder: Path) -> str:
    """A policy of a spec, with the head it cannot do without."""
    name, _, options = policy.partition(":")
    if not name or not POLICIES[name].required or "head=" in options:
        return policy
    return f'{name}:head="{folder / name}"' + ("," + options if options else "")
