"""Raw requests against `paceline serve`: whatever comes in, no 5xx but 503, nothing left behind.

    python benchmarks/server_fuzz.py --model smollm2-135m --requests 100000 --seed 1

Starts the server itself, on the loopback interface. Valid requests, mutated bodies, random bytes, broken HTTP,
truncated bodies, odd headers, pipelines, clients that leave early; the same ones for the same seed. The table at the
end says how often there was each status, and what is left: KV blocks, requests, files, memory. Exit code 1 if a rule
was broken.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import re
import sys
import time
from collections import Counter

from fuzz_requests import Attempt, attempt
from server_process import ServerProcess, print_table

_STATUS = re.compile(rb"HTTP/1\.1 (\d{3}) ")
_SETTLED = 4
"""Memory is compared with what it was after this tenth; before, caches fill and the allocator settles."""
_MOST_BYTES = 4 << 20


class Fuzz:
    """One run.

    Args:
        server: who is asked.
        seed: of all requests.
        clients: connections at a time.
    """

    def __init__(self, server: ServerProcess, seed: int, clients: int) -> None:
        self.server = server
        self.seed = seed
        self.clients = clients
        self.statuses: Counter[str] = Counter()
        self.kinds: Counter[str] = Counter()
        self.faults: list[str] = []

    async def run(self, numbers: range) -> None:
        """Send the requests of these numbers."""
        waiting = iter(numbers)

        async def client() -> None:
            for number in waiting:
                if len(self.faults) < 20:
                    await self._one(number)

        await asyncio.gather(*(client() for _ in range(self.clients)))

    async def _one(self, number: int) -> None:
        sent = attempt(self.seed, number)
        self.kinds[sent.kind] += 1
        try:
            answer = await asyncio.wait_for(self._talk(sent), 60)
        except TimeoutError:
            answer = b""
            self.faults.append(f"#{number} ({sent.kind}): no answer in 60 s")
        except OSError as error:
            answer = b""
            if not self.server.alive:
                self.faults.append(f"#{number} ({sent.kind}): the server is gone: {error}")
        found = _STATUS.findall(answer)
        self.statuses.update(status.decode() for status in found)
        if not found:
            self.statuses["no answer"] += 1
            if sent.answered:
                self.faults.append(f"#{number} ({sent.kind}): no answer")
        for status in found:
            if status >= b"500" and status != b"503":
                self.faults.append(f"#{number} ({sent.kind}): {status.decode()} {answer[-200:]!r}")
        bodiless = sent.data.startswith(b"HEAD ") or (sent.leaves is not None and answer.endswith(b"\r\n\r\n"))
        if found and found[-1].startswith(b"4") and b'"error":' not in answer and not bodiless:
            self.faults.append(f"#{number} ({sent.kind}): not OpenAI's shape: {answer[-200:]!r}")

    async def _talk(self, sent: Attempt) -> bytes:
        reader, writer = await asyncio.open_connection(self.server.host, self.server.port)
        answer = bytearray()
        try:
            with contextlib.suppress(ConnectionError):
                writer.write(sent.data)
                if sent.leaves != 0.0:
                    async with asyncio.timeout(sent.leaves):
                        await writer.drain()
                        while (piece := await reader.read(65536)) and len(answer) < _MOST_BYTES:
                            answer += piece
        except TimeoutError:
            pass
        finally:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()
        return bytes(answer)


def main() -> int:
    """Run, print, judge."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--requests", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--most-growth-mb", type=float, default=64.0, help="of memory, in the second half")
    args = parser.parse_args()
    flags = "--max-model-len 64 --max-num-seqs 8 --max-queued-requests 64 --grammar-timeout 1 --log-level error"
    server = ServerProcess(args.model, [*flags.split(), "--num-threads", "1", "--kv-cache-memory", "64MiB"])
    started = time.monotonic()
    fuzz = Fuzz(server, args.seed, args.clients)
    seen: list[tuple[float, int]] = []
    for tenth in range(10):
        asyncio.run(fuzz.run(range(args.requests * tenth // 10, args.requests * (tenth + 1) // 10)))
        server.wait_idle()
        if server.alive:
            seen.append((server.rss_mb(), server.open_files()))
    return report(fuzz, args.most_growth_mb, seen, time.monotonic() - started)


def report(fuzz: Fuzz, most_growth: float, seen: list[tuple[float, int]], seconds: float) -> int:
    """Print the table; the exit code.

    Args:
        fuzz: the run.
        most_growth: megabytes from the first settled tenth to the last one.
        seen: memory and open files after each tenth.
        seconds: how long it took.
    """
    server, faults = fuzz.server, list(fuzz.faults)
    gauges = server.wait_idle() if server.alive else {}
    health = server.get("/health")[0] if server.alive else 0
    before, after = (seen[_SETTLED], seen[-1]) if len(seen) == 10 else ((float("nan"), 0), (float("nan"), 0))
    code = server.stop()
    checks = {
        "the server died": health != 200,
        "blocks or requests are left": any(gauges.values()),
        "connections are left": after[1] - before[1] > 5,
        "memory grew": not after[0] - before[0] <= most_growth,
        "the server wrote stack traces": server.traces > 0,
        "the server did not exit with 0": code != 0,
    }
    faults += [name for name, broken in checks.items() if broken]
    rows: list[tuple[str, object]] = [(f"sent: {kind}", count) for kind, count in sorted(fuzz.kinds.items())]
    rows += [("sent: all", sum(fuzz.kinds.values())), ("seconds", seconds)]
    rows += [(f"status {status}", count) for status, count in sorted(fuzz.statuses.items())]
    other = sum(n for status, n in fuzz.statuses.items() if status.startswith("5") and status != "503")
    rows += [("5xx other than 503", other), *((name, value) for name, value in gauges.items())]
    rows += [("RSS MB after each tenth", " ".join(f"{memory:.0f}" for memory, _ in seen))]
    rows += [("open files before, after", f"{before[1]}, {after[1]}"), ("stack traces", server.traces)]
    rows += [("exit code of the server", code), ("faults", len(faults))]
    for fault in faults:
        print(f"FAULT {fault}", file=sys.stderr)
    if server.traces:
        print("".join(server.last_lines), file=sys.stderr)
    print_table(rows)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
