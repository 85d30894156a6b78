"""Threads that work on one step together, and the barrier at which they wait for each other.

A step is one call for each thread; within it they meet at several hundred barriers, so they wait by looking, and let
others run when that takes long.
"""

from __future__ import annotations

import ctypes
import sys
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import carray, njit
from numba.core import cgutils, types
from numba.extending import intrinsic

from paceline.compiled import address_of
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


@intrinsic
def _number_from(typing_context: Any, address: Any) -> Any:  # noqa: ARG001
    """What the C function `int f(void)` at an address says."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:  # noqa: ARG001
        function = builder.inttoptr(arguments[0], ir.FunctionType(I32, []).as_pointer())
        return builder.sext(builder.call(function, []), I64)

    return types.int64(types.int64), generate


@intrinsic
def _run_part(
    typing_context: Any,  # noqa: ARG001
    address: Any,  # noqa: ARG001
    thread: Any,  # noqa: ARG001
    threads: Any,  # noqa: ARG001
    place: Any,  # noqa: ARG001
    words: Any,  # noqa: ARG001
) -> Any:
    """Call a `PART` at an address."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:  # noqa: ARG001
        kind = ir.FunctionType(ir.VoidType(), [I64] * 3 + [I64.as_pointer()])
        function = builder.inttoptr(arguments[0], kind.as_pointer())
        builder.call(function, [*arguments[1:4], builder.inttoptr(arguments[4], I64.as_pointer())])
        return context.get_dummy_value()

    return types.void(*(types.int64,) * 5), generate


PART = "void(int64, int64, int64, CPointer(int64))"
"""What a team runs, as Numba's `cfunc` writes it: thread, threads, the address of the counter for `meet`, and the
caller's words."""
_FUNCTION, _WORDS, _COUNTER, _TICKET, _THREADS, _THREAD_NUMBER, _NUM_THREADS = range(7)


def _enter(call: Any) -> None:
    """Run one thread's part of a call: a row of the seven numbers above."""
    call = carray(call, (7,), np.int64)
    if call[_THREAD_NUMBER]:
        thread, threads = _number_from(call[_THREAD_NUMBER]), _number_from(call[_NUM_THREADS])
    else:
        thread, threads = _add(call.ctypes.data + 8 * _TICKET, 1), call[_THREADS]
    _run_part(call[_FUNCTION], thread, threads, call[_COUNTER], call[_WORDS])


class Team:
    """Runs a native function on several threads at once; the caller's is one of them.

    The threads are PyTorch's own where they can be had (OpenMP's, through `GOMP_parallel`): those keep looking for work
    for milliseconds after an operation of PyTorch, and would take the cores from any others. No thread but the caller's
    needs Python.

    Args:
        threads: how many.
    """

    def __init__(self, threads: int) -> None:
        self.threads = threads if CAN_SHARE else 1
        self._counter = np.zeros(1, dtype=np.int64)
        self._call = np.zeros(7, dtype=np.int64)
        self._entry = address_of(_enter, "void(CPointer(int64))")
        self._openmp = _openmp() if self.threads > 1 else None
        if self._openmp is not None:
            numbers = (self._openmp.omp_get_thread_num, self._openmp.omp_get_num_threads)
            self._call[_THREAD_NUMBER:] = [ctypes.cast(f, ctypes.c_void_p).value or 0 for f in numbers]
        self._enter = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(self._entry)
        self._pool: ThreadPoolExecutor | None = None
        if self.threads > 1 and self._openmp is None:
            self._pool = ThreadPoolExecutor(self.threads - 1, "paceline-forward")
        self._lock = threading.Lock()

    def run(self, part: int, words: np.ndarray) -> None:
        """Run a `PART` on every thread, and wait for all. Callers take turns, unless each is a team of its own.

        Args:
            part: its address.
            words: what it gets to read.  # int64, contiguous
        """
        if self.threads == 1:
            alone = np.array([part, words.ctypes.data, self._counter.ctypes.data, 0, 1, 0, 0], dtype=np.int64)
            self._enter(alone.ctypes.data)
            return
        with self._lock:
            self._counter[0] = 0
            call = (part, words.ctypes.data, self._counter.ctypes.data, 0, self.threads)
            self._call[:_THREAD_NUMBER] = call
            if self._openmp is not None:
                self._openmp.GOMP_parallel(self._entry, self._call.ctypes.data, self.threads, 0)
                return
            others: list[Future[None]] = []
            if self._pool is not None:
                others = [self._pool.submit(self._enter, self._call.ctypes.data) for _ in range(1, self.threads)]
            self._enter(self._call.ctypes.data)
            for other in others:
                other.result()


@cache
def _openmp() -> ctypes.CDLL | None:
    """The OpenMP library that PyTorch has loaded, if it can run a function of ours."""
    folder = Path(torch.__file__).parent / "lib"
    for path in (path for name in ("libgomp*", "libiomp*", "libomp*") for path in sorted(folder.glob(name))):
        try:
            library = ctypes.CDLL(str(path))
            library.GOMP_parallel.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
            library.GOMP_parallel.restype = None
            assert library.omp_get_thread_num
            assert library.omp_get_num_threads
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
