"""One reading of a prompt for all policies that rank after a whole one.

Shapes: B batch, P prompt tokens, V vocabulary.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch

from dms.cache import DMSCache
from dms.evaluation.policies.cache import Asking, PolicyCache, PolicyLayer, seconds_now
from dms.evaluation.policies.rules import Policy


class _KeepAll(Policy):
    """Drops nothing: it waits for a second reading that does not come."""

    reads_whole_prompt = True
    rereads_prompt = True


class WholePrompt:
    """A prompt [B, P] that was read at once and of which nothing was dropped: every policy that `reads_whole_prompt` begins with a copy of it.

    They all make the same of a prompt before they choose, so that it is read once for all of them, and once more for all that read it twice.
    """

    def __init__(self, model: Any, ids_BP: torch.Tensor, read: Callable[[DMSCache], torch.Tensor]):
        """read: reads the prompt into the cache that it is given, in evict mode, and returns the logits [B, V] after it."""
        start = seconds_now(ids_BP.device)
        self._model, self._ids_BP = model, ids_BP
        self._cache = PolicyCache(model, lambda layer: _KeepAll(1))
        asked: list[list[Asking]] = []
        layers = [layer for layer in self._cache.layers if isinstance(layer, PolicyLayer)]
        for layer in layers:
            layer.asked = []
            asked.append(layer.asked)
        self.logits_BV = read(self._cache)
        for layer in layers:
            layer.asked = None
        self._asked = [asking for (asking,) in asked]
        self._heard: dict[Callable, list[torch.Tensor | None]] = {}
        self.seconds = seconds_now(ids_BP.device) - start

    def begin(self, make_policy: Callable[[int], Policy], reading: Callable[[], AbstractContextManager]) -> "PolicyCache":
        """A cache that has read the prompt under these policies, what is over their budget dropped. make_policy: of a layer's index.

        reading: gives the context that a second reading runs in.
        """
        start = seconds_now(self._ids_BP.device)
        policies = [make_policy(layer.index) for layer in self._model.dms.layers]
        cache = self._cache.begin(policies, self._asked)
        if policies[0].rereads_prompt:
            # Policies that hear alike have heard the same.
            key = type(policies[0]).hear
            if key not in self._heard:
                with reading():
                    self._heard[key] = cache.hear_prompt(self._model, self._ids_BP)
            cache.drop_by(self._heard[key])
        cache.seconds_before = self.seconds + seconds_now(self._ids_BP.device) - start
        return cache
