"""The page pool over memory that vLLM allocated: it neither grows nor shrinks, and all layers take their pages from it.

Shapes: N pages, P entries of a page, D head dim.
"""

import math

import torch

from dms.cache.page_pool import CacheFull, PagePool
from dms_kernels.quantization import KV_DTYPES, scales_of_pages, stored_width

# Parts of the memory begin at multiples of this, in bytes.
_ALIGNMENT = 64


def page_bytes(page_size: int, head_dim: int, dtype: torch.dtype, kv_dtype: str | None, windows: tuple[int, ...]) -> int:
    """Bytes of a page: keys and values, their scales where they are quantised, their positions where there are several windows."""
    stored = dtype if kv_dtype is None else KV_DTYPES[kv_dtype]
    row, scales = stored_width(head_dim, stored) * stored.itemsize, scales_of_pages((), head_dim, stored)
    if scales is not None:
        row += math.prod(scales[0]) * scales[1].itemsize
    return page_size * (2 * row + 4 * (len(windows) > 1))


class FixedPool(PagePool):
    """Pages in memory that is given.

    Args:
        raw: contiguous bytes [M], int8 or uint8, aligned to 64.
        windows: of the gates; with one, entries have no positions.

    Raises:
        ValueError: memory for less than a page.
    """

    def __init__(
        self, raw: torch.Tensor, page_size: int, head_dim: int, dtype: torch.dtype, *, kv_dtype: str | None, windows: tuple[int, ...]
    ):
        super().__init__(page_size, head_dim, dtype, raw.device, kv_dtype=kv_dtype, windows=windows if len(windows) > 1 else ())
        # Room for the scratch row of each part, and for what alignment takes.
        spare = 3 * _ALIGNMENT + page_bytes(1, head_dim, dtype, kv_dtype, windows)
        num_pages = (raw.numel() - spare) // page_bytes(page_size, head_dim, dtype, kv_dtype, windows)
        if num_pages < 1:
            raise ValueError(
                f"{raw.numel():,} bytes of KV cache hold no page of {page_size} entries of {head_dim}; give vLLM more memory for it"
            )
        begin = 0

        def part(num: int, kind: torch.dtype) -> torch.Tensor:
            nonlocal begin
            end = begin + num * kind.itemsize
            taken = raw[begin:end].view(kind)
            begin = -(-end // _ALIGNMENT) * _ALIGNMENT
            return taken

        num_rows = num_pages * 2 * page_size + 1
        width = self.rows.shape[1]
        self.rows = part(num_rows * width, self.rows.dtype).view(num_rows, width)
        if self.row_scales is not None:
            shape = (num_rows, *self.row_scales.shape[1:])
            self.row_scales = part(math.prod(shape), self.row_scales.dtype).view(shape)
        if self.entry_positions is not None:
            self.entry_positions = part(num_pages * page_size + 1, torch.int32)
        self.references = torch.zeros(num_pages + 1, dtype=torch.int32, device=raw.device)
        self._list_free()

    def reserve(self, num_pages: int, num_free: int = 0) -> None:
        """Nothing: requests hold vouchers for what they take, and stores on other devices than a CPU reserve more than that."""
        self.collect()

    def take(self, wanted: torch.Tensor) -> torch.Tensor:
        """As of `PagePool`.

        Raises:
            CacheFull: fewer are free, where that can be known without waiting.
        """
        if self.reads_are_free and int(self.num_free) < int(wanted.sum()):
            raise CacheFull(
                f"of the pool's {self.num_pages} pages {int(self.num_free)} are free, and {int(wanted.sum())} are needed: the scheduler gave out "
                "more than there is, which is a fault of dms_vllm; please report it, with vLLM's version"
            )
        return super().take(wanted)

    def trim(self, all_of_it: bool = False, part: int = 4) -> None:
        """Nothing: the memory is vLLM's."""
