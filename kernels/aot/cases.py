"""What is compiled ahead of time: each operation's launches, by head dim, group size and dtype; and the budgets they must keep."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from dms_kernels.arguments import Counters, FreePages, GateInputs, NewToken, PagedKV, Ring
from dms_kernels.quantization import KV_DTYPES, scales_of_pages, stored_width

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, **KV_DTYPES}
CAPABILITIES = (80, 90)
# A page, a window and lengths as users have them; tiles do not depend on lengths, and little is computed.
_T, _H, _P, _WINDOW = 320, 2, 64, 256
# So many that the key-side backward of training attention cuts tiles of keys into pieces.
_SPLIT_T = 1024


@dataclass(frozen=True)
class Case:
    """One operation in one configuration. kv: dtype of pages; the rest is bf16 where kv is quantised."""

    operation: str
    capability: int
    head_dim: int
    group: int
    kv: str
    num_windows: int = 1
    tokens: int = _T

    @property
    def name(self) -> str:
        windows = f" K{self.num_windows}" if self.num_windows > 1 else ""
        tokens = f" T{self.tokens}" if self.tokens != _T else ""
        return f"{self.operation} sm_{self.capability} D{self.head_dim} G{self.group} {self.kv}{windows}{tokens}"

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.kv in KV_DTYPES else DTYPES[self.kv]

    def launch(self) -> None:
        """Call the operation, whose launches are compiled instead (see `compiling`)."""
        _LAUNCHES[self.operation](self)


@dataclass(frozen=True)
class Budget:
    """What a kernel may take: registers and bytes of local memory a thread. matrix: it must use tensor cores; wgmma: by the
    instructions of warp groups from capability 9.0 on."""

    registers: int = 255
    stack_bytes: int = 0
    matrix: bool = False
    wgmma: bool = False


# By kernel; what is not named here keeps everything in registers and multiplies no matrices.
_BUDGETS = {
    "forward_kernel": Budget(stack_bytes=64, matrix=True, wgmma=True),
    "queries_kernel": Budget(stack_bytes=64, matrix=True, wgmma=True),
    # Two gradients of 128 keys beside the scores: a few registers more than there are.
    "keys_kernel": Budget(stack_bytes=352, matrix=True, wgmma=True),
    # Outside of its loops.
    "prefill_kernel": Budget(stack_bytes=128, matrix=True, wgmma=True),
    # 16 rows of queries are fewer than a warp group's instruction takes. Pages of int4, which become numbers in registers, take 24 bytes.
    "decode_kernel": Budget(stack_bytes=32, matrix=True),
}


# The same where tiles of keys may be cut into pieces.
_CUT = {"keys_kernel": Budget(stack_bytes=448, matrix=True, wgmma=True)}


def budget_of(kernel: str, tokens: int = _T) -> Budget:
    kernel = kernel.lstrip("_")
    if kernel in _CUT and tokens > _T:
        return _CUT[kernel]
    return _BUDGETS.get(kernel, Budget())


def _randn(*shape: int, case: Case) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float32).to(case.dtype)


def _gated_attention(case: Case) -> None:
    from dms_kernels.gated_attention import gated_attention

    T = case.tokens
    q = _randn(1, T, _H * case.group, case.head_dim, case=case).requires_grad_()
    k, v = (_randn(1, T, _H, case.head_dim, case=case).requires_grad_() for _ in range(2))
    window = (64, 96, 128, 256)[: case.num_windows]
    log_keep = torch.nn.functional.logsigmoid(torch.randn(1, T, _H, case.num_windows) * 20).requires_grad_()
    segments = torch.ones(1, T, dtype=torch.int32)
    out = gated_attention(q, k, v, log_keep, window=window, scale=0.1, segment_ids=segments)
    out.backward(torch.ones_like(out))


def _paged(case: Case) -> PagedKV:
    windows, page_dtype = _windows(case), DTYPES[case.kv]
    scales = scales_of_pages((8, 2, _P), case.head_dim, page_dtype)
    return PagedKV(
        pages=torch.zeros(8, 2, _P, stored_width(case.head_dim, page_dtype), dtype=page_dtype),
        page_table=torch.zeros(1, _H * len(windows), 8, dtype=torch.int32),
        num_kept=torch.full((1, _H * len(windows)), 130, dtype=torch.int32),
        page_scales=None if scales is None else torch.ones(scales[0], dtype=scales[1]),
        positions=torch.zeros(8, _P, dtype=torch.int32) if len(windows) > 1 else None,
        windows=windows if len(windows) > 1 else (),
    )


def _windows(case: Case) -> tuple[int, ...]:
    return tuple(_WINDOW * 4**j for j in range(case.num_windows))


def _ring(case: Case) -> Ring:
    kv = _randn(1, _H, 2, _WINDOW + 1, case.head_dim, case=case)
    state = torch.zeros(1, _H, _WINDOW + 1, dtype=torch.uint8)
    return Ring(kv, state, seq_len=torch.full((1,), 400, dtype=torch.int32), window=_WINDOW, longer=_windows(case)[1:])


def _sparse_prefill(case: Case) -> None:
    from dms_kernels.sparse_prefill import sparse_prefill, store_survivors

    paged = _paged(case)
    q = _randn(1, _H * case.group, _T, case.head_dim, case=case)
    k, v = (_randn(1, _H, _T, case.head_dim, case=case) for _ in range(2))
    evicted = torch.rand(1, _H, _T) < 0.7
    if case.num_windows == 1:
        sparse_prefill(q, k, v, evicted, None, paged, window=64, scale=0.1)
        store_survivors(k, v, ~evicted, paged)
        return
    last, position = torch.zeros(1, dtype=torch.int32), torch.zeros(1, _T, dtype=torch.int32)
    sparse_prefill(q, k, v, evicted.to(torch.uint8), None, paged, window=paged.windows, scale=0.1, last_position=last)
    store_survivors(k, v, evicted.to(torch.uint8), paged, position)


def _paged_decode(case: Case) -> None:
    from dms_kernels.paged_decode import paged_decode

    paged_decode(_randn(1, _H * case.group, 1, case.head_dim, case=case), _ring(case), _paged(case), scale=0.1)


def _append(case: Case) -> None:
    from dms_kernels.append import append

    H, D, M, outputs = _H, case.head_dim, 512, _H * case.num_windows
    gate = GateInputs(_randn(1, M, case=case), weight=torch.zeros(outputs, M), bias=torch.zeros(outputs), scale=100.0, offset=5.0)
    token = NewToken(
        k=_randn(1, H, D, case=case),
        v=_randn(1, H, D, case=case),
        evict=gate,
        q=_randn(1, H * case.group, D, case=case),
        q_norm=torch.ones(D, dtype=case.dtype),
        k_norm=torch.ones(D, dtype=case.dtype),
        cos=torch.ones(1, D, dtype=case.dtype),
        sin=torch.ones(1, D, dtype=case.dtype),
    )
    free_pages = FreePages(free=torch.arange(8, dtype=torch.int32), num_free=torch.tensor(8), references=torch.zeros(9, dtype=torch.int32))
    counters = Counters(
        evicted=torch.zeros(1, H, dtype=torch.int64),
        decided=torch.zeros(1, dtype=torch.int64),
        overflow=torch.zeros(1, dtype=torch.int32),
        ticket=torch.zeros(1 if case.num_windows == 1 else 2, dtype=torch.int32),
    )
    append(token, _ring(case), _paged(case), free_pages, counters)


def _distill_loss(case: Case) -> None:
    from dms_kernels.distill_loss import distill_loss

    hidden_s = _randn(32, 128, case=case).requires_grad_()
    hidden_t, weight = _randn(32, 128, case=case), _randn(4096, 128, case=case)
    for beta in (0.0, 0.5, 1.0):
        distill_loss(hidden_s, hidden_t, weight, beta=beta, valid=torch.ones(32, dtype=torch.bool), chunk=16)


_LAUNCHES: dict[str, Callable[[Case], None]] = {
    "gated_attention": _gated_attention,
    "sparse_prefill": _sparse_prefill,
    "paged_decode": _paged_decode,
    "append": _append,
    "distill_loss": _distill_loss,
}


def full_matrix() -> list[Case]:
    """{sm_80, sm_90} x {D 64, 128} x {G 1, 4, 8} x dtypes; quantised pages where there are pages, the loss once a dtype; a few of
    several windows. Training attention also at D 256, and with tiles of keys cut into pieces."""
    cases = []
    for capability in CAPABILITIES:
        for kv in DTYPES:
            if kv == "fp8" and capability < 90:
                continue
            paged = ("sparse_prefill", "paged_decode", "append")
            operations = paged if kv in KV_DTYPES else ("gated_attention", *paged)
            cases += [Case(op, capability, D, G, kv) for op in operations for D in (64, 128) for G in (1, 4, 8)]
            if kv == "bf16":
                cases += [Case("gated_attention", capability, D, G, kv, num_windows=3) for D in (64, 128) for G in (1, 4, 8)]
            if kv in ("bf16", "fp16"):
                cases.append(Case("distill_loss", capability, 128, 1, kv))
    cases += [case for case in (*several_windows(), *cut_or_wide()) if case not in cases]
    return cases


def cut_or_wide() -> list[Case]:
    """Training attention with tiles of keys cut into pieces, and at head dim 256."""
    cut = [Case("gated_attention", 90, 128, 4, "bf16", num_windows, _SPLIT_T) for num_windows in (1, 3)]
    return [*cut, Case("gated_attention", 90, 256, 4, "bf16")]


def several_windows(num_windows: int = 3) -> list[Case]:
    """The operations with so many windows, and beside each with one."""
    return [
        Case(operation, capability, 128, 4, kv, count)
        for operation in ("gated_attention", "append", "paged_decode", "sparse_prefill")
        for capability in CAPABILITIES
        for kv in (("bf16",) if operation == "gated_attention" else ("bf16", "int8", "int4"))
        for count in (1, num_windows)
    ]


def representative() -> list[Case]:
    """About a dozen kernels, for every run of the tests."""
    return [
        Case("gated_attention", 90, 128, 4, "bf16"),
        Case("gated_attention", 90, 128, 4, "bf16", tokens=_SPLIT_T),
        Case("gated_attention", 90, 256, 4, "bf16"),
        Case("sparse_prefill", 90, 128, 4, "bf16"),
        Case("paged_decode", 90, 128, 4, "bf16"),
        Case("paged_decode", 80, 64, 8, "int8"),
        Case("paged_decode", 90, 128, 4, "fp8"),
        Case("paged_decode", 90, 128, 4, "int4"),
        Case("sparse_prefill", 90, 128, 4, "int4"),
        Case("append", 80, 64, 8, "int4"),
        Case("append", 90, 128, 4, "bf16"),
        Case("append", 90, 128, 4, "bf16", num_windows=3),
        Case("distill_loss", 80, 128, 1, "bf16"),
    ]
