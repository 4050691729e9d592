"""What the scheduler tells the workers about requests."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Began:
    """A request begins, which the first block of its table names."""

    request: str
    block: int
    fork: str | None = None
    """The prefix that it begins from; None: from nothing."""


@dataclass(frozen=True)
class Ended:
    """A request has ended, was aborted, or was preempted and will begin anew."""

    request: str


@dataclass(frozen=True)
class KeepFork:
    """A prefix of a request is kept for others, once it has so many tokens."""

    request: str
    num_tokens: int
    fork: str


@dataclass(frozen=True)
class BecameFork:
    """A request has ended, and all that it has is kept for others."""

    request: str
    fork: str


@dataclass(frozen=True)
class DroppedFork:
    """A prefix is kept no longer."""

    fork: str


Event = Began | Ended | KeepFork | BecameFork | DroppedFork
