"""One decoding step's attention over one layer's compacted cache, read where it lies."""

from dataclasses import replace

import torch
from torch import Tensor

from bench.inputs import Cache, filled_cache, kept_shares, normal, relative_error
from bench.measuring import Competitor, Parity, num_sets
from bench.shapes import Shape
from dms_kernels.dispatch import target
from dms_kernels.paged_decode import paged_decode
from dms_kernels.quantization import KV_DTYPES, group_size, quantize


def _inputs(shape: Shape, device: str, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Cache]:
    generator = torch.Generator(device).manual_seed(seed)
    return normal(generator, shape.batch, shape.Hq, 1, shape.D, dtype=dtype), filled_cache(shape, generator, dtype)


def _call(shape: Shape, q: Tensor, cache: Cache):
    # Kept between calls, as a cache keeps it: the kernel leaves it as it was.
    tickets = torch.zeros(q.shape[0] * q.shape[1] + 4096, dtype=torch.int32, device=q.device)
    return lambda: paged_decode(q, cache.ring, cache.paged, scale=shape.scale, tickets=tickets)


def _exact(shape: Shape, q: Tensor, cache: Cache) -> Tensor:
    """[B, 1, Hq, D] in float64, one head after another."""
    out = torch.empty(shape.batch, 1, shape.Hq, shape.D, dtype=torch.float64, device=q.device)
    group = shape.Hq // shape.H
    for b in range(shape.batch):
        for h in range(shape.H):
            key, value = (x.double() for x in cache.entries(b, h))
            heads = slice(h * group, (h + 1) * group)
            out[b, 0, heads] = (q[b, heads, 0].double() @ key.T * shape.scale).softmax(-1) @ value
    return out


def parity(shape: Shape, device: str, dtype: torch.dtype) -> Parity:
    q, cache = _inputs(shape, device, dtype)
    return Parity(relative_error(_call(shape, q, cache)(), _exact(shape, q, cache)), 1e-2 if dtype.itemsize == 2 else 1e-5)


def live_bytes(shape: Shape, itemsize: int) -> int:
    """Of keys and values, the ring's included. With several windows: of what is seen, as the mean of what `filled_cache` draws."""
    R = min(shape.window + 1, shape.tokens)
    share_BH = kept_shares(shape)
    kept = int((share_BH * (shape.tokens - R)).round().sum())
    leaving = sum(min(window + 1, shape.tokens) - R for window in shape.longer) / len(shape.windows)
    kept += round(float((1 - share_BH).sum()) * leaving)
    return (kept + shape.batch * shape.H * R) * 2 * shape.D * itemsize


def _page_dtypes(device: str) -> list[str]:
    """Those that this device's kernels read, int8 first."""
    too_old = device != "cpu" and target(torch.device(device)).capability < 89
    return [name for name in KV_DTYPES if name != "fp8" or not too_old]


def competitors(shape: Shape, device: str, dtype: torch.dtype) -> list[Competitor]:
    B, T, Hq, H, D = shape.batch, shape.tokens, shape.Hq, shape.H, shape.D
    ours_bytes, dense_bytes = live_bytes(shape, dtype.itemsize), 2 * B * H * T * D * dtype.itemsize
    ring_bytes = B * H * (shape.window + 1) * 2 * D * dtype.itemsize

    def ours():
        return [_call(shape, *_inputs(shape, device, dtype, seed)) for seed in range(num_sets(ours_bytes))]

    def quantized(name: str) -> Competitor:
        numbers = (ours_bytes - ring_bytes) // dtype.itemsize
        # A scale, a least number and fifth bits for each group; one scale for a whole key or value hardly counts.
        paged_bytes = numbers // 2 + numbers // group_size(D) * 6 if name == "int4" else numbers

        def prepare():
            calls = []
            for seed in range(num_sets(ring_bytes + paged_bytes)):
                q, cache = _inputs(shape, device, dtype, seed)
                pages, scales = quantize(cache.paged.pages, KV_DTYPES[name], 1)
                calls.append(_call(shape, q, replace(cache, paged=replace(cache.paged, pages=pages, page_scales=scales))))
            return calls

        return Competitor(f"ours, {name} pages", prepare, bytes=ring_bytes + paged_bytes, graph=True)

    def dense():
        def call():
            generator = torch.Generator(device).manual_seed(0)
            # KV heads in the batch, their query heads as rows: one read of keys and values serves all of them.
            q, k, v = (normal(generator, B * H, 1, rows, D, dtype=dtype) for rows in (Hq // H, T, T))
            return lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=shape.scale)

        return [call() for _ in range(num_sets(dense_bytes))]

    found = [
        Competitor("ours", ours, bytes=ours_bytes, graph=True),
        *(quantized(name) for name in _page_dtypes(device)),
        Competitor("SDPA, dense", dense, bytes=dense_bytes, graph=True),
    ]
    if shape.longer:
        # Others have no lists of which a part is masked.
        return found
    return [
        *found,
        Competitor("FlashInfer, ragged heads", lambda: _flashinfer(shape, device, dtype), bytes=ours_bytes, graph=True, same=True),
        Competitor("xformers split-k, ragged heads", lambda: _xformers(shape, device, dtype), bytes=ours_bytes, graph=True, same=True),
    ]


def _folded(shape: Shape, device: str, dtype: torch.dtype, seed: int, P: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same entries with KV heads as the batch, the ring's after the pages': q [B*H, G, D], entries [B*H, most, 2, D] with
    most a multiple of P, their numbers [B*H] int32, and where each is used [B*H, most] bool."""
    q, cache = _inputs(shape, device, dtype, seed)
    B, H, D = shape.batch, shape.H, shape.D
    R, num_kept = cache.ring.kv.shape[3], cache.paged.num_kept.flatten()
    length = num_kept + R
    most = -(-int(length.max()) // P) * P
    pages = cache.paged.pages[cache.paged.page_table.long()].permute(0, 1, 2, 4, 3, 5).reshape(B * H, -1, 2, D)
    entries = torch.zeros(B * H, most, 2, D, dtype=dtype, device=device)
    entries[:, : pages.shape[1]] = pages[:, :most]
    ring = cache.ring.kv.transpose(2, 3).reshape(B * H, R, 2, D)
    place = num_kept.long()[:, None] + torch.arange(R, device=device)
    entries[torch.arange(B * H, device=device)[:, None], place] = ring
    used = torch.arange(most, device=device) < length[:, None]
    return q.reshape(B * H, shape.Hq // H, D), entries, length, used


def _flashinfer(shape: Shape, device: str, dtype: torch.dtype):
    import flashinfer

    calls = []
    for seed in range(num_sets(live_bytes(shape, dtype.itemsize))):
        q, entries, length, used = _folded(shape, device, dtype, seed, shape.page)
        pages = entries.view(-1, shape.page, 2, shape.D)[used.view(-1, shape.page)[:, 0]].transpose(1, 2).unsqueeze(3).contiguous()
        num_pages = -(-length // shape.page)
        indptr = torch.cat([num_pages.new_zeros(1), num_pages.cumsum(0)]).int()
        order = torch.arange(pages.shape[0], dtype=torch.int32, device=device)
        last = ((length - 1) % shape.page + 1).int()
        workspace = torch.empty(256 * 2**20, dtype=torch.uint8, device=device)
        wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
            workspace,
            "NHD",
            use_cuda_graph=True,
            use_tensor_cores=True,
            paged_kv_indptr_buffer=indptr,
            paged_kv_indices_buffer=order,
            paged_kv_last_page_len_buffer=last,
        )
        wrapper.plan(indptr, order, last, q.shape[1], 1, shape.D, shape.page, q_data_type=dtype, kv_data_type=dtype, sm_scale=shape.scale)
        calls.append(lambda wrapper=wrapper, q=q, pages=pages: wrapper.run(q, pages).view(shape.batch, 1, shape.Hq, shape.D))
    return calls


def _xformers(shape: Shape, device: str, dtype: torch.dtype):
    from xformers.ops import fmha

    calls = []
    for seed in range(num_sets(live_bytes(shape, dtype.itemsize))):
        q, entries, length, _ = _folded(shape, device, dtype, seed, 1)
        BH, G, D = q.shape
        most = entries.shape[1]
        mask = fmha.attn_bias.BlockDiagonalPaddedKeysMask.from_seqlens([1] * BH, most, length.tolist()).to(device)
        k, v = (x.reshape(1, BH * most, 1, 1, D).expand(-1, -1, -1, G, -1) for x in entries.unbind(2))
        folded = q.view(1, BH, 1, G, D)
        calls.append(
            lambda q=folded, k=k, v=v, mask=mask: fmha.memory_efficient_attention_forward(
                q, k, v, attn_bias=mask, scale=shape.scale, op=fmha.triton_splitk.FwOp
            ).view(shape.batch, 1, shape.Hq, shape.D)
        )
    return calls
