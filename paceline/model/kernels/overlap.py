"""Kernels that begin while the one before them ends (programmatic dependent launch, Hopper and later).

A launch costs half a microsecond or more in which the GPU is idle, which is a fifth of a small product. A kernel
started with `launch_options(True)` takes its place early, does what needs no input, and then must call
`wait_for_inputs` before it reads or writes anything that kernels before it touch. Since some program of every kernel
waits, the end of the last kernel is the end of all of them.

The next kernel takes its place once all programs of this one called `let_next_begin`. A large kernel does that when its
work is nearly done: programs that wait crowd on the processors that happen to be free, and stay there (a layer of an
8B-class model took 151 microseconds instead of 123 when its products called it first).
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl


@triton.jit
def wait_for_inputs():
    """Wait until the results of all kernels before this one can be read."""
    tl.extra.cuda.gdc_wait()


@triton.jit
def let_next_begin():
    """This program does not mind if the next kernel's programs take their places."""
    tl.extra.cuda.gdc_launch_dependents()


def launch_options(overlap: bool) -> dict[str, Any]:
    """What to launch a kernel with that may overlap."""
    return {"launch_pdl": True} if overlap else {}
