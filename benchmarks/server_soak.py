"""Load at twice capacity for minutes: mixed options, a fifth of the clients leave, some read slowly.

    python benchmarks/server_soak.py --model smollm2-135m --minutes 10 --json soak.json

Twice as many clients as the server may run samples ask again as soon as they have been answered, so its queue is
never empty. Every accepted request must end complete or by its client's leaving; at the end no KV block is held, memory
has not grown, and /health, asked ten times a second from another process, took less than 100 ms in 99 of 100 cases.
Exit code 1 otherwise.
"""

from __future__ import annotations

import argparse
import asyncio
import http.client
import json
import multiprocessing
import random
import statistics
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from server_process import ServerProcess, print_table
from soak_requests import Outcome, client, judge, make, talk

_PROBES_A_SECOND = 10


def probe(host: str, port: int, link: Connection) -> None:
    """Ask /health until told to stop, in a process of its own; send the seconds that each answer took."""
    taken: list[float] = []
    failed = 0
    while not link.poll(1 / _PROBES_A_SECOND):
        started = time.perf_counter()
        connection = http.client.HTTPConnection(host, port, timeout=10)
        try:
            connection.request("GET", "/health")
            failed += connection.getresponse().status != 200
        except OSError:
            failed += 1
        finally:
            connection.close()
        taken.append(time.perf_counter() - started)
    link.send((taken, failed))


async def load(server: ServerProcess, args: argparse.Namespace, outcome: Outcome, memory: list[float]) -> None:
    """All clients until the time is over."""
    end = time.monotonic() + args.minutes * 60

    async def one(number: int) -> None:
        rng = random.Random(f"{args.seed}:{number}")
        while time.monotonic() < end and len(outcome.faults) < 20:
            path, body = make(rng, args.max_tokens)
            how = client(rng, args.aborts)
            outcome.sent += 1
            started = time.monotonic()
            try:
                status, answer = await asyncio.wait_for(talk(server.host, server.port, path, body, how), 300)
            except (OSError, TimeoutError) as error:
                outcome.faults.append(f"{type(error).__name__}: {body}")
                continue
            judge(outcome, body, status, answer)
            if status == 200:
                outcome.seconds.append(time.monotonic() - started)
            if status == 503:
                await asyncio.sleep(0.2)

    async def watch() -> None:
        while time.monotonic() < end:
            memory.append(server.rss_mb())
            await asyncio.sleep(min(1.0, args.minutes * 6))

    await asyncio.gather(watch(), *(one(number) for number in range(2 * args.max_num_seqs)))


def verdict(args: argparse.Namespace, server: ServerProcess, outcome: Outcome, seen: dict[str, Any]) -> dict[str, Any]:
    """All figures, with the rules that were broken under `faults`."""
    taken, failed = seen["probes"]
    memory: list[float] = seen["memory"]
    settled = memory[len(memory) // 3 :] or [float("nan")]
    growth = statistics.mean(settled[-max(1, len(settled) // 4) :]) - statistics.mean(
        settled[: max(1, len(settled) // 4)]
    )
    p99 = statistics.quantiles(taken, n=100)[98] * 1000 if len(taken) > 2 else float("nan")
    gauges = seen["gauges"]
    ended = outcome.completed + outcome.aborted + outcome.busy + outcome.too_long
    checks = {
        "requests neither completed nor were aborted by their clients": bool(outcome.faults),
        "not every request is accounted for": ended != outcome.sent and not outcome.faults,
        "blocks or requests are left": any(gauges.values()),
        "memory grew": growth > args.most_growth_mb,
        "/health failed": failed > 0,
        "/health was slow": not p99 < args.health_ms,
        "the server wrote stack traces": server.traces > 0,
        "the server did not exit with 0": seen["code"] != 0,
    }
    ordered = sorted(outcome.seconds)
    return {
        "minutes": args.minutes,
        "clients": 2 * args.max_num_seqs,
        "max_num_seqs": args.max_num_seqs,
        "sent": outcome.sent,
        "completed": outcome.completed,
        "aborted by clients": outcome.aborted,
        "refused with 503": outcome.busy,
        "refused as too long": outcome.too_long,
        "output tokens": outcome.tokens,
        "seconds per request, median": ordered[len(ordered) // 2] if ordered else None,
        "health probes": len(taken),
        "health p50 ms": statistics.median(taken) * 1000 if taken else None,
        "health p99 ms": p99,
        "health max ms": max(taken, default=0.0) * 1000,
        "RSS MB, ten samples": [round(memory[len(memory) * i // 10], 1) for i in range(10)] if memory else None,
        "RSS growth MB": growth,
        **gauges,
        "exit code of the server": seen["code"],
        "faults": [*outcome.faults[:20], *(name for name, broken in checks.items() if broken)],
    }


def main() -> int:
    """Run, print, judge."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--max-num-seqs", type=int, default=4, help="what the server runs; twice as many clients ask")
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--aborts", type=float, default=0.2, help="share of clients that leave")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--num-threads", type=int, default=1)
    # Without a limit, memory rises until every page of a large KV pool has been touched once.
    parser.add_argument("--kv-cache-memory", default="128MiB")
    parser.add_argument("--health-ms", type=float, default=100.0)
    parser.add_argument("--most-growth-mb", type=float, default=32.0, help="from the first to the last settled quarter")
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    flags = ["--max-num-seqs", str(args.max_num_seqs), "--num-threads", str(args.num_threads), "--log-level", "error"]
    flags += ["--kv-cache-memory", args.kv_cache_memory]
    server = ServerProcess(args.model, [*flags, "--max-model-len", "512", "--max-queued-requests", "64"])
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    prober = context.Process(target=probe, args=(server.host, server.port, theirs), daemon=True)
    outcome, memory = Outcome(), []
    prober.start()
    try:
        asyncio.run(load(server, args, outcome, memory))
        ours.send(True)
        probes = ours.recv()
        seen = {"probes": probes, "memory": memory, "gauges": server.wait_idle()}
    finally:
        prober.join(30)
        code = server.stop()
    found = verdict(args, server, outcome, {**seen, "code": code})
    print_table([(name, value) for name, value in found.items() if name != "faults"])
    for fault in found["faults"]:
        print(f"FAULT {fault}", file=sys.stderr)
    print(f"faults: {len(found['faults'])}")
    if args.json:
        Path(args.json).write_text(json.dumps(found, indent=1) + "\n")
    return 1 if found["faults"] else 0


if __name__ == "__main__":
    sys.exit(main())
