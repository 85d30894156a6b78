"""Keeps Python's collector of cyclic garbage from walking through a loaded model again and again.

A full collection visits every container in the process: with `torch`, a tokenizer and a model that is a pause of some
0.3 s, in which all requests wait, and it comes again whenever enough was made that lives on.
"""

from __future__ import annotations

import gc
import itertools
import weakref
from collections.abc import Callable

_owners = itertools.count()
_loaded: set[int] = set()


def leave_out_what_is_loaded(owner: object) -> Callable[[], object]:
    """Take everything that is alive now out of collections, until `owner` and all others like it have gone away or the
    results were called."""
    number = next(_owners)
    _loaded.add(number)
    gc.freeze()
    return weakref.finalize(owner, _let_go, number)


def _let_go(number: int) -> None:
    _loaded.discard(number)
    if not _loaded:
        gc.unfreeze()
