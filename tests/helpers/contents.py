"""What a compacted store holds, read plainly."""

import torch


def kept(store, b: int, h: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values [n, D] of the entries in pages, oldest first, as attention reads them."""
    num_kept, pool = int(store.num_kept[b, h]), store.pool
    table = store.page_table[b, h, : -(-num_kept // pool.page_size)].long()
    taken = pool.pages[table]
    if pool.scales is not None:
        taken = taken * pool.scales[table][..., None]
    return taken[:, 0].flatten(0, 1)[:num_kept], taken[:, 1].flatten(0, 1)[:num_kept]
