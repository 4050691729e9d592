"""Put a retrofitted model under a policy of its own, and back."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from dms.retrofitting import set_mode
from dms.state import state_of


def operate(model: Any, policy: str, evict_bias: float | None) -> None:
    """Policy "dense", or "dms" with `evict_bias` (None: 0) added to every gate's logit."""
    set_mode(model, "dense" if policy == "dense" else "evict")
    state_of(model).evict_bias = evict_bias or 0.0


@contextmanager
def as_before(model: Any) -> Iterator[None]:
    """Mode and evict_bias are afterwards what they were."""
    state = state_of(model)
    mode, bias = state.mode, state.evict_bias
    try:
        yield
    finally:
        state.evict_bias = bias
        set_mode(model, mode)
