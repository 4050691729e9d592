"""The masked reference, reading what a cache has in quantised pages as those hold it."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from dms import attention
from dms.cache.layer import CompactedLayer, MaskedLayer
from dms_kernels.quantization import KV_DTYPES, fake_quantize

TOLERANCE = 1e-4


class RoundedReference:
    """First a cache takes a pass within `noting`, then the reference the same one within `playing`.

    The reference is given the cache's keys and values, which must be its own up to 1e-4: next to a boundary between two codes they may round to
    either side. Of the cache it also takes how many tokens of each row had been stored when attention read them: those which have left the ring
    by then are in pages.
    """

    def __init__(self, kv_dtype: str):
        self.dtype = KV_DTYPES[kv_dtype]
        self.noted: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.num_rounded = 0
        self._first_in_ring: torch.Tensor | None = None

    @contextmanager
    def noting(self, cache, real_BN: torch.Tensor) -> Iterator[None]:
        """real_BN: which of the new tokens are no padding."""
        layer = cache.layers[0]
        on_trial = None if layer.trial is None else layer.trial.tokens.real.sum(1)
        update, self.noted = CompactedLayer.update, []

        def noted(layer, k, v, *args, **kwargs):
            self.noted.append((k, v))
            return update(layer, k, v, *args, **kwargs)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(CompactedLayer, "update", noted)
            yield
        stored = layer.store.seq_len
        if not layer.record_past and not (real_BN.shape[1] == 1 and on_trial is None):
            # They were stored after attention had read them.
            stored = stored - real_BN.sum(1) - (0 if on_trial is None else on_trial)
        self._first_in_ring = stored - layer.store.ring_size

    @contextmanager
    def playing(self) -> Iterator[None]:
        update, read, noted = MaskedLayer.update, attention.evict_attention, iter(self.noted)

        def played(layer, *own, **kwargs):
            theirs = next(noted)
            for mine, other in zip(own, theirs, strict=False):
                # Rows of padding hold anything.
                real = layer.tokens.real[:, -mine.shape[2] :, None, None].transpose(1, 2)
                torch.testing.assert_close(mine * real, other * real, atol=TOLERANCE, rtol=0)
            return update(layer, *theirs, **kwargs)

        def rounded(query, key, value, *, key_tokens, **kwargs):
            in_pages = key_tokens.position_BT < self._first_in_ring[:, None]
            self.num_rounded += int((in_pages & key_tokens.real).sum())
            k, v = (
                torch.where(in_pages[:, None, :, None], fake_quantize(x, self.dtype, is_key), x)
                for x, is_key in ((key, True), (value, False))
            )
            return read(query, k, v, key_tokens=key_tokens, **kwargs)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(MaskedLayer, "update", played)
            patch.setattr(attention, "evict_attention", rounded)
            yield
