"""Steps of a cache through the operators, and by launching again what was launched before: the same bits."""

import copy
from unittest.mock import patch

import torch
from append_steps import empty_cache, normals
from cache_arguments import append_to, decode_over, paged_of, ring_of

from dms_kernels.append import append
from dms_kernels.arguments import Counters, FreePages
from dms_kernels.paged_decode import paged_decode

H, D, P = 2, 16, 16


def follow_two_ways(slot: torch.Tensor | None = None, num_steps: int = 10, dtype: torch.dtype = torch.float32) -> None:
    """Kernels must be on. What `CachedAppend` and `CachedDecode` do is what the operators do, bit by bit; they prepare a launch once for each kind of
    tensors that comes."""
    from dms_kernels.append.fused import CachedAppend
    from dms_kernels.launching import Launch
    from dms_kernels.paged_decode.fused import CachedDecode

    cache = empty_cache(2 if slot is None else 3, H, D, P, dtype=dtype)
    cache["ring_kv"].zero_(), cache["pages"].zero_()
    other = copy.deepcopy(cache)
    launches, run = [], Launch.run

    def parts(cache):
        free = FreePages(cache["free"], cache["num_free"], cache["references"])
        counters = Counters(*(cache[name] for name in ("evicted", "decided", "overflow", "ticket")))
        return ring_of(cache, 3), paged_of(cache), free, counters

    tickets = torch.zeros(100, dtype=torch.int32)
    store = CachedAppend(*parts(cache), sinks=1, alignment="own", release_gone=True)
    attend = CachedDecode(*parts(cache)[:2], tickets)
    with patch.object(Launch, "run", lambda self: (launches.append(self.kernel), run(self))[1]):
        for step in range(num_steps):
            # As projections give them, but for once.
            k, v = (normals(2, 1, H, D, seed=2 * step + i, dtype=dtype).transpose(1, 2)[:, :, 0] for i in range(2))
            k = torch.cat([k, k], -1)[..., :D] if step == num_steps - 3 else k
            evict, real = normals(2, H, seed=step) > 0.5, torch.tensor([True, step % 3 > 0])
            store(k, v, evict, real, slot)
            append_to(append, other, k=k, v=v, evict=evict, real=real, window=3, sinks=1, slot=slot)
            q = normals(2, 1, 2 * H, D, seed=step, dtype=dtype).transpose(1, 2)
            out = attend(q, real, slot, scale=0.3)
            before = len(launches)
            expected = decode_over(paged_decode, q, other, window=3, scale=0.3, real=real, slot=slot)
            assert len(launches) == before + 1 and torch.equal(out, expected)
            assert all(torch.equal(cache[name], other[name]) for name in cache)
    assert int(cache["num_kept"].max()) > num_steps // 3 and not tickets.any() and out.abs().max() > 0
    assert len(launches) == 2 * num_steps + 3, "one a step through each operator, one of each that is made again, and one for other strides"
