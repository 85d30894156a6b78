"""State that drafters keep across requests: one value per tenant salt, a bounded number of them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Generic, TypeVar

from paceline.engine.request import Request

T = TypeVar("T")


class Tenants(Generic[T]):
    """Values by salt.

    Args:
        make: a value for a new tenant.
        most: values kept at most, except that tenants with running requests keep theirs; idle longest goes first.
    """

    def __init__(self, make: Callable[[], T], most: int) -> None:
        self._make = make
        self._most = most
        self._values: OrderedDict[str, T] = OrderedDict()
        self._running: set[Request] = set()

    def of(self, request: Request) -> T:
        """The value of a request's tenant, protected until `forget`."""
        self._running.add(request)
        salt = request.salt
        if salt not in self._values:
            self._values[salt] = self._make()
            if len(self._values) > self._most:
                self._evict()
        self._values.move_to_end(salt)
        return self._values[salt]

    def forget(self, request: Request) -> None:
        """The request no longer protects its tenant's value."""
        self._running.discard(request)

    def __len__(self) -> int:
        return len(self._values)

    def __contains__(self, salt: str) -> bool:
        return salt in self._values

    def _evict(self) -> None:
        busy = {request.salt for request in self._running}
        idle = next((salt for salt in self._values if salt not in busy), None)
        if idle is not None:
            del self._values[idle]
