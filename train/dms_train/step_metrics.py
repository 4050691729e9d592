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
    """What decisions save, of `decided`, as the budget counts it: over sequences, tokens, heads and layers."""
    decided: float
    stops: bool
    """Whether any process got a signal to stop."""
    waited: list[float]
    """By process: seconds that it waited for data."""
    plan_marks: list[float]
    """By process: the number of the data plan that it follows; all are equal where all read the same data."""
    head_rate_LH: torch.Tensor
    """Share evicted per layer and head, averaged over micro-batches and processes."""
    class_rate_LHK: torch.Tensor | None = None
    """With several windows the share of tokens that leave by each, averaged likewise."""


# Fields of StepOutput that add up over micro-batches and processes.
_SUMMED = ("kl", "compression", "evicted", "decided")


class StepSums:
    """One process's share of `StepTotals`. Packed into one tensor, so that a step needs a single all-reduce of its results."""

    def __init__(self, *, rank: int, num_processes: int, num_micro_batches: int, device: torch.device | str):
        self.rank, self.num_processes, self.num_micro_batches = rank, num_processes, num_micro_batches
        self.summed = torch.zeros(len(_SUMMED), device=device)
        self.head_rate_LH = torch.zeros((), device=device)
        self.class_rate_LHK: torch.Tensor | None = None

    def add(self, output: StepOutput) -> None:
        """Add a micro-batch."""
        self.summed += torch.stack([getattr(output, name) for name in _SUMMED]).float()
        self.head_rate_LH = self.head_rate_LH + output.head_rate_LH / self.num_micro_batches
        if output.class_rate_LHK is not None:
            share = output.class_rate_LHK / self.num_micro_batches
            self.class_rate_LHK = share if self.class_rate_LHK is None else self.class_rate_LHK + share

    def pack(self, *, stops: bool, waited: float, plan_mark: int) -> torch.Tensor:
        """A vector; the sum of all processes' vectors goes to `unpack`."""
        stop = torch.tensor([float(stops)])
        # Each process has a place of its own, where all others add 0.
        by_process = torch.zeros(2, self.num_processes)
        by_process[:, self.rank] = torch.tensor([waited, float(plan_mark)])
        host = torch.cat([stop, by_process.flatten()]).to(self.summed.device)
        return torch.cat([self.summed, host, *(rates.flatten().float() for rates in self._rates())])

    def _rates(self) -> list[torch.Tensor]:
        return [self.head_rate_LH] if self.class_rate_LHK is None else [self.head_rate_LH, self.class_rate_LHK]

    def unpack(self, packed: torch.Tensor) -> StepTotals:
        rates = self._rates()
        sizes = [len(packed) - sum(one.numel() for one in rates), *(one.numel() for one in rates)]
        before, *means = (part / self.num_processes if place else part for place, part in enumerate(packed.split(sizes)))
        numbers = iter(before.tolist())
        summed = {name: next(numbers) for name in _SUMMED}
        return StepTotals(
            **summed,
            stops=next(numbers) > 0,
            waited=list(islice(numbers, self.num_processes)),
            plan_marks=list(islice(numbers, self.num_processes)),
            head_rate_LH=means[0].view_as(self.head_rate_LH),
            class_rate_LHK=None if self.class_rate_LHK is None else means[1].view_as(self.class_rate_LHK),
        )


@dataclass(frozen=True)
class StepMetrics:
    """A line of metrics.jsonl; the fields are its keys."""

    step: int
    loss: float
    kl: float | None
    """None in the steps of `warm_start`, whose loss is that of labels."""
    compression_loss: float
    target: float
    """The share of decisions that should evict."""
    target_cr: float
    """The same as a compression ratio, by the schedule."""
    cr: float
    """What was reached of it: a ratio of what the recipe's `budget` counts."""
    cr_decided: float | None
    """The same where the budget is decided; None: another, and `cr` is no ratio of decisions."""
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
