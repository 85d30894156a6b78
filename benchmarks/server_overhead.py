"""What HTTP costs: tokens per second through `paceline serve` against `LLM.generate`, and against another server.

    python benchmarks/server_overhead.py --json benchmarks/cpu/server_overhead.json
    python benchmarks/server_overhead.py --other http://127.0.0.1:8001 --other-name "vLLM 0.32.0 (CPU)" --other-model ID

Three processes take turns on the same prompts, so that only one works at a time: an `LLM` in a process of its own, a
`paceline serve`, and the other server if there is one. The client is raw asyncio and streams, one connection per
user, the same for both servers. Greedy, `ignore_eos`, prefix caching off in both of ours; every repeat asks in another
order. Ratios are medians over repeats with their range.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from paceline.bench.host import host_info

QUESTIONS = Path(__file__).parent.parent / "paceline" / "bench" / "questions.jsonl"
_OFFLINE = """
import json, sys
from paceline import LLM, SamplingParams
model, dtype, speculation, threads = sys.argv[1:]
threads = int(threads) or None
llm = LLM(model, dtype=dtype, speculation=speculation, enable_prefix_caching=False, num_threads=threads)
print("ready", flush=True)
for line in sys.stdin:
    job = json.loads(line)
    params = SamplingParams(temperature=0, max_tokens=job["max_tokens"], ignore_eos=True)
    done = llm.chat([[{"role": "user", "content": q}] for q in job["questions"]], params)
    print(json.dumps(sum(len(g.token_ids) for g in done)), flush=True)
"""


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--speculation", default="none")
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--users", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--num-threads", type=int, default=0, help="of both (default: each its own default)")
    parser.add_argument("--port", type=int, default=8411)
    parser.add_argument("--other", metavar="URL", help="base address of another OpenAI server of the same model")
    parser.add_argument("--other-name", default="other")
    parser.add_argument("--other-model", help="the model's name there")
    parser.add_argument("--json", help="write the result here")
    args = parser.parse_args()

    questions = [json.loads(line)["turns"][0] for line in QUESTIONS.read_text().splitlines()]
    offline = start_offline(args)
    server = start_server(args)
    try:
        sides = {
            "LLM.generate": lambda qs: ask_offline(offline, qs, args.max_tokens),
            "paceline serve": lambda qs: ask_server(f"127.0.0.1:{args.port}", args.model, qs, args.max_tokens),
        }
        if args.other:
            address, model = args.other.removeprefix("http://").rstrip("/"), args.other_model or args.model
            sides[args.other_name] = lambda qs: ask_server(address, model, qs, args.max_tokens)
        rows = [measure(sides, questions, users, args.repeats) for users in args.users]
    finally:
        server.terminate()
        offline.stdin.close()
        server.wait(30)
        offline.wait(30)
    result = {
        "host": host_info(args.dtype, torch.device("cpu")),
        "settings": {name: value for name, value in vars(args).items() if name != "json"},
        "rows": rows,
    }
    print_table(rows)
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=2) + "\n")


def start_offline(args: argparse.Namespace) -> subprocess.Popen[str]:
    """A process that answers batches given on its stdin."""
    command = [sys.executable, "-c", _OFFLINE, args.model, args.dtype, args.speculation, str(args.num_threads)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline().strip() == "ready", "the offline engine did not start"
    return process


def start_server(args: argparse.Namespace) -> subprocess.Popen[bytes]:
    """`paceline serve`, ready."""
    command = [sys.executable, "-m", "paceline", "serve", args.model, "--port", str(args.port), "--dtype", args.dtype]
    if args.num_threads:
        command += ["--num-threads", str(args.num_threads)]
    command += ["--speculation", args.speculation, "--log-level", "warning", "--no-enable-prefix-caching"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PACELINE_API")}
    process = subprocess.Popen(command, env=environment)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{args.port}/ready", timeout=1):
                return process
        except OSError:
            time.sleep(0.2)
    raise SystemExit("paceline serve did not start")


def ask_offline(process: subprocess.Popen[str], questions: Sequence[str], max_tokens: int) -> int:
    """Tokens generated for one batch."""
    process.stdin.write(json.dumps({"questions": list(questions), "max_tokens": max_tokens}) + "\n")
    process.stdin.flush()
    return int(process.stdout.readline())


def ask_server(address: str, model: str, questions: Sequence[str], max_tokens: int) -> int:
    """Tokens generated for one batch of concurrent streams."""

    async def all_of_them() -> int:
        return sum(await asyncio.gather(*(stream(address, model, q, max_tokens) for q in questions)))

    return asyncio.run(all_of_them())


async def stream(address: str, model: str, question: str, max_tokens: int) -> int:
    """One streamed answer over a bare socket; the token count of its usage."""
    host, port = address.split(":")
    body = {
        "model": model,
        "messages": [{"role": "user", "content": question}],
        "max_tokens": max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    payload = json.dumps(body).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: {address}\r\ncontent-type: application/json\r\n"
    reader, writer = await asyncio.open_connection(host, int(port), limit=1 << 20)
    writer.write(head.encode() + b"connection: close\r\ncontent-length: %d\r\n\r\n" % len(payload) + payload)
    tokens = 0
    try:
        async for line in reader:
            if b'"usage":{' in line.replace(b" ", b""):
                tokens = json.loads(line[line.index(b"{") :])["usage"]["completion_tokens"]
    finally:
        writer.close()
    if not tokens:
        raise SystemExit(f"{address} did not answer with a usage")
    return tokens


def measure(
    sides: dict[str, Callable[[Sequence[str]], int]], questions: Sequence[str], users: int, repeats: int
) -> dict[str, Any]:
    """Tokens per second of every side, repeat by repeat, taking turns."""
    rates: dict[str, list[float]] = {name: [] for name in sides}
    for name in sides:  # warm up
        sides[name](questions[:users])
    for repeat in range(repeats):
        order = list(sides)
        random.Random(repeat).shuffle(order)
        start = repeat * users % len(questions)
        batch = [questions[(start + i) % len(questions)] for i in range(users)]
        for name in order:
            started = time.perf_counter()
            tokens = sides[name](batch)
            rates[name].append(tokens / (time.perf_counter() - started))
    base, mine = rates["LLM.generate"], rates["paceline serve"]
    row: dict[str, Any] = {"users": users, "tokens_per_second": rates, "over_generate": ratio(mine, base)}
    for name in sides:
        if name not in ("LLM.generate", "paceline serve"):
            row[f"over {name}"] = ratio(mine, rates[name])
    return row


def ratio(mine: Sequence[float], base: Sequence[float]) -> dict[str, float]:
    """Median and range of the repeats' ratios."""
    found = sorted(a / b for a, b in zip(mine, base, strict=True))
    return {"median": statistics.median(found), "low": found[0], "high": found[-1]}


def print_table(rows: Sequence[dict[str, Any]]) -> None:
    """One line per number of users."""
    for row in rows:
        rates = ", ".join(f"{name} {statistics.median(v):.1f}" for name, v in row["tokens_per_second"].items())
        ratios = ", ".join(
            f"{name.replace('_', ' ')} {r['median']:.3f} [{r['low']:.3f}, {r['high']:.3f}]"
            for name, r in row.items()
            if isinstance(r, dict) and "median" in r
        )
        print(f"{row['users']} user(s): tokens/s {rates}; {ratios}")


if __name__ == "__main__":
    main()
