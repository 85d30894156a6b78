"""Paceline beside llama.cpp on the same GGUF file and CPU: one stream, several at once, and the time to read a prompt.

    python -m venv peer && peer/bin/pip install llama-cpp-python
    python benchmarks/cpu_vs_llama_cpp.py model.gguf --peer peer/bin/python --threads 2 --json FILE

Sides take turns. The peer runs in a process of its own: one stream through `llama_cpp.Llama.generate`, greedy, with its
own prompt lookup where that is named; several streams through `llama_decode` with a batch of one token for each, which
is what its server does for every step, without the server. The prompts are the questions that come with Paceline.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from paceline import LLM, SamplingParams
from paceline.bench.host import host_info
from paceline.bench.spec import builtin_questions, parse_questions

PEER = """
import json, sys, time
import llama_cpp as C
import numpy as np
from llama_cpp import Llama
from llama_cpp.llama_speculative import LlamaPromptLookupDecoding
path, threads, length = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
common = dict(model_path=path, n_ctx=length, n_threads=threads, n_threads_batch=threads, verbose=False)
llms = {"llama.cpp": Llama(**common), "llama.cpp, prompt lookup": Llama(
    draft_model=LlamaPromptLookupDecoding(num_pred_tokens=2), **common)}
class Together:
    def __init__(self, users):
        params = C.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_seq_max, params.kv_unified = length * users, 512, users, True
        params.n_threads = params.n_threads_batch = threads
        self.context = C.llama_init_from_model(llms["llama.cpp"].model, params)
        self.vocab = llms["llama.cpp"].n_vocab()
        self.batch = C.llama_batch_init(512, 0, 1)
    def decode(self, rows):
        b = self.batch
        b.n_tokens = len(rows)
        for i, (token, place, user, wanted) in enumerate(rows):
            b.token[i], b.pos[i], b.n_seq_id[i], b.logits[i] = token, place, 1, wanted
            b.seq_id[i][0] = user
        assert C.llama_decode(self.context, b) == 0
    def best(self, row):
        logits = C.llama_get_logits_ith(self.context, row)
        return int(np.ctypeslib.as_array(logits, shape=(self.vocab,)).argmax())
    def run(self, prompts, new):
        C.llama_memory_clear(C.llama_get_memory(self.context), True)
        out = []
        for user, prompt in enumerate(prompts):
            for start in range(0, len(prompt), 512):
                part = prompt[start:start + 512]
                last = start + len(part) == len(prompt)
                self.decode([(t, start + i, user, last and i + 1 == len(part)) for i, t in enumerate(part)])
            out.append([self.best(len(part) - 1)])
        for step in range(new - 1):
            self.decode([(o[-1], len(p) + step, u, True) for u, (o, p) in enumerate(zip(out, prompts))])
            for user, tokens in enumerate(out):
                tokens.append(self.best(user))
        return out
together = {}
print("ready", flush=True)
for line in sys.stdin:
    name, prompt, new = json.loads(line)
    if name == "together":
        users = len(prompt)
        if users not in together:
            together[users] = Together(users)
        started = time.perf_counter()
        out = together[users].run(prompt, new)
        print(json.dumps([time.perf_counter() - started, out]), flush=True)
        continue
    llm = llms[name]
    llm.reset()
    started, out = time.perf_counter(), []
    if new:
        for token in llm.generate(prompt, temp=0.0, reset=True):
            out.append(int(token))
            if len(out) == new:
                break
    else:
        llm.eval(prompt)
    print(json.dumps([time.perf_counter() - started, out]), flush=True)
"""
LENGTH = 2048
NEW = 128
PREFILL = 512


class Peer:
    """llama.cpp in another process."""

    def __init__(self, python: str, model: str, threads: int) -> None:
        command = [python, "-c", PEER, model, str(threads), str(LENGTH)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        while self._process.stdout.readline().strip() != "ready":
            if self._process.poll() is not None:
                raise SystemExit("the peer ended; can its Python import llama_cpp?")

    def run(self, name: str, prompt: Sequence[Any], new: int) -> tuple[float, list[Any]]:
        """Seconds and tokens; without new tokens the prompt is read only. `together` takes several prompts."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps([name, list(prompt), new]) + "\n")
        self._process.stdin.flush()
        seconds, tokens = json.loads(self._process.stdout.readline())
        return seconds, tokens


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="GGUF file")
    parser.add_argument("--peer", required=True, help="a Python that has llama-cpp-python")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--questions", type=int, default=7)
    parser.add_argument("--users", type=int, default=8, help="streams at once (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--speculation", nargs="*", default=["auto"])
    parser.add_argument("--json", help="write the result here")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    peer = Peer(args.peer, args.model, args.threads)
    options: dict[str, Any] = {"max_model_len": LENGTH, "enable_prefix_caching": False}
    ours = {s: LLM(args.model, speculation=s, **options) for s in ("none", *args.speculation)}
    first = ours["none"]
    prompts = _prompts(first, args.questions)
    _warm(ours, peer, prompts[0])
    decode: dict[str, list[float]] = {}
    same = total = 0
    for repeat in range(args.repeats):
        for number, prompt in enumerate(prompts):
            texts = {}
            for name in _turns([*ours, "llama.cpp", "llama.cpp, prompt lookup"], repeat + number):
                seconds, texts[name] = _generate(ours[name], prompt) if name in ours else peer.run(name, prompt, NEW)
                decode.setdefault(name, []).append(len(texts[name]) / seconds)
            same, total = same + (texts["none"] == texts["llama.cpp"]), total + 1
    long = [t for prompt in prompts for t in prompt] * 4
    prefill: dict[str, list[float]] = {}
    for i in range(5):
        part = long[i * 37 : i * 37 + PREFILL]
        prefill.setdefault("none", []).append(PREFILL / _generate(first, part, 1)[0])
        prefill.setdefault("llama.cpp", []).append(PREFILL / peer.run("llama.cpp", part, 0)[0])
    many = _prompts(first, args.users)
    together: dict[str, list[float]] = {}
    for repeat in range(-1, args.repeats + 1):
        for name in _turns([*ours, "llama.cpp"], repeat):
            seconds = _generate_all(ours[name], many) if name in ours else peer.run("together", many, NEW)[0]
            if repeat >= 0:
                together.setdefault(name, []).append(args.users * NEW / seconds)
    print(f"{host_info(first.loaded.precision, torch.device('cpu'))}\n")
    print(f"{'tokens/s, median (range)':28} {'one stream':>24} {f'reading {PREFILL} tokens':>26}")
    for name, rates in decode.items():
        print(f"{name:28} {_shown(rates):>24} {_shown(prefill.get(name, [])):>26}")
    for name in ours:
        for base in ("llama.cpp", "llama.cpp, prompt lookup"):
            ratios = [a / b for a, b in zip(decode[name], decode[base], strict=True)]
            print(f"{name} over {base}: {_shown(ratios)}")
    for name, rates in together.items():
        ratios = [a / b for a, b in zip(rates, together["llama.cpp"], strict=True)]
        print(f"{args.users} streams, {name}: {_shown(rates)} tokens/s, {_shown(ratios)} of llama.cpp's")
    ratios = [a / b for a, b in zip(prefill["none"], prefill["llama.cpp"], strict=True)]
    print(f"reading over llama.cpp: {_shown(ratios)}")
    print(f"same text of {NEW} tokens without speculation: {same} of {total}")
    if args.json:
        found = {"host": host_info(first.loaded.precision, torch.device("cpu")), "threads": args.threads}
        found |= {
            "users": args.users,
            "together": together,
            "new": NEW,
            "decode": decode,
            "prefill": prefill,
            "same": [same, total],
        }
        Path(args.json).write_text(json.dumps(found, indent=1) + "\n")


def _prompts(llm: LLM, count: int) -> list[list[int]]:
    lines = builtin_questions().read_text(encoding="utf-8").splitlines()
    questions = list(parse_questions((i, json.loads(line)) for i, line in enumerate(lines, start=1)))
    chosen = questions[:: max(1, len(questions) // count)][:count]
    return [llm.chat_prompt([{"role": "user", "content": q.turns[0]}]) for q in chosen]


def _warm(ours: dict[str, LLM], peer: Peer, prompt: Sequence[int]) -> None:
    for llm in ours.values():
        _generate(llm, prompt, 16)
    for name in ("llama.cpp", "llama.cpp, prompt lookup"):
        peer.run(name, prompt, 16)


def _generate(llm: LLM, prompt: Sequence[int], new: int = NEW) -> tuple[float, list[int]]:
    started = time.perf_counter()
    out = llm.generate([list(prompt)], SamplingParams(temperature=0.0, max_tokens=new, ignore_eos=True))
    return time.perf_counter() - started, list(out[0].token_ids)


def _generate_all(llm: LLM, prompts: Sequence[list[int]]) -> float:
    """Seconds for all at once."""
    started = time.perf_counter()
    out = llm.generate(list(prompts), SamplingParams(temperature=0.0, max_tokens=NEW, ignore_eos=True))
    assert all(len(g.token_ids) == NEW for g in out)
    return time.perf_counter() - started


def _turns(names: Sequence[str], by: int) -> list[str]:
    """Everybody begins once."""
    at = by % len(names)
    return [*names[at:], *names[:at]]


def _shown(values: Sequence[float]) -> str:
    if not values:
        return ""
    return f"{statistics.median(values):.2f} ({min(values):.2f}-{max(values):.2f})"


if __name__ == "__main__":
    main()
