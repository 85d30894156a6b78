"""Paceline and vLLM on one GPU: the same prompts, one after the other in one call, tokens per second by batch size.

    python benchmarks/gpu/against_vllm.py MODEL --prompts spec_bench.jsonl --json benchmarks/gpu/against_vllm.json
    python benchmarks/gpu/against_vllm.py CONFIG_FOLDER --random --prompts spec_bench.jsonl

MODEL is a folder with weights in `transformers`' format; with `--random` a folder with `config.json` and a tokenizer,
and both sides make up weights (the time is that of a real model, the text means nothing). Prompts are chat questions,
one object with `turns` a line (Spec-Bench's format). Greedy, bf16, end tokens ignored, prefix caches off; tokens per
second include reading the prompts. Every side runs in processes of its own; Paceline's settings take turns within one
process, on the same prompts, which are others in every turn; vLLM gets those of the first. So that the machine's drift
shows, vLLM runs before and after with `--again`.

vLLM is the one that `python` finds, or one unpacked into a folder: `--vllm-path`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

_MARK = "RESULT "
_MOST_CHARACTERS = 6000
"""Of a prompt."""
_STRIDE = 12
"""Lines between neighbours, so that tasks, which come one after the other, are mixed."""
_TOGETHER = 64
"""Prompts of a turn, but for batches larger than that."""
Generate = Callable[[Sequence[str]], int]
"""Answers prompts, all at once; the number of tokens."""


def main() -> None:
    """Run all sides and print the table."""
    args = _parse()
    if args.side:
        _SIDES[args.side](args)
        return
    runs: list[dict[str, Any]] = []
    for side, setting in _order(args):
        runs += _run_side(args, side, setting)
        _write(args, runs)
    print(_table(runs, args.batches))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of the model")
    parser.add_argument("--prompts", required=True, help="questions, one JSON object a line")
    parser.add_argument("--random", action="store_true", help="random weights")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32, 128])
    parser.add_argument("--max-tokens", type=int, default=256)
    parser.add_argument("--speculation", nargs="*", default=["none", "auto", "ngram:k=4"], help="Paceline's settings")
    parser.add_argument("--vllm", nargs="*", default=["none"], help="vLLM's: none, ngram")
    parser.add_argument("--again", action="store_true", help="vLLM without speculation a second time, last")
    parser.add_argument("--vllm-path", help="folder that vLLM was unpacked into")
    parser.add_argument("--single", type=int, default=12, help="prompts that are answered one by one for batch 1")
    parser.add_argument("--most-batches", type=int, default=8, help="batches of a turn at most")
    parser.add_argument("--rounds", type=int, default=2, help="of Paceline's settings in turns")
    parser.add_argument("--json", help="write the result here")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--setting", default="none", help=argparse.SUPPRESS)
    return parser.parse_args()


def _order(args: argparse.Namespace) -> Iterator[tuple[str, str]]:
    for setting in args.vllm:
        yield "vllm", setting
    if args.speculation:
        yield "paceline", "|".join(args.speculation)
    if args.again and args.vllm:
        yield "vllm", "none"


def _run_side(args: argparse.Namespace, side: str, setting: str) -> list[dict[str, Any]]:
    """Its measurements; a side that fails is reported and left out."""
    env = dict(os.environ, VLLM_USE_FLASHINFER_SAMPLER="0", VLLM_NO_USAGE_STATS="1", TOKENIZERS_PARALLELISM="false")
    if side == "vllm" and args.vllm_path:
        env["PYTHONPATH"] = os.pathsep.join(filter(None, [args.vllm_path, env.get("PYTHONPATH")]))
    command = [sys.executable, *sys.argv, "--side", side, "--setting", setting]
    started = time.perf_counter()
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        lines = []
        for line in process.stdout:
            lines.append(line)
            if line.startswith(_MARK):
                print(line.removeprefix(_MARK), end="", flush=True)
    if process.returncode:
        print(f"{side} {setting} failed:\n{''.join(lines[-25:])}", flush=True)
    found = [json.loads(line.removeprefix(_MARK)) for line in lines if line.startswith(_MARK)]
    print(f"{side} {setting}: {time.perf_counter() - started:.0f} s in all", flush=True)
    return found


def _texts(args: argparse.Namespace, tokenizer: Any) -> list[str]:
    """All prompts, tasks mixed."""
    lines = Path(args.prompts).read_text().splitlines()
    mixed = [line for start in range(_STRIDE) for line in lines[start::_STRIDE]]
    questions = [json.loads(line)["turns"][0][:_MOST_CHARACTERS] for line in mixed]
    return [
        tokenizer.apply_chat_template([{"role": "user", "content": q}], add_generation_prompt=True, tokenize=False)
        for q in questions
    ]


def _groups(args: argparse.Namespace, texts: Sequence[str], batch: int, turn: int) -> list[list[str]]:
    """The batches of a turn. No prompt comes twice while there are others: drafters remember what was answered."""
    at = 0
    for size in args.batches:
        count = args.single if size == 1 else max(1, min(args.most_batches, _TOGETHER // size))
        for number in range(args.rounds):
            if (size, number) == (batch, turn):
                return [[texts[(at + i * size + j) % len(texts)] for j in range(size)] for i in range(count)]
            at += count * size
    raise AssertionError((batch, turn))


def _measure(groups: Sequence[Sequence[str]], generate: Generate) -> float:
    """Tokens per second."""
    started = time.perf_counter()
    return sum(map(generate, groups)) / (time.perf_counter() - started)


def _tell(**values: Any) -> None:
    print(_MARK + json.dumps(values), flush=True)


def _vllm(args: argparse.Namespace) -> None:
    from vllm import LLM, SamplingParams

    options: dict[str, Any] = {"load_format": "dummy"} if args.random else {}
    if args.setting == "ngram":
        options["speculative_config"] = {
            "method": "ngram",
            "num_speculative_tokens": 4,
            "prompt_lookup_max": 4,
            "prompt_lookup_min": 2,
        }
    started = time.perf_counter()
    llm = LLM(
        model=args.model,
        max_model_len=4096,
        gpu_memory_utilization=0.6,
        max_num_seqs=256,
        enable_prefix_caching=False,
        **options,
    )
    ready = time.perf_counter() - started
    texts = _texts(args, llm.get_tokenizer())
    params = SamplingParams(temperature=0, max_tokens=args.max_tokens, ignore_eos=True)

    def generate(prompts: Sequence[str]) -> int:
        answers = llm.generate(list(prompts), params, use_tqdm=False)
        return sum(len(answer.outputs[0].token_ids) for answer in answers)

    generate(texts[-2:])
    for batch in args.batches:
        speed = _measure(_groups(args, texts, batch, 0), generate)
        _tell(side="vLLM", setting=args.setting, batch=batch, tokens_per_second=round(speed, 1), ready=round(ready, 1))


def _paceline(args: argparse.Namespace) -> None:
    import torch

    from paceline import LLM, SamplingParams
    from paceline.bench.host import host_info
    from paceline.model.loader import load_model

    started = time.perf_counter()
    loaded = _random(args.model) if args.random else load_model(args.model, dtype="bfloat16")
    params = SamplingParams(temperature=0.0, max_tokens=args.max_tokens, ignore_eos=True)
    most = max(args.batches)
    llms = {
        setting: LLM(
            loaded,
            speculation=setting,
            max_model_len=4096,
            max_num_seqs=most,
            max_num_batched_tokens=8192,
            enable_prefix_caching=False,
            kv_cache_memory=12 << 30,
        )
        for setting in args.setting.split("|")
    }
    ready = time.perf_counter() - started
    _tell(side="host", **host_info("bfloat16", torch.device("cuda")))
    texts = _texts(args, loaded.tokenizer)
    for llm in llms.values():
        llm.generate(texts[-most:], SamplingParams(temperature=0.0, max_tokens=16, ignore_eos=True))
    for batch in args.batches:
        for turn in range(args.rounds):
            for setting, llm in llms.items() if turn % 2 == 0 else reversed(llms.items()):

                def generate(prompts: Sequence[str], llm: LLM = llm) -> int:
                    return sum(len(answer.token_ids) for answer in llm.generate(list(prompts), params))

                speed = round(_measure(_groups(args, texts, batch, turn), generate), 1)
                _tell(side="Paceline", setting=setting, batch=batch, tokens_per_second=speed, ready=round(ready, 1))


def _random(folder: str) -> Any:
    """The model of a `config.json` with random weights in bf16, and the tokenizer beside it."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    from paceline.model import attention as _attention  # noqa: F401  # registers "paceline"
    from paceline.model.loader import LoadedModel

    config = AutoConfig.from_pretrained(folder)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(config, attn_implementation="paceline")
    torch.set_default_dtype(torch.float32)
    return LoadedModel(
        name=Path(folder).name,
        path=Path(folder),
        model=model.eval().requires_grad_(False),
        tokenizer=AutoTokenizer.from_pretrained(folder),
        config=config,
        dtype=torch.bfloat16,
        device=torch.device("cuda"),
        eos_token_ids=(2,),
        max_model_len=4096,
    )


_SIDES: dict[str, Callable[[argparse.Namespace], None]] = {"vllm": _vllm, "paceline": _paceline}


def _write(args: argparse.Namespace, runs: Sequence[dict[str, Any]]) -> None:
    if args.json:
        hosts = [run for run in runs if run["side"] == "host"]
        host = {key: value for key, value in (hosts[0] if hosts else {}).items() if key not in ("side", "command")}
        settings = {k: v for k, v in vars(args).items() if k in ("random", "batches", "max_tokens", "rounds", "single")}
        rows = [run for run in runs if run["side"] != "host"]
        result = {"host": host, "model": Path(args.model).name, "settings": settings, "rows": rows}
        Path(args.json).write_text(json.dumps(result, indent=2) + "\n")


def _table(runs: Sequence[dict[str, Any]], batches: Sequence[int]) -> str:
    """Medians, and each over vLLM's without speculation."""
    speeds: dict[tuple[str, str], dict[int, list[float]]] = {}
    for run in runs:
        if run["side"] != "host":
            row = speeds.setdefault((run["side"], run["setting"]), {})
            row.setdefault(run["batch"], []).append(run["tokens_per_second"])
    base = speeds.get(("vLLM", "none"), {})
    lines = ["tokens/s".ljust(24) + "".join(f"batch {batch}".rjust(20) for batch in batches)]
    for (side, setting), row in speeds.items():
        cells = []
        for batch in batches:
            value = statistics.median(row[batch]) if batch in row else float("nan")
            ratio = f" ({value / statistics.median(base[batch]):.2f}x)" if batch in base else ""
            cells.append(f"{value:,.0f}{ratio}".rjust(20))
        lines.append(f"{side} {setting}".ljust(24) + "".join(cells))
    return "\n".join(lines)


if __name__ == "__main__":
    main()
