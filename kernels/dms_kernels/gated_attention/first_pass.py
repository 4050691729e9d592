"""What attention's forward made and its backward needs, kept where activation checkpointing runs a layer a second time."""

from collections.abc import Callable
from typing import Any

from torch import Tensor


class FirstPass:
    """Carries a call's results to its recomputation, which then computes nothing: it makes the node for the backward alone.

    Empty, it is filled by the call that it is given to, if that call will have a backward. Full, it is emptied by the next one,
    whose arguments must be the same. Kept are the output and the log-sum-exps, and from the Triton kernels the norms.
    """

    def __init__(self, put: Callable[[Tensor], Any] | None = None, get: Callable[[Any], Tensor] | None = None):
        """put, get: take a tensor elsewhere and bring it back. None: it stays where it is."""
        self._put, self._get = put, get
        self._held: tuple | None = None
        self._function: Callable | None = None

    @property
    def function(self) -> Callable | None:
        """The implementation that filled this, whose kind of results it holds. None: it is empty."""
        return self._function

    def keep(self, function: Callable, *results: Tensor) -> None:
        # Detached: the results' graph leads back to the checkpoint, and that to this object.
        held = (x.detach() for x in results)
        self._held = tuple(held if self._put is None else map(self._put, held))
        self._function = function

    def take(self) -> tuple[Tensor, ...] | None:
        """What is kept, which is gone from here after; None: nothing is."""
        held, self._held, self._function = self._held, None, None
        return held if held is None or self._get is None else tuple(map(self._get, held))
