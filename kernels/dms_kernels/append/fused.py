"""The host side of the Triton kernel, and the custom operator."""

from dataclasses import dataclass

import torch

from dms_kernels import picking
from dms_kernels.sizes import padded, power_of_two

_MOST_BLOCK = 4096


@dataclass(frozen=True)
class Launch:
    """block: of the hidden state, multiplied by the gate's weight at a time. overlaps: see `paged_decode.fused.Launch`."""

    block: int
    num_warps: int
    overlaps: bool = False


def launch(*, M: int, group: int, dim: int) -> Launch:
    """M: of the hidden state, 0 where there is no gate. group and dim: query heads of a KV head and head dim, padded."""
    if M:
        return Launch(block=min(_MOST_BLOCK, padded(M)), num_warps=4)
    # One warp has nobody to wait for; the gate's product wants more.
    return Launch(block=16, num_warps=max(1, min(4, group * dim // 512)))


def problem(k: torch.Tensor, ring_kv: torch.Tensor, pages: torch.Tensor) -> str | None:
    """What keeps the kernel from taking these arguments, which are valid otherwise."""
    for name, tensor in (("k", k), ("ring_kv", ring_kv)):
        if tensor.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            return f"the kernel takes float32, float16 or bfloat16, and {name} is {tensor.dtype}"
    if k.shape[2] > 256:
        return f"the kernel takes head dims up to 256, and this is {k.shape[2]}"
    if pages.dtype == torch.float8_e4m3fn and picking.target(k.device).capability < 89:
        return "pages in float8 need compute capability 8.9 or later"
    return None


def _strides(x: torch.Tensor | None, num_dims: int) -> list[int]:
    """Of the first dims. Those of a single element may have any stride: each would be compiled for, and a row that all share has 0."""
    return [0] * num_dims if x is None else [0 if x.shape[i] == 1 else x.stride(i) for i in range(num_dims)]


@torch.library.custom_op(
    f"{picking.NAMESPACE}::append",
    mutates_args=(
        "ring_kv", "ring_state", "seq_len", "num_kept", "page_table", "pages", "references", "num_free", "evicted", "decided", "overflow",
        "ticket", "page_scales",
    ),
)  # fmt: skip
def append_step(
    k: torch.Tensor,
    v: torch.Tensor,
    evict: torch.Tensor | None,
    ring_kv: torch.Tensor,
    ring_state: torch.Tensor,
    seq_len: torch.Tensor,
    num_kept: torch.Tensor,
    page_table: torch.Tensor,
    pages: torch.Tensor,
    page_scales: torch.Tensor | None,
    references: torch.Tensor,
    free: torch.Tensor,
    num_free: torch.Tensor,
    evicted: torch.Tensor,
    decided: torch.Tensor,
    overflow: torch.Tensor,
    ticket: torch.Tensor,
    window: int,
    sinks: int,
    next_alignment: bool,
    real: torch.Tensor | None,
    q: torch.Tensor | None,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    q_norm: torch.Tensor | None,
    k_norm: torch.Tensor | None,
    norm_eps: float,
    hidden: torch.Tensor | None,
    gate_weight: torch.Tensor | None,
    gate_bias: torch.Tensor | None,
    gate_scale: float,
    gate_offset: float,
    gate_normalize: bool,
    evict_bias: float,
) -> torch.Tensor:
    """The rotated queries, or no elements where there are none."""
    from dms_kernels.append.kernel import append_kernel

    picking.count("append", "triton")
    B, H, D = k.shape
    rotated = k.new_empty(0) if q is None else torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if k.numel() == 0:
        return rotated
    for name, tensor in {
        "ring_kv": ring_kv, "ring_state": ring_state, "seq_len": seq_len, "num_kept": num_kept, "page_table": page_table, "pages": pages,
        "page_scales": page_scales, "references": references, "free": free, "evicted": evicted, "decided": decided,
    }.items():  # fmt: skip
        if tensor is not None and not tensor.is_contiguous():
            raise ValueError(
                f"{name} is not contiguous, strides {tensor.stride()}; the kernel changes it where it lies: hand it over contiguous"
            )
    k, v, q, cos, sin, hidden, gate_weight = (
        x if x is None or x.stride(-1) == 1 else x.contiguous() for x in (k, v, q, cos, sin, hidden, gate_weight)
    )
    evict = evict if evict is None else evict.view(torch.uint8)
    real = real if real is None else real.contiguous().view(torch.uint8)
    G = 1 if q is None else q.shape[1] // H
    M = 0 if hidden is None else hidden.shape[1]
    dim, group = padded(D), power_of_two(G)
    chosen = launch(M=M, group=group, dim=dim)
    with torch.cuda.device_of(k):
        append_kernel[(H, B)](
            k, v, evict, real, q, rotated, cos, sin, q_norm, k_norm, hidden, gate_weight, gate_bias,
            ring_kv, ring_state, seq_len, num_kept, page_table, pages, page_scales, references, free, num_free, evicted, decided, overflow, ticket,
            *_strides(k, 2), *_strides(v, 2), *_strides(evict, 2), *_strides(q, 2), *_strides(cos, 1), *_strides(sin, 1), *_strides(hidden, 1),
            *_strides(gate_weight, 1), *_strides(gate_bias, 1),
            ring_kv.shape[3], window, sinks, page_table.shape[2], M, norm_eps, gate_scale, gate_offset, evict_bias,
            H=H, G=G, GP=group, D=D, DP=dim, ROT=0 if cos is None else cos.shape[1], P=pages.shape[2],
            GATE=hidden is not None, NORMALIZE=gate_normalize, BLOCK=chosen.block,
            REAL=real is not None, QUERY=q is not None, NEXT=next_alignment, Q_NORM=q_norm is not None, K_NORM=k_norm is not None,
            Q_ROUNDS=q_norm is None or q_norm.dtype == k.dtype, K_ROUNDS=k_norm is None or k_norm.dtype == k.dtype,
            ROPE_ROUNDS=cos is not None and cos.dtype == k.dtype,
            QUANTIZED=page_scales is not None, OVERLAPS=chosen.overlaps, num_warps=chosen.num_warps,
            **({"launch_pdl": True} if chosen.overlaps else {}),
            # A contracted multiply and add would skip the rounding between them that plain PyTorch does.
            enable_fp_fusion=False,
        )  # fmt: skip
    return rotated


@append_step.register_fake
def _(
    k, v, evict, ring_kv, ring_state, seq_len, num_kept, page_table, pages, page_scales, references, free, num_free, evicted, decided, overflow,
    ticket, window, sinks, next_alignment, real, q, *rest,
):  # fmt: skip
    return k.new_empty(0) if q is None else q.new_empty(q.shape)
