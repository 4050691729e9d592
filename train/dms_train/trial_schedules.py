"""Schedules under trial: a target that waits for the KL, and a temperature that falls."""

from dataclasses import dataclass, replace

# The running mean of the KL forgets a step's share at this rate.
_MEMORY = 0.8
# How much faster than a ramp by step the target rises where it need not wait.
_PACE = 2.0


@dataclass(frozen=True)
class WaitingRamp:
    """How far the target has come. All processes have the same, from the reduced numbers of each step."""

    done: float = 0.0
    """Share of the way to the target ratio, 0 to 1."""
    kl: float | None = None
    """Running mean of the KL per token; None before the first step."""

    def advance(self, step: int, *, steps: int, ramp: float, kl_ceiling: float) -> "WaitingRamp":
        """Before optimizer step 1..steps: on at twice the pace, or not at all while the KL is above the ceiling.

        The floor goes from 0 at half the ramp to 1 at its end, so that the run always reaches its target.
        """
        length = max(1.0, ramp * steps)
        waits = self.kl is not None and self.kl > kl_ceiling
        reached = self.done + (0.0 if waits else _PACE / length)
        floor = 2.0 * step / length - 1.0
        return replace(self, done=min(1.0, max(reached, floor)))

    def after(self, kl: float) -> "WaitingRamp":
        """With what a step's KL was, summed over processes."""
        return replace(self, kl=kl if self.kl is None else _MEMORY * self.kl + (1.0 - _MEMORY) * kl)

    def target(self, target_cr: float) -> tuple[float, float]:
        """(CR, share to evict), as `step.target_at`."""
        cr = 1.0 + (target_cr - 1.0) * self.done
        return cr, 1.0 - 1.0 / cr


def tau_at(step: int, *, steps: int, ramp: float, start: float | None, end: float) -> float | None:
    """The temperature of optimizer step 1..steps: from `start` to `end` over the ramp, by the same factor each step.

    start None: None, which is the configuration's own.
    """
    if start is None:
        return None
    progress = min(1.0, step / max(1.0, ramp * steps))
    return end if progress == 1.0 else start * (end / start) ** progress
