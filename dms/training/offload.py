"""Activations that rest in host memory between forward and backward.

Tensors come in groups, one for each layer. On a GPU a side stream copies them: out while the next layer runs, and back while the
backward of the layer above does, so that the main stream waits for a copy only where that was slower than a layer. On a CPU the
same steps copy within one memory, which is for tests.
"""

import weakref
from contextlib import AbstractContextManager
from functools import lru_cache

import torch

# Groups whose tensors may still be on their device while the next group comes in.
_STILL_NEAR = 1


class Resting:
    """One tensor, in host memory and at times on its device."""

    def __init__(self, near: torch.Tensor, far: torch.Tensor, copied: "torch.cuda.Event | None", group: int):
        self.near: torch.Tensor | None = near
        """On its device: until its group has left, and again once it is on its way back."""
        self.far, self.group = far, group
        """In host memory."""
        self.copied = copied
        """The last of the side stream's copies of it; None on a CPU."""
        self.given = False
        """It was handed out, and comes back again only if asked for."""
        self.device = near.device


class HostStore:
    """Holds the tensors of one pass; a tensor is freed once the `Resting` that `put` returned is dropped."""

    def __init__(self) -> None:
        # Weak, so that host memory is freed as the backward goes, and at once where there is none.
        self._groups: list[list[weakref.ref[Resting]]] = [[]]

    def begin_group(self) -> None:
        """Tensors that are put from here on belong to the next layer."""
        self._groups.append([])
        for resting in self._alive(len(self._groups) - 2 - _STILL_NEAR):
            _wait_for(resting)
            resting.near = None

    def put(self, tensor: torch.Tensor) -> Resting:
        """Begin to copy a tensor to the host. It must not be changed after."""
        near = tensor.detach()
        group = len(self._groups) - 1
        if near.is_cuda:
            far = torch.empty_like(near, device="cpu", pin_memory=True)
            copied = _copy_aside(near.device, far, near)
        else:
            far, copied = near.clone(), None
        resting = Resting(near, far, copied, group)
        self._groups[group].append(weakref.ref(resting))
        return resting

    def get(self, resting: Resting) -> torch.Tensor:
        """The tensor, on its device. The rest of its group and the group before, which a backward needs next, begin to come back."""
        self._begin_return(resting)
        for group in (resting.group, resting.group - 1):
            for other in self._alive(group):
                if not other.given:
                    self._begin_return(other)
        _wait_for(resting)
        near, resting.near, resting.given = resting.near, None, True
        assert near is not None, "_begin_return has made it"
        # What is far stays: a retained graph asks again.
        return near

    def hooks(self) -> AbstractContextManager:
        """For the call of a checkpointed layer: the inputs that it saves rest here."""

        def pack(tensor: torch.Tensor):
            return self.put(tensor) if tensor.is_floating_point() and tensor.numel() else tensor

        def unpack(packed):
            return self.get(packed) if isinstance(packed, Resting) else packed

        return torch.autograd.graph.saved_tensors_hooks(pack, unpack)

    def _alive(self, group: int) -> list[Resting]:
        found = self._groups[group] if group >= 0 else []
        return [resting for reference in found if (resting := reference()) is not None]

    def _begin_return(self, resting: Resting) -> None:
        if resting.near is not None:
            return
        if resting.copied is None:
            resting.near = resting.far.clone()
            return
        resting.near = torch.empty_like(resting.far, device=resting.device)
        # Allocated on the main stream and written on the other: its memory must not be used anew before that copy ended.
        resting.near.record_stream(_side_stream(resting.device))
        resting.copied = _copy_aside(resting.device, resting.near, resting.far)


@lru_cache
def _side_stream(device: torch.device) -> "torch.cuda.Stream":
    return torch.cuda.Stream(device)


def _copy_aside(device: torch.device, target: torch.Tensor, source: torch.Tensor) -> "torch.cuda.Event":
    """Copy on the side stream, after all that the main stream was given so far; the event says when it is done."""
    stream = _side_stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        target.copy_(source, non_blocking=True)
    return stream.record_event()


def _wait_for(resting: Resting) -> None:
    """The main stream waits for the copy, the program does not. After it, memory that the copy read may be used anew."""
    if resting.copied is not None:
        torch.cuda.current_stream(resting.device).wait_event(resting.copied)
