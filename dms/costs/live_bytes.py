"""Bytes of all tensors that live at once, counted as they are made and as they die: real tensors and fake ones alike."""

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.weak import WeakIdKeyDictionary


class LiveBytes(TorchDispatchMode):
    """Within it, every operator's results are counted once for each storage, from its making to its death.

    What autograd saves, what a custom function makes inside, gradients and optimizer state are all results of operators. What
    an operator allocates and frees within itself is not seen. now: bytes alive; peak: the most since `reset_peak`.
    """

    def __init__(self, *held: torch.Tensor):
        """held: tensors from before, to be counted too."""
        super().__init__()
        self.now = self.peak = 0
        self._known = WeakIdKeyDictionary()
        for tensor in held:
            self._meet(tensor)

    def reset_peak(self) -> None:
        self.peak = self.now

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in tree_iter(result):
            if isinstance(value, torch.Tensor):
                self._meet(value)
        return result

    def _meet(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage in self._known:
            return
        size = storage.nbytes()
        self._known[storage] = size
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, size)

    def _forget(self, size: int) -> None:
        self.now -= size
