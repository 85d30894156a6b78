r"""Closed loop inside vLLM: no speculation, stock n-gram at fixed lengths, and Paceline's scheduler, taking turns.

    python benchmarks/vllm/closed_loop.py MODEL --json benchmarks/vllm/cpu_closed_loop.json
    python benchmarks/vllm/closed_loop.py MODEL --users 1 8 32 128 --graphs --max-num-seqs 128 --threading-layer '' \
        --settings none ngram-4 'ngram-4 paced' --engine '{"gpu_memory_utilization": 0.2}'         (on a GPU)

Every setting is a vLLM engine in a process of its own; all stay loaded, and one works at a time. A user asks a
question, waits for the whole answer (greedy, `ignore_eos`, so that all settings write equally much), and asks the next.
In every repeat all settings get the same questions, in another order of settings. Ratios are medians over repeats with
their range; against the best stock setting, that one is chosen on the even repeats and compared on the odd ones. With
`--hooks` the processor time of Paceline's hooks is measured as well, at 64 requests (`--hook-users`).
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

QUESTIONS = Path(__file__).parent.parent.parent / "paceline" / "bench" / "questions.jsonl"
NGRAM = {"method": "ngram", "prompt_lookup_min": 2, "prompt_lookup_max": 4}
SUFFIX = {"method": "custom_class", "model": "paceline.integrations.vllm.SuffixProposer", "num_speculative_tokens": 4}
SETTINGS: dict[str, tuple[dict[str, Any] | None, bool]] = {
    "none": (None, False),
    "ngram-2": ({**NGRAM, "num_speculative_tokens": 2}, False),
    "ngram-4": ({**NGRAM, "num_speculative_tokens": 4}, False),
    "ngram-4 paced": ({**NGRAM, "num_speculative_tokens": 4}, True),
    "own suffix paced": (SUFFIX, True),
}
"""Speculative configuration, and whether Paceline's scheduler runs."""
HOOKS = ("_before", "_scheduled", "_read", "_learn")


def work(job: dict[str, Any]) -> None:
    """One setting: answers requests from standard input, each a line of JSON, with a line."""
    from vllm import LLM, SamplingParams

    options = dict(job["engine"], speculative_config=job["spec"])
    if job["paced"]:
        options["scheduler_cls"] = "paceline.integrations.vllm.scheduler"
    llm = LLM(job["model"], **options)
    tokenizer = llm.get_tokenizer()
    engine = llm.llm_engine
    scheduler: Any = engine.engine_core.engine_core.scheduler
    spent = watch(scheduler) if job["hooks"] and hasattr(scheduler, "_before") else {"seconds": 0.0, "steps": 0}
    print("READY", flush=True)
    for line in sys.stdin:
        ask = json.loads(line)
        prompts = [
            tokenizer.apply_chat_template([{"role": "user", "content": q}], add_generation_prompt=True, tokenize=False)
            for q in ask["questions"]
        ]
        params = SamplingParams(temperature=0.0, max_tokens=ask["max_tokens"], ignore_eos=True)
        spent.update(seconds=0.0, steps=0)
        seconds, tokens = closed_loop(engine, prompts, params, ask["users"])
        hook = 1e6 * spent["seconds"] / spent["steps"] if spent["steps"] else None
        print("DONE" + json.dumps({"rate": tokens / seconds, "hook_us": hook}), flush=True)


def closed_loop(engine: Any, prompts: list[str], params: Any, users: int) -> tuple[float, int]:
    """Seconds and output tokens of all prompts, `users` of them at a time."""
    started, tokens, waiting = time.perf_counter(), 0, list(enumerate(prompts))
    waiting.reverse()

    def ask() -> None:
        if waiting:
            number, prompt = waiting.pop()
            engine.add_request(str(number), prompt, params)

    for _ in range(users):
        ask()
    while engine.has_unfinished_requests():
        for output in engine.step():
            if output.finished:
                tokens += len(output.outputs[0].token_ids)
                ask()
    return time.perf_counter() - started, tokens


def watch(scheduler: Any) -> dict[str, float]:
    """Sum the processor time in our hooks."""
    spent = {"seconds": 0.0, "steps": 0}

    def timed(function: Any, counts: int) -> Any:
        def run(*args: Any) -> Any:
            started = time.thread_time()  # others on the machine do not count
            try:
                return function(*args)
            finally:
                spent["seconds"] += time.thread_time() - started
                spent["steps"] += counts

        return run

    for name in HOOKS:
        setattr(scheduler, name, timed(getattr(scheduler, name), int(name == "_before")))
    return spent


class Worker:
    """A setting's process."""

    def __init__(self, name: str, args: argparse.Namespace) -> None:
        spec, paced = SETTINGS[name]
        engine = {"dtype": args.dtype, "enforce_eager": not args.graphs, "max_model_len": 1024}
        engine |= {"max_num_seqs": args.max_num_seqs, "enable_prefix_caching": False, **json.loads(args.engine)}
        job = {"model": args.model, "spec": spec, "paced": paced, "engine": engine, "hooks": args.hooks}
        environment = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR"}
        if args.threading_layer:
            environment["NUMBA_THREADING_LAYER"] = args.threading_layer
        command = [sys.executable, __file__, "--worker", json.dumps(job)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=None, text=True, env=environment
        )
        self._read("READY")

    def ask(self, **ask: Any) -> dict[str, Any]:
        """Run one closed loop."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(ask) + "\n")
        self._process.stdin.flush()
        result: dict[str, Any] = json.loads(self._read("DONE"))
        return result

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()

    def _read(self, mark: str) -> str:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith(mark):
                return line.removeprefix(mark)
        raise RuntimeError("a vLLM engine ended; its errors are above")


def measure(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Rates by users, setting and repeat: what there is, after every number of users."""
    lines = QUESTIONS.read_text(encoding="utf-8").splitlines()
    pool = [json.loads(line)["turns"][0] for line in lines]
    workers = {}
    for name in args.settings:
        workers[name] = Worker(name, args)
        print(f"{name} is ready", file=sys.stderr, flush=True)
    rates: dict[int, dict[str, list[float]]] = {}
    hooks: dict[str, list[float]] = {}
    order = random.Random(0)
    try:
        for name in args.settings:  # pays for what is set up once
            workers[name].ask(questions=pool[:1], users=1, max_tokens=args.max_tokens)
        for users in args.users:
            rates[users] = {name: [] for name in args.settings}
            for repeat in range(-args.settle, args.repeats):  # the first ones let the pace settle at this load
                asked = order.sample(pool * (1 + args.rounds * users // len(pool)), args.rounds * users)
                for name in order.sample(list(args.settings), len(args.settings)):
                    done = workers[name].ask(questions=asked, users=users, max_tokens=args.max_tokens)
                    if repeat >= 0:
                        rates[users][name].append(done["rate"])
                print(f"{users} users, repeat {repeat + 1}", file=sys.stderr, flush=True)
            yield {"rates": rates, "hook_us": hooks}
        if args.hooks:
            asked = order.sample(pool * (1 + 2 * args.hook_users // len(pool)), args.hook_users)
            for name in [n for n in args.settings if SETTINGS[n][1]]:
                for _ in range(2):
                    done = workers[name].ask(questions=asked, users=args.hook_users, max_tokens=args.max_tokens)
                    hooks.setdefault(name, []).append(done["hook_us"])
            yield {"rates": rates, "hook_us": hooks}
    finally:
        for worker in workers.values():
            worker.close()


def ratio(rates: dict[str, list[float]], name: str, other: str, repeats: Sequence[int]) -> tuple[float, float, float]:
    """Median, least and greatest of one setting's rate over another's."""
    values = [rates[name][i] / rates[other][i] for i in repeats]
    return statistics.median(values), min(values), max(values)


def report(args: argparse.Namespace, found: dict[str, Any]) -> list[dict[str, Any]]:
    """Print a row for every number of users and setting; losing ones are marked."""
    rows = []
    print(f"{'users':>5}  {'setting':<18} {'tok/s':>8}  over none            over the best stock setting")
    for users, rates in found["rates"].items():
        every, stock = range(args.repeats), [n for n in args.settings if not SETTINGS[n][1]]
        even, odd = list(every)[::2], list(every)[1::2] or list(every)
        best = max(stock, key=lambda n: statistics.median(rates[n][i] for i in even))
        for name in args.settings:
            over_none = ratio(rates, name, "none", every)
            over_best = ratio(rates, name, best, odd)
            rows.append(
                {"users": users, "setting": name, "tokens_per_second": statistics.median(rates[name])}
                | {"over_none": over_none, "best_stock": best, "over_best_stock": over_best}
            )
            texts = [f"{m:.3f} [{low:.3f}, {high:.3f}]" for m, low, high in (over_none, over_best)]
            lost = "  loses" if over_none[0] < 0.99 else ""
            rate = rows[-1]["tokens_per_second"]
            print(f"{users:>5}  {name:<18} {rate:>8.1f}  {texts[0]:<20} {texts[1]} ({best}){lost}")
    for name, values in found["hook_us"].items():
        print(f"hooks at {args.hook_users} requests, {name}: {min(values):.0f} microseconds a step")
    return rows


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="a transformers folder")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--graphs", action="store_true", help="CUDA graphs and torch.compile (default: eager)")
    parser.add_argument("--engine", default="{}", metavar="JSON", help="more options of vLLM's LLM class")
    parser.add_argument("--max-num-seqs", type=int, default=64)
    parser.add_argument("--users", type=int, nargs="+", default=[1, 4, 8, 16])
    parser.add_argument("--rounds", type=int, default=2, help="questions of each user in a repeat")
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=4)
    parser.add_argument("--settle", type=int, default=1, help="repeats at every load that are not counted")
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS), choices=list(SETTINGS))
    parser.add_argument("--threading-layer", default="workqueue", help="Numba's, for n-gram drafts ('': its default)")
    parser.add_argument("--hooks", action="store_true", help="measure the time in Paceline's hooks")
    parser.add_argument("--hook-users", type=int, default=64)
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    if args.worker:
        work(json.loads(args.worker))
        return
    for found in measure(args):
        rows = report(args, found)
        if args.json:
            write(args, {"rows": rows, **found})


def write(args: argparse.Namespace, found: dict[str, Any]) -> None:
    """Keep what was found, with what it was measured on."""
    import torch

    from paceline.bench.host import host_info
    from paceline.cli.vllm_serve import vllm_version

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    about = {"vllm": vllm_version(), "model": Path(args.model).name, **host_info(args.dtype, device)}
    Path(args.json).write_text(json.dumps({**about, **found}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
