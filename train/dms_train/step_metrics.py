"""The numbers of an optimizer step: summed over micro-batches, added up over processes, and written to metrics.jsonl.

Letters: L layers with gates, H KV heads.
"""

from dataclasses import dataclass
from itertools import islice

import torch

from dms_train.step import StepOutput


@dataclass(frozen=True)
class StepTotals:
    """An optimizer step over all micro-batches and processes."""

    kl: float
    compression: float
    evicted: float
    """Evict decisions, of `decided`: over sequences, tokens, heads and layers."""
    decided: float
    trial: float
    """What losses under trial add to the loss."""
    stops: bool
    """Whether any process got a signal to stop."""
    waited: list[float]
    """By process: seconds that it waited for data."""
    plan_marks: list[float]
    """By process: the number of the data plan that it follows; all are equal where all read the same data."""
    head_rate_LH: torch.Tensor
    """Share evicted per layer and head, averaged over micro-batches and processes."""


# Fields of StepOutput that add up over micro-batches and processes.
_SUMMED = ("kl", "compression", "evicted", "decided", "trial")


class StepSums:
    """One process's share of `StepTotals`. Packed into one tensor, so that a step needs a single all-reduce of its results."""

    def __init__(self, *, rank: int, num_processes: int, num_micro_batches: int, device: torch.device | str):
        self.rank, self.num_processes, self.num_micro_batches = rank, num_processes, num_micro_batches
        self.summed = torch.zeros(len(_SUMMED), device=device)
        self.head_rate_LH = torch.zeros((), device=device)

    def add(self, output: StepOutput) -> None:
        """Add a micro-batch."""
        self.summed += torch.stack([getattr(output, name) for name in _SUMMED]).float()
        self.head_rate_LH = self.head_rate_LH + output.head_rate_LH / self.num_micro_batches

    def pack(self, *, stops: bool, waited: float, plan_mark: int) -> torch.Tensor:
        """A vector; the sum of all processes' vectors goes to `unpack`."""
        stop = torch.tensor([float(stops)])
        # Each process has a place of its own, where all others add 0.
        by_process = torch.zeros(2, self.num_processes)
        by_process[:, self.rank] = torch.tensor([waited, float(plan_mark)])
        host = torch.cat([stop, by_process.flatten()]).to(self.summed.device)
        return torch.cat([self.summed, host, self.head_rate_LH.flatten().float()])

    def unpack(self, packed: torch.Tensor) -> StepTotals:
        num_rates = self.head_rate_LH.numel()
        numbers = iter(packed[: len(packed) - num_rates].tolist())
        summed = {name: next(numbers) for name in _SUMMED}
        return StepTotals(
            **summed,
            stops=next(numbers) > 0,
            waited=list(islice(numbers, self.num_processes)),
            plan_marks=list(islice(numbers, self.num_processes)),
            head_rate_LH=packed[len(packed) - num_rates :].view_as(self.head_rate_LH) / self.num_processes,
        )


@dataclass(frozen=True)
class StepMetrics:
    """A line of metrics.jsonl; the fields are its keys."""

    step: int
    loss: float
    kl: float | None
    """None in a step of `trial.warm_start`, whose loss is of labels."""
    compression_loss: float
    target: float
    """The share of decisions that should evict."""
    target_cr: float
    """The same as a compression ratio, by the schedule."""
    cr_decided: float
    lr: float
    grad_norm: float
    tokens: int
    """Tokens that are not padding, since the run began."""
    tokens_per_second: float
    seconds: float
    data_wait_ms: float
    """The longest that a process waited for data."""
    cost_balance: float
    """Work of the busiest rank over the mean."""
    padding: float
    """Share of the step's tokens."""
    documents: dict[str, int]
    """What became of the documents that were read so far."""
