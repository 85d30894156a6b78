"""The engine's side of the compiler's process: started ahead, given one source at a time, killed when it is too slow.

It is a fresh interpreter and no fork, since the engine has threads; a plain child and not `multiprocessing`, whose
spawn would run the caller's main module again.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import weakref
from dataclasses import dataclass
from multiprocessing.connection import Connection

from paceline.constrain.schema import Problem

_START_SECONDS = 120.0
"""For importing xgrammar, which imports torch."""
_GRACE_SECONDS = 0.5
"""Beyond the limit, for the answer's way and the child's own alarm."""


@dataclass(frozen=True, slots=True)
class _Child:
    process: subprocess.Popen[bytes]
    link: Connection


class CompilerProcess:
    """Compiles in a child process. Not thread-safe: one source at a time.

    Args:
        tokenizer: xgrammar's tokenizer info, serialised.
        seconds: most time of one source; starting the process is not counted.
        memory: most bytes of one source.
    """

    def __init__(self, tokenizer: bytes, *, seconds: float, memory: int) -> None:
        self._tokenizer = tokenizer
        self._seconds = seconds
        self._memory = memory
        self._child: _Child | None = None
        self._ready = False
        self._closed = False

    def start(self) -> None:
        """Start the process, if none runs; returns before it is ready."""
        if self._closed:
            raise OSError("the process that compiles grammars has been closed")
        if self._child is not None and self._child.process.poll() is None:
            return
        self.close()
        ours, theirs = socket.socketpair()
        command = [sys.executable, "-P", "-m", "paceline.constrain.worker"]  # -P: no module of the working directory
        process = subprocess.Popen(
            [*command, str(theirs.fileno()), str(self._seconds), str(self._memory)],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(p or os.getcwd() for p in sys.path)},
        )
        theirs.close()
        self._child = _Child(process, Connection(ours.detach()))
        weakref.finalize(self, _end, self._child)
        self._ready = False
        with contextlib.suppress(ConnectionError):  # it may have died at once; `_wait_until_ready` will tell
            self._child.link.send_bytes(self._tokenizer)

    def compile(self, kind: str, text: str) -> bytes:
        """The compiled grammar, serialised.

        Raises:
            Problem: the source is refused, takes too long, needs too much memory or crashes the compiler.
            OSError: the process cannot be started.
        """
        self.start()
        self._wait_until_ready()
        assert self._child is not None, "start made one"
        self._child.link.send_bytes(json.dumps([kind, text]).encode())
        try:
            if not self._child.link.poll(self._seconds + _GRACE_SECONDS):
                raise self._gave_up(timed_out=True)
            answer = self._child.link.recv_bytes()
        except (EOFError, ConnectionError) as error:
            raise self._gave_up(timed_out=False) from error
        if answer[:1] == b"+":
            return answer[1:]
        message, fix = json.loads(answer[1:])
        raise Problem(message, fix)

    def close(self, *, forever: bool = False) -> None:
        """End the process; `forever`, from any thread, also while it compiles."""
        self._closed = self._closed or forever
        child = self._child
        if child is not None and forever:  # whoever waits for its answer still has the link, and reads its end
            child.process.kill()
            child.process.wait()
        elif child is not None:
            _end(child)
            self._child = None

    def _wait_until_ready(self) -> None:
        assert self._child is not None, "start made one"
        if self._ready:
            return
        try:
            self._ready = self._child.link.poll(_START_SECONDS) and self._child.link.recv_bytes() == b"ready"
        except (EOFError, ConnectionError):
            self._ready = False
        if not self._ready:
            self.close()
            raise OSError("the process that compiles grammars does not start")

    def _gave_up(self, *, timed_out: bool) -> Problem:
        """Why there is no answer. The next process is started at once, so that it is ready sooner."""
        assert self._child is not None, "start made one"
        if self._closed:
            raise OSError("the process that compiles grammars has been closed")
        if not timed_out:
            timed_out = self._child.process.wait() == -signal.SIGALRM
        self.close()
        self.start()
        if timed_out:
            return Problem(f"took more than {self._seconds:g} s to compile.", "Simplify it.")
        return Problem(f"needs more than {self._memory >> 20} MiB to compile, or crashes the compiler.", "Simplify it.")


def _end(child: _Child) -> None:
    child.link.close()
    child.process.kill()
    child.process.wait()
