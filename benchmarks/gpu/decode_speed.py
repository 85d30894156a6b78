"""Plain decoding on one GPU: our kernels in CUDA graphs beside the same engine over `transformers` modules, run by run.

    python benchmarks/gpu/decode_speed.py --json benchmarks/gpu/decode_speed.json

Random weights of two shapes: SmolLM2-135M's, where kernel count and host time decide, and an 8B-class Llama's, where
memory does. The time is that of real models of these shapes; the text means nothing, so speculation is off. Greedy and
at temperature 1, prompts of 100 tokens, `ignore_eos`; tokens per second include reading the prompts. Sides take turns.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from paceline import LLM, SamplingParams
from paceline.bench.host import host_info
from paceline.model import attention as _attention  # noqa: F401  # registers "paceline"
from paceline.model.loader import LoadedModel

SHAPES: dict[str, dict[str, Any]] = {
    "SmolLM2-135M": {
        "hidden_size": 576,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "intermediate_size": 1536,
        "vocab_size": 49152,
        "tie_word_embeddings": True,
    },
    "8B class": {
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "intermediate_size": 14336,
        "vocab_size": 128256,
    },
}
_PROMPT = 100


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--users", type=int, nargs="+", default=[1, 8, 32, 128])
    parser.add_argument("--new", type=int, default=256, help="tokens of an answer (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--skip-modules", action="store_true", help="leave the slow side out")
    parser.add_argument("--json", help="write the result here")
    args = parser.parse_args()
    rows = []
    for shape in args.shapes:
        rows += _measure(shape, args.users, args.new, args.repeats, modules=not args.skip_modules)
    result = {"host": host_info("bfloat16", torch.device("cuda")), "settings": vars(args), "rows": rows}
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=2) + "\n")


def _measure(shape: str, users: Sequence[int], new: int, repeats: int, *, modules: bool) -> list[dict[str, Any]]:
    started = time.perf_counter()
    llm = _llm(_model(shape), max(users))
    runner = llm.engine.runner
    graphs = runner._graphs
    assert graphs is not None, "this model does not run in our kernels"
    print(f"{shape}: ready after {time.perf_counter() - started:.1f} s")
    rows = []
    for count in users:
        speeds: dict[str, list[float]] = {}
        for temperature in (0.0, 1.0):
            _run(llm, count, 8, temperature)
            speeds[f"kernels, T={temperature:g}"] = [_run(llm, count, new, temperature) for _ in range(repeats)]
        if modules:
            runner._graphs = None
            _run(llm, count, 4, 0.0)
            speeds["transformers modules, T=0"] = [_run(llm, count, max(new // 8, 8), 0.0)]
            runner._graphs = graphs
        medians = {name: statistics.median(values) for name, values in speeds.items()}
        print(f"  {count:4d} users: " + ", ".join(f"{name}: {value:,.0f} tokens/s" for name, value in medians.items()))
        rows.append({"shape": shape, "users": count, "tokens_per_second": speeds})
    return rows


def _run(llm: LLM, count: int, new: int, temperature: float) -> float:
    """Tokens per second of so many requests at once."""
    generator = np.random.default_rng(0)
    prompts = [generator.integers(3, 40_000, _PROMPT).tolist() for _ in range(count)]
    params = SamplingParams(temperature=temperature, seed=1, max_tokens=new, ignore_eos=True)
    started = time.perf_counter()
    answers = llm.generate(prompts, params)
    return sum(len(answer.token_ids) for answer in answers) / (time.perf_counter() - started)


def _llm(loaded: LoadedModel, users: int) -> LLM:
    return LLM(loaded, speculation="none", max_num_seqs=users, max_num_batched_tokens=2048, enable_prefix_caching=False)


def _model(shape: str) -> LoadedModel:
    device = torch.device("cuda")
    config = LlamaConfig(max_position_embeddings=4096, rms_norm_eps=1e-5, **SHAPES[shape])
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with device:
        model = AutoModelForCausalLM.from_config(config, attn_implementation="paceline")
    torch.set_default_dtype(torch.float32)
    vocabulary = {f"w{i}": i for i in range(config.vocab_size)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    return LoadedModel(
        name=shape,
        path=Path(),
        model=model.eval().requires_grad_(False),
        tokenizer=PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="w2", pad_token="w0"),
        config=config,
        dtype=torch.bfloat16,
        device=device,
        eos_token_ids=(2,),
        max_model_len=4096,
    )


if __name__ == "__main__":
    main()
