"""A `paceline serve` process on this machine, for load tests: start, look at it from outside, stop."""

from __future__ import annotations

import http.client
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

_GAUGES = ("vllm:kv_cache_usage_perc", "vllm:num_requests_running", "vllm:num_requests_waiting")


class ServerProcess:
    """A server of its own, on a free port of the loopback interface.

    Args:
        model: what to serve.
        flags: further options of `paceline serve`.
    """

    host = "127.0.0.1"

    def __init__(self, model: str, flags: Sequence[str] = ()) -> None:
        with socket.socket() as free:
            free.bind((self.host, 0))
            self.port = int(free.getsockname()[1])
        place = ["--host", self.host, "--port", str(self.port)]
        command = [sys.executable, "-m", "paceline", "serve", model, *place, *flags]
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PACELINE_")}
        self._child = subprocess.Popen(
            command,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            env={**environment, "NO_COLOR": "1"},
        )
        self.pid = self._child.pid
        self.traces = 0
        """Stack traces that the server wrote."""
        self.last_lines: list[str] = []
        threading.Thread(target=self._read, daemon=True).start()
        deadline = time.monotonic() + 120
        while not self._answers():
            if not self.alive or time.monotonic() > deadline:
                self._child.kill()
                raise RuntimeError("the server did not start:\n" + "".join(self.last_lines))
            time.sleep(0.1)

    def _answers(self) -> bool:
        try:
            return self.get("/ready", 2.0)[0] == 200
        except OSError:
            return False

    def _read(self) -> None:
        assert self._child.stderr is not None
        for line in self._child.stderr:
            self.traces += line.startswith("Traceback") or "| Traceback" in line
            self.last_lines = [*self.last_lines[-200:], line]

    @property
    def alive(self) -> bool:
        """Whether the process runs."""
        return self._child.poll() is None

    def get(self, path: str, timeout: float = 10.0) -> tuple[int, str]:
        """Status and text of a route."""
        connection = http.client.HTTPConnection(self.host, self.port, timeout=timeout)
        try:
            connection.request("GET", path)
            response = connection.getresponse()
            return response.status, response.read().decode()
        finally:
            connection.close()

    def gauges(self) -> dict[str, float]:
        """KV usage, running and waiting requests, as /metrics says."""
        text = self.get("/metrics")[1]
        found = {name: re.search(rf"^{name}(?:\{{.*\}})? (\S+)$", text, re.MULTILINE) for name in _GAUGES}
        return {name: float(match[1]) if match else float("nan") for name, match in found.items()}

    def wait_idle(self, seconds: float = 60.0) -> dict[str, float]:
        """The gauges once they are all zero, or when the time is over."""
        deadline = time.monotonic() + seconds
        while any(self.gauges().values()) and time.monotonic() < deadline:
            time.sleep(0.2)
        return self.gauges()

    def rss_mb(self) -> float:
        """Resident memory of the process, without its grammar compiler's."""
        found = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{self.pid}/status").read_text())
        return int(found[1]) / 1024 if found else float("nan")

    def open_files(self) -> int:
        """Open files and sockets of the process."""
        return len(os.listdir(f"/proc/{self.pid}/fd"))

    def stop(self) -> int:
        """Ask it to drain; its exit code."""
        if self.alive:
            self._child.send_signal(signal.SIGTERM)
        try:
            return self._child.wait(60)
        except subprocess.TimeoutExpired:
            self._child.kill()
            return self._child.wait()
        finally:
            assert self._child.stderr is not None
            self._child.stderr.close()


def print_table(rows: Sequence[tuple[str, object]]) -> None:
    """Two columns."""
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"{name:<{width}}  {f'{value:.1f}' if isinstance(value, float) else value}")
