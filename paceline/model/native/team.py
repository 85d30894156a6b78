"""Threads that work on one step together, and the barrier at which they wait for each other.

A step is one call for each thread; within it they meet at several hundred barriers, so they wait by looking, and let
others run when that takes long.
"""

from __future__ import annotations

import ctypes
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import njit
from numba.core import cgutils, types
from numba.extending import intrinsic

from paceline.model.native.vectors import I32, I64

_PATIENCE = 20000
"""Looks at the barrier before a thread lets others run."""
CAN_SHARE = sys.platform != "win32"
"""Whether there is a way to let others run."""


@intrinsic
def _add(typing_context: Any, place: Any, number: Any) -> Any:  # noqa: ARG001
    """Add to an integer at an address at once, for all threads to see; what was there before."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:  # noqa: ARG001
        place = builder.inttoptr(arguments[0], I64.as_pointer())
        return builder.atomic_rmw("add", place, arguments[1], "seq_cst")

    return types.int64(types.uintp, types.int64), generate


@intrinsic
def _look(typing_context: Any, place: Any) -> Any:  # noqa: ARG001
    """The integer at an address, as other threads left it."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:  # noqa: ARG001
        return builder.load_atomic(builder.inttoptr(arguments[0], I64.as_pointer()), "seq_cst", 8)

    return types.int64(types.uintp), generate


@intrinsic
def _let_others_run(typing_context: Any) -> Any:  # noqa: ARG001
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:  # noqa: ARG001
        if CAN_SHARE:
            builder.call(cgutils.get_or_insert_function(builder.module, ir.FunctionType(I32, []), "sched_yield"), [])
        return context.get_dummy_value()

    return types.void(), generate


@njit(nogil=True, error_model="numpy")
def meet(place: int, threads: int, round_: int) -> int:
    """Wait until all threads have come here.

    Args:
        place: address of an integer that all share, 0 before the first meeting.
        threads: how many meet.
        round_: meetings before this one.

    Returns:
        Meetings so far.
    """
    if threads > 1:
        wanted = (round_ + 1) * threads
        _add(place, 1)
        looks = 0
        while _look(place) < wanted:
            looks += 1
            if looks > _PATIENCE:
                _let_others_run()
    return round_ + 1


@njit(nogil=True, error_model="numpy")
def _give_up(place: int) -> None:
    """Let everybody through all barriers."""
    _add(place, 1 << 40)


class Team:
    """Runs a native function on several threads at once; the caller's is the first of them.

    The threads are PyTorch's own where they can be had (OpenMP's, through `GOMP_parallel`): those keep looking for work
    for milliseconds after an operation of PyTorch, and would take the cores from any others.

    Args:
        threads: how many.
    """

    def __init__(self, threads: int) -> None:
        self.threads = threads if CAN_SHARE else 1
        self._counter = np.zeros(1, dtype=np.int64)
        self._openmp = _openmp() if self.threads > 1 else None
        self._pool: ThreadPoolExecutor | None = None
        if self.threads > 1 and self._openmp is None:
            self._pool = ThreadPoolExecutor(self.threads - 1, "paceline-forward")
        self._lock = threading.Lock()

    def run(self, function: Callable[[int, int, int], None]) -> None:
        """Call `function(thread, threads, address of the counter)` on every thread, and wait for all.

        Raises:
            BaseException: what a call raised. The others no longer wait for it, and their results are worth nothing.
        """
        errors: list[BaseException] = []

        def part(thread: int, threads: int) -> None:
            try:
                function(thread, threads, self._counter.ctypes.data)
            except BaseException as error:  # an interrupt, before native code began
                errors.append(error)
                _give_up(self._counter.ctypes.data)

        with self._lock:
            self._counter[0] = 0
            if self._openmp is not None:
                self._run_openmp(part, self._openmp)
            else:
                self._run_pool(part)
        if errors:
            raise errors[0]

    def _run_pool(self, part: Callable[[int, int], None]) -> None:
        others = []
        if self._pool is not None:
            others = [self._pool.submit(part, i, self.threads) for i in range(1, self.threads)]
        part(0, self.threads)
        for other in others:
            other.result()

    def _run_openmp(self, part: Callable[[int, int], None], openmp: ctypes.CDLL) -> None:
        def call(_: int | None) -> None:
            part(openmp.omp_get_thread_num(), openmp.omp_get_num_threads())

        openmp.GOMP_parallel(_PART(call), None, self.threads, 0)


_PART = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


@cache
def _openmp() -> ctypes.CDLL | None:
    """The OpenMP library that PyTorch has loaded, if it can run a function of ours."""
    folder = Path(torch.__file__).parent / "lib"
    for path in (path for name in ("libgomp*", "libiomp*", "libomp*") for path in sorted(folder.glob(name))):
        try:
            library = ctypes.CDLL(str(path))
            library.GOMP_parallel.argtypes = (_PART, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
            library.GOMP_parallel.restype = None
            library.omp_get_thread_num.restype = library.omp_get_num_threads.restype = ctypes.c_int
        except (OSError, AttributeError):
            continue
        return library
    return None


_teams: dict[int, Team] = {}


def team() -> Team:
    """The threads of this process, as many as PyTorch uses; forwards of several engines take turns."""
    threads = torch.get_num_threads()
    if threads not in _teams:
        _teams[threads] = Team(threads)
    return _teams[threads]
