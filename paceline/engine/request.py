"""The state of one request. Only the engine's commit and the scheduler change it; whoever drafts with the target itself
lets the block table grow, as the scheduler does for draft nodes."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from enum import StrEnum

from paceline.config import SamplingParams
from paceline.engine.constraint import Constraint
from paceline.engine.rng import Noise


class FinishReason(StrEnum):
    """Why a request ended."""

    STOP = "stop"
    """A stop token or stop string."""
    LENGTH = "length"
    """`max_tokens` or the model's context."""
    ABORT = "abort"
    """Cancelled by the caller."""
    ERROR = "error"
    """Something went wrong in this request; the message is in its output."""


@dataclass(slots=True)
class RequestStats:
    """Counters of one request. Times are seconds on the monotonic clock."""

    arrival: float = field(default_factory=time.perf_counter)
    scheduled: float | None = None
    """When it first left the queue."""
    first_token: float | None = None
    last_token: float | None = None
    first_count: int = 0
    """Tokens that the first committing step brought."""
    target_forwards: int = 0
    """Target forwards that committed tokens for this request."""
    draft_tokens: int = 0
    """Draft nodes verified."""
    accepted_tokens: int = 0
    accepted_by: dict[str, int] = field(default_factory=dict)
    """Accepted tokens by the drafter that guessed them."""
    drafted_by: dict[str, int] = field(default_factory=dict)
    """Verified draft nodes by the drafter that guessed them."""
    also_accepted_by: dict[str, int] = field(default_factory=dict)
    """Accepted tokens by further drafters that guessed the same."""
    also_drafted_by: dict[str, int] = field(default_factory=dict)
    """Verified draft nodes by further drafters that guessed the same."""
    accepted_counts: list[int] = field(default_factory=list)
    """`accepted_counts[j]`: forwards with draft nodes of which j were accepted."""
    longest_draft: int = 0
    """Most draft nodes verified in one forward."""
    cached_tokens: int = 0
    """Prompt tokens found in the prefix cache."""
    preemptions: int = 0
    target_transform: str | None = None
    """The declared target transform that the tokens were sampled from."""


@dataclass(eq=False, slots=True)
class Request:
    """One sequence: prompt and output tokens, its blocks, and how far its KV is computed.

    Invariant between steps: `num_computed < len(token_ids)`; the token at `len(token_ids) - 1` is the root.
    """

    id: str
    token_ids: list[int]
    prompt_len: int
    params: SamplingParams
    seed: int
    sample_index: int = 0
    secret: int | None = None
    """Key of the noise that no draft may depend on, set by the engine (`rng.secret_seed`); None: the seed."""
    salt: str = ""
    prediction_ids: tuple[int, ...] = ()
    constraint: Constraint | None = None
    """What `params.structured` still allows; it moves with every committed token."""
    leader: Request | None = None
    """A sibling with the same prompt whose KV this one waits for."""
    num_computed: int = 0
    in_flight: int = 0
    """Tokens up to the end of a step behind the one that is collected, draft nodes included: their blocks stay."""
    blocks: list[int] = field(default_factory=list)
    block_hashes: list[bytes] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    stats: RequestStats = field(default_factory=RequestStats)

    @property
    def noise(self) -> Noise:
        """A function of the seed: what the target draws with."""
        return Noise(self.seed, self.sample_index)

    @property
    def secret_noise(self) -> Noise:
        """What rules that weigh drafts decide with, and drafters draw with under them."""
        return Noise(self.seed if self.secret is None else self.secret, self.sample_index)

    @property
    def num_output(self) -> int:
        """Tokens generated so far."""
        return len(self.token_ids) - self.prompt_len

    @property
    def output_ids(self) -> list[int]:
        """The generated tokens."""
        return self.token_ids[self.prompt_len :]

    @property
    def finished(self) -> bool:
        """Whether no more tokens will come."""
        return self.finish_reason is not None
