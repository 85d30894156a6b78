"""How many samples may be in the house: those that run and a bounded queue behind them."""

from __future__ import annotations

from paceline.server.errors import HTTPError


class Admission:
    """Counts samples from the moment a request arrives until its answer is sent. Used in the event loop only.

    Args:
        limit: most samples at once.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.open = 0
        self.draining = False
        """Whether new requests are refused because the server is about to stop."""

    def check(self) -> None:
        """Refuse before any work is done.

        Raises:
            HTTPError: 503, the server is full or draining.
        """
        if self.draining:
            raise HTTPError(503, "the server is shutting down.", code="draining")
        if self.open >= self.limit:
            raise HTTPError(503, "too many requests are waiting.", fix="Try again in a moment.", code="queue_full")

    def enter(self) -> Ticket:
        """Count one sample.

        Raises:
            HTTPError: 503, see `check`.
        """
        self.check()
        self.open += 1
        return Ticket(self)


class Ticket:
    """One request's share of the limit."""

    def __init__(self, admission: Admission) -> None:
        self._admission = admission
        self._count = 1

    def extend(self, samples: int) -> None:
        """Count all samples of a request that turns out to have several.

        Raises:
            HTTPError: 400, it could never be run; 503, not now.
        """
        if samples > self._admission.limit:
            raise HTTPError(
                400,
                f"asks for {samples} samples at once, and the server takes {self._admission.limit}.",
                field="n",
                code="invalid_value",
            )
        more = samples - self._count
        if self._admission.open + more > self._admission.limit:
            raise HTTPError(503, "too many requests are waiting.", fix="Try again in a moment.", code="queue_full")
        self._admission.open += more
        self._count = samples

    def leave(self) -> None:
        """Give everything back; safe to call again."""
        self._admission.open -= self._count
        self._count = 0
