"""Launches of Triton kernels: made once in full, and again with other tensors in some places.

A launch in full costs the host some 30 us: Triton looks at every argument to find the variant that fits. Where the next one has tensors of
the same dtypes, strides and alignment, and the same numbers, the variant is the same, and the compiled kernel is called by itself.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch


class Launch(NamedTuple):
    """A kernel and all that it is launched with."""

    kernel: Any
    grid: tuple[int, int]
    args: tuple[Any, ...]
    """Of its first parameters."""
    constants: dict[str, Any]
    """Of its other parameters, which are compiled in."""
    options: dict[str, Any]
    """Of compilation, such as num_warps."""

    def run(self) -> Any:
        """Returns the compiled kernel; None in the interpreter."""
        return self.kernel[self.grid](*self.args, **self.constants, **self.options)


class CachedLaunch:
    """A launch that was made, and that can be made again with other values of some of its parameters.

    What Triton promises nothing about is here: a compiled kernel is called with all parameters, constants too, in their order.
    """

    def __init__(self, launch: Launch, changing: Sequence[str]):
        """Makes the launch. changing: names of parameters."""
        kernel, compiled = launch.kernel, launch.run()
        names: list[str] = kernel.arg_names
        given = dict(zip(names, launch.args, strict=False)) | launch.constants
        self._args = [given[name] for name in names]
        self._places = [names.index(name) for name in changing]
        for place in self._places:
            # Tensors of one step are not kept until the next.
            self._args[place] = None
        self._run = self._interpret(launch, names) if compiled is None else compiled[(*launch.grid, 1)]

    @staticmethod
    def _interpret(launch: Launch, names: list[str]) -> Any:
        return lambda *args: launch.kernel[launch.grid](**dict(zip(names, args, strict=True)), **launch.options)

    def __call__(self, *values: Any) -> None:
        args = self._args.copy()
        for place, value in zip(self._places, values, strict=True):
            args[place] = value
        self._run(*args)


def specialization(x: torch.Tensor | None) -> tuple[Any, ...] | None:
    """What a variant of a kernel depends on, of a tensor that it is given: equal for two tensors, one can stand for the other."""
    return None if x is None else (x.dtype, x.shape, x.stride(), x.data_ptr() % 16 == 0)


_HERE: AbstractContextManager = nullcontext()


def on_device_of(x: torch.Tensor) -> AbstractContextManager:
    """Inside, kernels are launched on x's device. `torch.cuda.device_of`, where the device is the current one at a tenth of the time."""
    if x.device.type != "cuda" or x.device.index == torch.cuda.current_device():
        return _HERE
    return torch.cuda.device_of(x)


_traced = False


def is_traced() -> bool:
    """Whether what runs is being recorded, so that calls must go through operators: by torch.compile, or inside `through_operators`."""
    return _traced or torch.compiler.is_compiling()


@contextmanager
def through_operators() -> Iterator[None]:
    """Inside, caches call their kernels through PyTorch's operators, which whoever records a pass can see (torch.fx, profilers)."""
    global _traced
    before, _traced = _traced, True
    try:
        yield
    finally:
        _traced = before
