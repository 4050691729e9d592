"""What the operations take: a layer's compacted cache and a decoding step, as dataclasses; what all of them check and derive.

Shapes: B batch, T queries, S entries, Hq query heads, H KV heads, G = Hq / H, D head dim, R ring slots, N pages of a pool, P entries
of a page, M model dim, K windows, L = H * K page lists.

Decisions with K > 1 windows w_1 < ... < w_K give each token a class: 1 = evicted by the first decision, j = evicted by the j-th and by none
before it, 0 = by none. A token of class j is gone for the queries more than w_j after it. Class 1 goes as it leaves the ring; the others
move to a page list of their KV head and class, list h * K for class 0 and h * K + j - 1 for class j.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from dms_kernels.dispatch import padded, target
from dms_kernels.quantization import KV_DTYPES, dequantize, scales_of_pages, stored_width

LOG2_E = math.log2(math.e)
# The lifetime of what stays for good: beyond any distance, and far enough from the largest int32 to be added to.
FOR_GOOD = 2**30
MAX_HEAD_DIM = 256
MAX_WINDOWS = 4
PAGE_SIZES = (16, 32, 64)
# What the kernels multiply; float64 is for plain PyTorch.
KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class Keys(NamedTuple):
    """Entries with positions: a ring, or tokens that are not in it yet."""

    k: Tensor
    """[B, H, S, D]"""
    v: Tensor
    """[B, H, S, D]"""
    position: Tensor | None = None
    """[B, S] int, within the document; -1: nothing there"""
    evicted: Tensor | None = None
    """[B, H, S] bool"""
    all_visible: bool = False
    """No entry is hidden from any query; position, evicted and state are not read then."""
    state: Tensor | None = None
    """[B, H, S] uint8, as in the ring: with several windows, in place of evicted"""

    def placed(self) -> tuple[Tensor, Tensor]:
        """position, and evicted or state, which decide what a query sees.

        Raises:
            ValueError: they are missing.
        """
        fate = self.evicted if self.state is None else self.state
        if self.position is None or fate is None:
            raise ValueError("the ring and the new tokens must come with their positions and decisions")
        return self.position, fate


@dataclass(frozen=True)
class Ring:
    """The last window + 1 tokens of each sequence, overwritten in turn: the token at position p is in slot p % (window + 1)."""

    kv: Tensor
    """[B, H, 2, R, D], keys and values; R may be below window + 1 as long as no sequence has more than R tokens"""
    state: Tensor
    """[B, H, R] uint8: 0 keep, 1 evict, 2 undecided; with several windows also j + 1 for the classes j from 2 on"""
    seq_len: Tensor
    """[B] int32: tokens of each sequence so far, of which the ring holds the last min(seq_len, window + 1)"""
    window: int
    """tokens after its own for which a token stays visible whatever was decided"""
    longer: tuple[int, ...] = ()
    """with several windows those after the first: w_2 < ... < w_K"""

    @property
    def windows(self) -> tuple[int, ...]:
        return (self.window, *self.longer)

    def check(self, B: int, D: int) -> None:
        """Raises ValueError unless this is the ring of B sequences with head dim D."""
        expect("ring.kv", self.kv, (B, None, 2, None, D))
        expect("ring.state", self.state, (B, self.kv.shape[1], self.kv.shape[3]), torch.uint8)
        expect("ring.seq_len", self.seq_len, (B,), torch.int32)
        check_windows("ring.window", self.windows)


class PageRun(NamedTuple):
    """Pages that are read in one product."""

    where: slice | Tensor
    """a slice of the pool, or page numbers [n]"""
    owner: Tensor
    """[n, sharers] int64: b * H + h of each head that has the page, B * H for none"""
    bias: Tensor
    """[n, P]: 0 for entries, -inf elsewhere; that of pages which are not full is made anew at each reading"""
    part: Tensor
    """[m]: the pages of the n that are not full"""
    holder: Tensor
    """[m]: b * H + h of the head that has each of them; with several windows the list's place in num_kept"""
    start: Tensor
    """[m]: entries of that head, or list, before the page"""
    lifetime: Tensor | None = None
    """[n] int32: how far behind a query entries are visible; None: any query sees them"""
    is_front: bool = False
    """all are shared pages of which the newest token may see a part"""
    part_page: Tensor | None = None
    """[m]: with several windows, where no page is shared: the numbers of the pages in `part`, which has those too of which the newest token
    may see a part"""
    part_owner: Tensor | None = None
    """[m]: b * H + h of each of them"""
    part_lifetime: Tensor | None = None
    """[m, 1]: `lifetime` of each of them"""


class ReadOrder(NamedTuple):
    """In which products plain PyTorch reads a cache's pages; see `cached_attention.make_read_order`."""

    runs: list[PageRun]
    owner: Tensor
    """[B * H + all runs' n * sharers]: the ring's heads, then the owners of all runs"""
    entry: Tensor
    """0 to P - 1"""


@dataclass(frozen=True)
class PagedKV:
    """Entries in pages: of each head the first num_kept in the order of its page table. Every query sees all of them.

    With several windows each head has K such lists, and a query at position q sees an entry of a list that does not stay for good iff
    q - position <= its window. Such a list gives back its front page as soon as all entries in it are gone for the newest stored token: its
    row of the table moves left by one place, and num_kept falls by P, or to 0.
    """

    pages: Tensor
    """[N, 2, P, D], keys and values; P 16, 32 or 64; the ring's dtype, or one of `quantization.KV_DTYPES` beside page_scales: int8, float8_e4m3fn,
    or uint8 [N, 2, P, D / 2] with four bits of two components in a byte"""
    page_table: Tensor
    """[B, H, max_pages] int32: each head's pages, oldest first; behind its last page anything. With several windows [B, L, max_pages]: each
    list's"""
    num_kept: Tensor
    """[B, H] int32; with several windows [B, L]"""
    page_scales: Tensor | None = None
    """[N, 2, P] float32, of uint8 pages [N, 2, P, 3, D / g] int16: the scales of each quantised key and value, as `quantization.quantize` gives
    them"""
    read_order: ReadOrder | None = None
    """of this table, for `cached_attention`; None: pages are gathered through the table, and nothing is read from the device"""
    positions: Tensor | None = None
    """[N, P] int32: of each entry, in its document, where there are several windows"""
    windows: tuple[int, ...] = ()
    """where there are several: w_1 < ... < w_K, of which the first is the ring's"""
    newest_only: bool = False
    """the queries are those of the newest stored tokens: of all pages only lists' front pages are partly gone for them"""
    newest: int | None = None
    """beside newest_only: the position of all those tokens, where it is one and none is padding; then queries need no positions"""

    @property
    def num_lists(self) -> int:
        """Page lists of a head."""
        return max(1, len(self.windows))

    def list_lifetimes(self) -> Tensor:
        """[K] int32: how far behind a query the entries of each list of a head are visible."""
        return torch.tensor([FOR_GOOD, *self.windows[1:]], dtype=torch.int32, device=self.pages.device)

    def check(self, B: int, H: int, D: int, dtype: torch.dtype) -> None:
        """Raises ValueError unless these are the pages of B sequences with H KV heads, beside entries of this dtype."""
        expect("pages", self.pages, (None, 2, None, stored_width(D, self.pages.dtype)))
        N, _, P, _ = self.pages.shape
        if P not in PAGE_SIZES:
            raise ValueError(f"a page holds {P} entries; it should hold one of {PAGE_SIZES}")
        expect("page_table", self.page_table, (B, H * self.num_lists, None), torch.int32)
        expect("num_kept", self.num_kept, (B, H * self.num_lists), torch.int32)
        if self.windows:
            check_windows("windows", self.windows)
            expect("positions", self.positions, (N, P), torch.int32)
        elif self.positions is not None:
            raise ValueError("positions belong to pages of several windows, and windows is empty")
        quantized = ", ".join(str(kind) for kind in KV_DTYPES.values())
        scales = scales_of_pages((N, 2, P), D, self.pages.dtype)
        if scales is not None:
            expect("page_scales", self.page_scales, *scales)
        elif self.pages.dtype != dtype:
            raise ValueError(f"pages are {self.pages.dtype} beside entries of {dtype}; they should be of that, or one of {quantized}")
        elif self.page_scales is not None:
            raise ValueError(f"page_scales belong to pages of one of {quantized}, and these are {self.pages.dtype}")
        expect_contiguous(pages=self.pages, page_scales=self.page_scales, positions=self.positions)
        tensors = (self.pages, self.page_table, self.num_kept, self.page_scales, self.positions)
        devices = {x.device for x in tensors if x is not None}
        if len(devices) > 1:
            raise ValueError(f"pages, page_table, num_kept, page_scales and positions are on {devices}; move them to one device")


@dataclass(frozen=True)
class FreePages:
    """Which pages of a pool are taken: a stack of free ones, of which the last is taken first."""

    free: Tensor
    """[N] int32: the first num_free are the numbers of free pages"""
    num_free: Tensor
    """[] int64"""
    references: Tensor
    """[N + 1] int32: how many heads have each page"""

    def check(self, N: int) -> None:
        """Raises ValueError unless this is of a pool of N pages."""
        expect("free", self.free, (N,), torch.int32)
        expect("num_free", self.num_free, (), torch.int64)
        expect("references", self.references, (N + 1,), torch.int32)


@dataclass(frozen=True)
class GateInputs:
    """A gate that is still to decide. It evicts where scale * (hidden weight + bias) - offset + evict_bias > 0, in float32.

    With K windows it gives K decisions: output h * K + j is head h's for window j.
    """

    hidden: Tensor
    """[B, M]"""
    weight: Tensor
    """[H or 1, M] float32; of K windows [H * K or K, M]"""
    bias: Tensor
    """[H or 1] float32, or [H * K or K]"""
    scale: float = 1.0
    offset: float = 0.0
    normalize: bool = False
    """divide hidden by its RMS first"""
    evict_bias: float = 0.0

    def check(self, B: int, H: int, K: int = 1) -> None:
        outputs = K if self.weight.shape[0] == K else H * K
        expect("gate.hidden", self.hidden, (B, None))
        expect("gate.weight", self.weight, (outputs, self.hidden.shape[1]), torch.float32)
        expect("gate.bias", self.bias, (outputs,), torch.float32)


@dataclass(frozen=True)
class NewToken:
    """What one decoding step brings to a layer: a token a sequence, as projections give it. Each operation rounds as PyTorch's would."""

    k: Tensor
    """[B, H, D]"""
    v: Tensor
    """[B, H, D]"""
    evict: Tensor | GateInputs
    """[B, H] bool, of K windows [B, H, K]: the decisions; or the gate that takes them"""
    q: Tensor | None = None
    """[B, Hq, D], to be normed and rotated as k is; None: there are none"""
    q_norm: Tensor | None = None
    """[D]: weight of an RMSNorm of q before the rotation; None: no norm"""
    k_norm: Tensor | None = None
    norm_eps: float = 1e-6
    cos: Tensor | None = None
    """[B or 1, rot], rot <= D and even: rotary embedding of the first rot dims of q and k, in halves; None: no rotation"""
    sin: Tensor | None = None
    real: Tensor | None = None
    """[B] bool: False for sequences without a new token, which stay as they are; None: all have one"""

    def check(self, K: int = 1) -> None:
        """Raises ValueError where these do not go together, for K windows."""
        expect("k", self.k, (None, None, None))
        B, H, D = self.k.shape
        expect("v", self.v, (B, H, D), self.k.dtype)
        if isinstance(self.evict, GateInputs):
            self.evict.check(B, H, K)
        else:
            expect("evict", self.evict, (B, H) if K == 1 else (B, H, K), torch.bool)
        if self.real is not None:
            expect("real", self.real, (B,), torch.bool)
        if self.q is not None:
            expect("q", self.q, (B, None, D), self.k.dtype)
            check_heads(self.q.shape[1], H)
        elif self.q_norm is not None:
            raise ValueError("q_norm belongs to q, and there is none")
        for name, norm in (("q_norm", self.q_norm), ("k_norm", self.k_norm)):
            if norm is not None:
                expect(name, norm, (D,))
        if (self.cos is None) != (self.sin is None):
            raise ValueError("cos and sin come together")
        if self.cos is not None:
            expect("cos", self.cos, (1 if self.cos.shape[0] == 1 else B, None))
            expect("sin", self.sin, tuple(self.cos.shape), self.cos.dtype)
            if self.cos.shape[1] > D or self.cos.shape[1] % 2:
                raise ValueError(f"cos has {self.cos.shape[1]} dims; it should have an even number, at most the head's {D}")


@dataclass(frozen=True)
class Counters:
    """What a step counts, and what its programs tell each other by."""

    evicted: Tensor
    """[B, H] int64: decisions to evict, sinks' included; of several windows those by which a token goes sooner or later"""
    decided: Tensor
    """[B] int64: decisions"""
    overflow: Tensor
    """[1] int32, becomes 1 where there was no free page or no place in the table: the entry that left the ring is lost then, and
    everything else is as usual; or no slot in the ring: the sequence stays as it is then"""
    ticket: Tensor
    """[B] int32, of several windows [B + 1], whose last locks the free pages: zeros, and zeros again afterwards"""

    def check(self, B: int, H: int, K: int = 1) -> None:
        expect("evicted", self.evicted, (B, H), torch.int64)
        expect("decided", self.decided, (B,), torch.int64)
        expect("overflow", self.overflow, (1,), torch.int32)
        expect("ticket", self.ticket, (B if K == 1 else B + 1,), torch.int32)


@dataclass(frozen=True)
class PendingKV:
    """Tokens that are not in the ring yet."""

    k: Tensor
    """[B, H, S, D], the ring's dtype"""
    v: Tensor
    """[B, H, S, D]"""
    position: Tensor
    """[B, S] int32; -1: padding"""
    state: Tensor
    """[B, H, S] uint8, as in the ring"""

    def check(self, B: int, ring: Ring) -> None:
        _, H, _, _, D = ring.kv.shape
        expect("pending.k", self.k, (B, H, None, D), ring.kv.dtype)
        S = self.k.shape[2]
        expect("pending.v", self.v, (B, H, S, D), ring.kv.dtype)
        expect("pending.position", self.position, (B, S), torch.int32)
        expect("pending.state", self.state, (B, H, S), torch.uint8)


@dataclass(frozen=True)
class AttentionCall:
    """Sizes of a call of an attention kernel, and the factors that make its scores exponents of 2."""

    B: int
    T: int
    H: int
    G: int
    D: int
    scale: float
    """factor on q.k"""
    softcap: float | None
    """scores become softcap * tanh(score / softcap); None: they stay as they are"""

    @property
    def block_d(self) -> int:
        return padded(self.D)

    @property
    def scale2(self) -> float:
        """q.k to an exponent of 2, without a softcap"""
        return self.scale * LOG2_E

    @property
    def cap_in(self) -> float:
        """q.k to twice the tanh's argument, as an exponent of 2; 0 without a softcap"""
        return 2 * LOG2_E * self.scale / self.softcap if self.softcap else 0.0

    @property
    def cap_out(self) -> float:
        """the tanh to an exponent of 2; 0 without a softcap"""
        return self.softcap * LOG2_E if self.softcap else 0.0

    @property
    def factor(self) -> float:
        """On q.k: `scale2`, or with a softcap `cap_in`."""
        return self.scale2 if self.softcap is None else self.cap_in


def expect(name: str, tensor: Tensor | None, shape: tuple[int | None, ...], *dtypes: torch.dtype) -> None:
    """Raises ValueError unless there is a tensor of this shape (None in it: any size) and of one of these dtypes (none: any)."""
    if tensor is None:
        raise ValueError(f"{name} is missing")
    if len(tensor.shape) != len(shape) or any(want not in (None, have) for have, want in zip(tensor.shape, shape, strict=True)):
        raise ValueError(f"{name} is {tuple(tensor.shape)} and should be {tuple('any' if n is None else n for n in shape)}")
    if dtypes and tensor.dtype not in dtypes:
        raise ValueError(f"{name} is {tensor.dtype} and should be {' or '.join(map(str, dtypes))}")


def check_count(name: str, number: int) -> None:
    if not isinstance(number, int) or isinstance(number, bool) or number < 0:
        raise ValueError(f"{name} must be an integer of 0 or more, got {number!r}")


def check_windows(name: str, windows: Sequence[int]) -> None:
    """Raises ValueError unless these are 1 to 4 rising numbers of tokens."""
    for window in windows:
        check_count(name, window)
    if not 1 <= len(windows) <= MAX_WINDOWS or list(windows) != sorted(set(windows)):
        raise ValueError(f"{name} must be one number of tokens, or up to {MAX_WINDOWS} rising ones, got {tuple(windows)}")


def state_lifetimes(windows: tuple[int, ...], device: torch.device) -> Tensor:
    """[K + 2] int32, by a token's state: how far behind a query it is visible."""
    return torch.tensor([FOR_GOOD, windows[0], FOR_GOOD, *windows[1:]], dtype=torch.int32, device=device)


def check_same_windows(ring: Ring, paged: PagedKV | None) -> None:
    """Raises ValueError where ring and pages are of different windows; one window is the ring's alone."""
    if paged is not None and (paged.windows or len(ring.windows) > 1) and paged.windows != ring.windows:
        raise ValueError(f"the pages are of windows {paged.windows} and the ring of {ring.windows}; give both the same")


def check_slot(slot: Tensor | None, B: int, num_rows: int) -> int:
    """How many rows a cache must have that B sequences use. Raises ValueError unless slot is None or [B] int32."""
    if slot is None:
        return B
    expect("slot", slot, (B,), torch.int32)
    if num_rows < B:
        raise ValueError(f"slot is of {B} sequences and the cache has {num_rows} rows; give one with a row for each, those in slot -1 too")
    return num_rows


def in_slots(slot: Tensor | None, ring: Ring, paged: PagedKV | None) -> tuple[Ring, PagedKV | None]:
    """What each sequence sees of a cache, its own row of it; in slot -1 nothing."""
    if slot is None:
        return ring, paged
    row, there = slot.clamp(min=0), (slot >= 0).int()

    def of(x: Tensor) -> Tensor:
        return x.index_select(0, row)

    chosen = replace(ring, kv=of(ring.kv), state=of(ring.state), seq_len=of(ring.seq_len) * there)
    if paged is None:
        return chosen, None
    return chosen, replace(paged, page_table=of(paged.page_table), num_kept=of(paged.num_kept) * there[:, None], read_order=None)


def check_heads(num_query_heads: int, num_kv_heads: int) -> None:
    if num_kv_heads == 0 or num_query_heads % num_kv_heads:
        raise ValueError(f"query heads must be a multiple of KV heads, got Hq={num_query_heads} in q and H={num_kv_heads} in k")


def check_scores(scale: float, softcap: float | None, sink_logits: Tensor | None, num_query_heads: int) -> None:
    """Raises ValueError unless these are an attention's factor, cap (or None) and sink logits (or None)."""
    for name, number in {"scale": scale, "softcap": softcap}.items():
        if number is None and name == "softcap":
            continue
        if not isinstance(number, (int, float)) or not math.isfinite(number) or number <= 0:
            raise ValueError(f"{name} must be a finite number above 0, got {number!r}")
    if sink_logits is not None and (sink_logits.shape != (num_query_heads,) or not sink_logits.is_floating_point()):
        raise ValueError(f"sink_logits must be floating point [Hq={num_query_heads}], got {sink_logits.dtype} {tuple(sink_logits.shape)}")


def check_devices(like: Tensor, **tensors: Tensor | None) -> None:
    """Raises ValueError unless all that are not None lie where q does."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device != like.device:
            raise ValueError(f"{name} is on {tensor.device} but q is on {like.device}; move them to one device")


def kernel_problem(x: Tensor, pages: Tensor | None = None) -> str | None:
    """What keeps kernels from taking queries or keys such as x [..., D], and pages, which are valid otherwise; None: nothing."""
    if x.dtype not in KERNEL_DTYPES:
        return f"the kernels compute in float32, float16 or bfloat16, and these inputs are {x.dtype}"
    if x.shape[-1] > MAX_HEAD_DIM:
        return f"the kernels take head dims up to {MAX_HEAD_DIM}, and this is {x.shape[-1]}"
    if pages is not None and pages.dtype == torch.float8_e4m3fn and target(x.device).capability < 89:
        return "pages in float8 need compute capability 8.9 or later"
    return None


def expect_contiguous(**tensors: Tensor | None) -> None:
    """Raises ValueError where a tensor that kernels read and write in place is a view with other strides."""
    for name, tensor in tensors.items():
        if tensor is not None and not tensor.is_contiguous():
            raise ValueError(f"{name} is not contiguous, strides {tensor.stride()}; kernels read and write it in place: make it contiguous")


def with_dense_rows(x: Tensor) -> Tensor:
    """The kernels take any strides but the last."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def strides(x: Tensor | None, num_dims: int) -> tuple[int, ...]:
    """Of the first dims. A dim of a single element may have any stride, and each would be compiled for: it has 0 here, so that a row
    is also read for all of a batch."""
    return (0,) * num_dims if x is None else tuple(0 if x.shape[i] == 1 else x.stride(i) for i in range(num_dims))


def read_pages(paged: PagedKV, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """In plain PyTorch, without reading from the device: k and v [B, H, S, D] of all that the table lists, whatever lies where there is no
    entry, and which of it are entries [B, H, S] bool. S is max_pages * P, with several windows K times that: a head's lists one after the
    other."""
    B, num_lists, max_pages = paged.page_table.shape
    P = paged.pages.shape[2]
    H, S = num_lists // paged.num_lists, paged.num_lists * max_pages * P
    there = torch.arange(max_pages * P, device=paged.pages.device) < paged.num_kept[..., None]
    at = _listed(paged)
    taken = paged.pages[at]
    if paged.page_scales is not None:
        taken = dequantize(taken, paged.page_scales[at], 3)
    taken = taken.to(dtype)
    k, v = (taken[:, :, :, i].reshape(B, H, S, taken.shape[-1]) for i in (0, 1))
    return k, v, there.view(B, H, S)


def seen_entries(paged: PagedKV, there_BHS: Tensor, q_position_BT: Tensor) -> Tensor:
    """Which of `read_pages`' entries each query sees, [B, H, T, S] bool; T is 1 where all queries see the same."""
    if paged.positions is None:
        return there_BHS[:, :, None]
    lifetime_S = paged.list_lifetimes()[:, None].expand(-1, there_BHS.shape[2] // paged.num_lists).flatten()
    last_BHS = paged.positions[_listed(paged)].view_as(there_BHS) + lifetime_S
    return there_BHS[:, :, None] & (q_position_BT[:, None, :, None] <= last_BHS[:, :, None])


def _listed(paged: PagedKV) -> Tensor:
    """page_table as int64, 0 behind each list's last page, where it may hold any number."""
    P = paged.pages.shape[2]
    used = torch.arange(paged.page_table.shape[2], device=paged.pages.device) * P < paged.num_kept[..., None]
    return paged.page_table.long().masked_fill(~used, 0)
