"""Wall-clock seconds of work on a device, for every benchmark of models."""

import time
from collections.abc import Callable, Sequence

import torch


def seconds_of(work: Callable[[], object], device: torch.device) -> float:
    """From an idle device to an idle device."""
    _wait_for(device)
    start = time.perf_counter()
    work()
    _wait_for(device)
    return time.perf_counter() - start


def seconds_in_turns(works: Sequence[Callable[[], object]], device: torch.device, first: int = 0) -> list[float]:
    """Seconds of each, measured one after the other from the `first` one on: what disturbs the machine hits all alike."""
    seconds = [0.0] * len(works)
    for place in range(len(works)):
        which = (place + first) % len(works)
        seconds[which] = seconds_of(works[which], device)
    return seconds


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
