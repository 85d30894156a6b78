"""Everything Paceline raises on purpose, in one tree.

PacelineError
├── InputError                  the caller can fix it: the command line exits with 2
│   ├── ConfigError             an engine option, named by `field`
│   │   └── SpeculationSpecError   a `--speculation` value that cannot be read
│   ├── RequestError            one request, named by `field`; other requests are not affected
│   │   ├── SamplingParamsError
│   │   └── PromptTooLongError
│   └── ModelError              a model that cannot be used
│       ├── ModelNotFoundError
│       ├── UnsupportedModelError  an architecture, quantisation or adapter we cannot run
│       └── CorruptFileError       a truncated, damaged or foreign file
├── DownloadError               the network or the index failed: exits with 1
├── BusyError                   no room at the moment: try again
├── EngineDeadError             the engine stopped; restart it
├── LaneDiedError               who drafted or verified beside others is gone; without the draft a request goes on
└── RuleViolation               a draft that makes a false claim about how it was made (a bug in a drafter)

Every error carries `field` (which input is meant, or None) and `fix` (what to do about it, or None); `str(error)`
shows both.
"""

from __future__ import annotations


class PacelineError(Exception):
    """Base of all errors raised on purpose.

    Args:
        message: what is wrong, in one sentence.
        field: the option, request field or file that is meant.
        fix: the way out, in one sentence.
    """

    def __init__(self, message: str, *, field: str | None = None, fix: str | None = None) -> None:
        self.message = message
        self.field = field
        self.fix = fix
        prefix = f"{field}: " if field else ""
        suffix = f" {fix}" if fix else ""
        super().__init__(f"{prefix}{message}{suffix}")


class InputError(PacelineError):
    """Something the caller gave is wrong and can be corrected."""


class ConfigError(InputError):
    """An engine option is impossible or unknown."""


class SpeculationSpecError(ConfigError):
    """A speculation spec (`ngram:max=4+recycling@auto`) cannot be read or combined."""


class RequestError(InputError):
    """One request cannot run; the engine and all other requests go on."""


class SamplingParamsError(RequestError):
    """A sampling option is out of range or contradicts another."""


class PromptTooLongError(RequestError):
    """The prompt leaves no room for a single new token."""


class ModelError(InputError):
    """A model cannot be used."""


class ModelNotFoundError(ModelError):
    """No such folder, file, built-in name or hub id."""


class UnsupportedModelError(ModelError):
    """The model exists but Paceline cannot run it; the message says why."""


class CorruptFileError(ModelError):
    """A file is truncated, damaged or not what its name says."""


class DownloadError(PacelineError):
    """The package index or the hub could not be reached or answered with an error."""


class BusyError(PacelineError):
    """There is no room for this request at the moment; the same request may succeed later."""


class EngineDeadError(PacelineError):
    """The engine loop has ended and takes no more requests."""


class LaneDiedError(PacelineError):
    """A lane (a thread or stream that drafts or verifies beside others) ended while its work was wanted."""


class RuleViolation(PacelineError):
    """A draft claims to be sampled (or chosen) and is not; verifying it would bias the output."""
