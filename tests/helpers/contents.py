"""What a compacted store holds, read plainly, and the device that it takes the CPU for."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from dms_kernels.quantization import dequantize


def entries_in_pages(store, b: int, h: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values [n, D] of a head's entries in pages, oldest first, as attention reads them."""
    num_kept, pool = int(store.num_kept[b, h]), store.pool
    table = store.page_table[b, h, : -(-num_kept // pool.page_size)].long()
    pages = pool.pages[table]
    if pool.scales is not None:
        pages = dequantize(pages, pool.scales[table], 1)
    return pages[:, 0].flatten(0, 1)[:num_kept], pages[:, 1].flatten(0, 1)[:num_kept]


@contextmanager
def reads_from_device(free: bool) -> Iterator[None]:
    """Stores that are made meanwhile take the CPU for a device that answers at once (free) or late."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dms.cache.page_pool.reads_are_free", lambda device: free)
        yield
