"""The distillation loss in Triton: as `chunked`, with everything between the matrix products in two or three passes.

Per chunk: one product for the student's and the teacher's logits where they share a head, in the inputs' dtype; a pass
over them for the divergences; a pass that writes the gradient over the student's logits; the products that take it to
the hidden states and the head.

Letters: N tokens, K valid ones, n tokens of a chunk, M model dim, V vocabulary; s student, t teacher.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dms_kernels import dispatch

# Programs that share a row.
_MOST_PARTS = 64


def distill_loss_fused(
    hidden_s: Tensor,
    hidden_t: Tensor,
    head_weight: Tensor,
    *,
    head_bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    beta: float,
    valid: Tensor,
    chunk: int,
    teacher_head_weight: Tensor | None = None,
    teacher_head_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Same arguments and results as `dms_kernels.distill_loss`, unchecked."""
    with_grad = torch.is_grad_enabled()
    total, *_ = _distill_loss(
        hidden_s,
        hidden_t.detach(),
        head_weight,
        head_bias,
        None if teacher_head_weight is None else teacher_head_weight.detach(),
        None if teacher_head_bias is None else teacher_head_bias.detach(),
        valid,
        float(logit_scale),
        None if softcap is None else float(softcap),
        float(beta),
        chunk,
        with_grad and hidden_s.requires_grad,
        with_grad and head_weight.requires_grad,
        with_grad and head_bias is not None and head_bias.requires_grad,
    )
    return total, valid.sum()


def problem_of(hidden: Tensor) -> str | None:
    """Why the kernels cannot take such hidden states, for `dispatch`."""
    if hidden.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"the kernels take float16, bfloat16 and float32, and the hidden states are {hidden.dtype}"
    if hidden.dtype == torch.bfloat16 and hidden.device.type == "cpu":
        return "Triton's interpreter does not compute bfloat16 rightly"
    return None


def bytes_per_row(vocab_size: int, model_dim: int, dtype: torch.dtype) -> int:
    """The most that `distill_loss_fused` holds for each row of a chunk: what `_Chunk` allocates, and the product for its gradient."""
    logits = 2 * _row_stride(vocab_size) * dtype.itemsize
    statistics = (5 * _MOST_PARTS + 6) * torch.float32.itemsize
    return logits + 3 * model_dim * dtype.itemsize + statistics


@torch.library.custom_op(f"{dispatch.NAMESPACE}::distill_loss", mutates_args=())
def _distill_loss(
    hidden_s: Tensor,
    hidden_t: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    weight_t: Tensor | None,
    bias_t: Tensor | None,
    valid: Tensor,
    logit_scale: float,
    softcap: float | None,
    beta: float,
    chunk: int,
    needs_hidden: bool,
    needs_weight: bool,
    needs_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The loss and its gradients by the student's hidden states, head and bias; those not needed are empty.

    weight_t None: the student's head, bias included, is the teacher's.
    """
    dispatch.count("distill_loss", "triton")
    grad_hidden_NM = torch.zeros_like(hidden_s) if needs_hidden else hidden_s.new_empty(0)
    grad_weight_VM = torch.zeros_like(weight, dtype=torch.float32) if needs_weight else weight.new_empty(0)
    grad_bias_V = torch.zeros_like(bias, dtype=torch.float32) if needs_bias and bias is not None else weight.new_empty(0)
    with torch.cuda.device_of(hidden_s), torch.autocast(hidden_s.device.type, enabled=False):
        index_K, live_K = _rows(valid)
        loss_K = torch.empty(index_K.numel(), dtype=torch.float32, device=hidden_s.device)
        rows = min(chunk, index_K.numel())
        if rows:
            work = _Chunk(rows, weight, bias, weight_t, bias_t, logit_scale, softcap, beta)
        for begin in range(0, index_K.numel(), chunk):
            index_n = index_K[begin : begin + chunk]
            live_n = None if live_K is None else live_K[begin : begin + chunk]
            hidden_nM = work.make_logits(hidden_s, hidden_t, index_n, live_n)
            work.diverge(live_n, out=loss_K[begin : begin + chunk])
            if not (needs_hidden or needs_weight or needs_bias):
                continue
            grad_nV = work.make_gradients()
            if needs_bias:
                grad_bias_V += grad_nV.sum(0, dtype=torch.float32)
            if needs_hidden and index_K.numel() == valid.numel():
                torch.mm(grad_nV, weight, out=grad_hidden_NM[begin : begin + chunk])
            elif needs_hidden:
                grad_hidden_NM.index_copy_(0, index_n, torch.mm(grad_nV, weight))
            if needs_weight:
                _add_product(grad_weight_VM, grad_nV.T, hidden_nM)
        total = loss_K.sum(dtype=torch.float64).float()
    return total, grad_hidden_NM, grad_weight_VM, grad_bias_V


@_distill_loss.register_fake
def _(hidden_s, hidden_t, weight, bias, weight_t, bias_t, valid, logit_scale, softcap, beta, chunk, needs_hidden, needs_weight, needs_bias):
    return (
        hidden_s.new_empty((), dtype=torch.float32),
        torch.empty_like(hidden_s) if needs_hidden else hidden_s.new_empty(0),
        torch.empty_like(weight, dtype=torch.float32) if needs_weight else weight.new_empty(0),
        torch.empty_like(bias, dtype=torch.float32) if needs_bias else weight.new_empty(0),
    )


def _setup_context(ctx, inputs, output):
    *_, needs_hidden, needs_weight, needs_bias = inputs
    ctx.needs = needs_hidden, needs_weight, needs_bias
    ctx.dtype = inputs[0].dtype
    # The gradients come along for the backward: nobody differentiates them, and no zeros of their size are wanted.
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[1:])


@once_differentiable
def _backward(ctx, grad_total, *_):
    grad_hidden, grad_weight, grad_bias = (
        (grad * grad_total).to(ctx.dtype) if needed and grad_total is not None else None
        for grad, needed in zip(ctx.saved_tensors, ctx.needs, strict=True)
    )
    return grad_hidden, None, grad_weight, grad_bias, *(None,) * 10


_distill_loss.register_autograd(_backward, setup_context=_setup_context)


def _rows(valid: Tensor) -> tuple[Tensor, Tensor | None]:
    """Indices of the rows to compute, and which of them count (None: all). Their number is read back from the device,
    unless a CUDA graph is being captured: there every row is computed, and those that don't count are multiplied by 0."""
    if _is_capturing(valid):
        return torch.arange(valid.numel(), device=valid.device), valid.contiguous()
    return valid.nonzero().squeeze(1), None


def _is_capturing(tensor: Tensor) -> bool:
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


@dataclass(frozen=True)
class LossLaunch:
    """Sizes of the passes over logits: a thread holds `unroll` times 16 bytes of each side at a time."""

    unroll: int
    lanes: int
    num_warps: int
    parts: int


def launch(target: dispatch.Target, itemsize: int, num_rows: int, V: int) -> LossLaunch:
    """parts: programs of a row; several waves of them over the processors, and each long enough to be worth starting."""
    unroll, lanes, num_warps = 2, 256, 8
    wanted = -(-target.num_processors * 64 // max(num_rows, 1))
    most = max(1, V // (4 * unroll * lanes * (16 // itemsize)))
    return LossLaunch(unroll, lanes, num_warps, max(1, min(wanted, most, _MOST_PARTS)))


def _row_stride(vocab_size: int) -> int:
    # Rows begin at multiples of 16 elements, so that loads are 16 bytes wide and the products' leading dimension suits.
    return -(-vocab_size // 16) * 16


class _Chunk:
    """The buffers of a chunk, allocated once, and what is done in them."""

    def __init__(self, rows, weight, bias, weight_t, bias_t, logit_scale, softcap, beta):
        V, M = weight.shape
        self.V, self.weight, self.weight_t = V, weight, weight_t
        bias_t = bias if weight_t is None else bias_t
        self.bias, self.bias_t = (None if x is None else x.contiguous() for x in (bias, bias_t))
        self.beta, self.scale = beta, logit_scale
        self.has_cap = softcap is not None
        # What becomes of a product: see divergence.py.
        self.inner = logit_scale / softcap if self.has_cap else 1.0
        self.unit = (softcap if self.has_cap else abs(logit_scale)) * math.log2(math.e)
        self.flip = logit_scale < 0 and not self.has_cap
        self.hidden_2nM = weight.new_empty(2 * rows, M)
        self.logits_2nV = weight.new_empty(2 * rows, _row_stride(V))[:, :V]
        self.width = 16 // weight.element_size()
        self.launch = launch(dispatch.target(weight.device), weight.element_size(), rows, V)
        self.tile = self.launch.unroll * self.launch.lanes * self.width
        self.tiles = -(-V // (self.launch.parts * self.tile))
        self.parts = -(-V // (self.tiles * self.tile))
        self.partial = torch.empty(5 * rows * self.parts, dtype=torch.float32, device=weight.device)
        self.constants = torch.empty(6 * rows, dtype=torch.float32, device=weight.device)
        self.num_rows = 0

    def make_logits(self, hidden_s: Tensor, hidden_t: Tensor, index_n: Tensor, live_n: Tensor | None) -> Tensor:
        """Fills the logits' buffer with the rows' products, student first; gives the student's hidden states back."""
        self.num_rows = n = index_n.numel()
        hidden_2nM, logits_2nV = self.hidden_2nM[: 2 * n], self.logits_2nV[: 2 * n]
        torch.index_select(hidden_s, 0, index_n, out=hidden_2nM[:n])
        torch.index_select(hidden_t, 0, index_n, out=hidden_2nM[n:])
        if live_n is not None:
            hidden_2nM.masked_fill_(~live_n.repeat(2)[:, None], 0.0)
        if self.weight_t is None:
            torch.mm(hidden_2nM, self.weight.T, out=logits_2nV)
        else:
            torch.mm(hidden_2nM[:n], self.weight.T, out=logits_2nV[:n])
            torch.mm(hidden_2nM[n:], self.weight_t.T, out=logits_2nV[n:])
        return hidden_2nM[:n]

    def diverge(self, live_n: Tensor | None, out: Tensor) -> None:
        """The rows' divergences, in nats."""
        from dms_kernels.distill_loss.divergence import merge_mixture, merge_statistics, mixture_divergences, row_statistics

        n, rows, num_warps = self.num_rows, 16, self.launch.num_warps
        row_statistics[(n, self.parts)](
            *self._logits(),
            self.partial,
            *self._sizes(),
            KIND=self._kind(),
            **self._options(),
            UNROLL=self.launch.unroll,
            LANES=self.launch.lanes,
            WIDTH=self.width,
            num_warps=num_warps,
        )
        merging = {"ROWS": rows, "PARTS": 1 << (self.parts - 1).bit_length(), "num_warps": 4}
        live = self.constants if live_n is None else live_n
        merge_statistics[(-(-n // rows),)](
            self.partial, live, self.constants, out, n, self.parts, KIND=self._kind(), HAS_LIVE=live_n is not None, **merging
        )
        if 0 < self.beta < 1:
            mixture_divergences[(n, self.parts)](
                *self._logits(),
                self.constants,
                self.partial,
                *self._sizes(),
                self.beta,
                **self._options(),
                BLOCK=self.tile,
                num_warps=num_warps,
            )
            merge_mixture[(-(-n // rows),)](self.partial, self.constants, out, n, self.parts, self.beta, **merging)

    def make_gradients(self) -> Tensor:
        """[n, V] the gradients by the student's products, written over its logits."""
        from dms_kernels.distill_loss.divergence import write_gradients

        # The passes reckon in bits, except that the forward KL's gradient holds no logarithm.
        nats = math.log(2) if self.beta > 0 else 1.0
        share = 1.0 - self.beta if self.beta < 1 else 1.0
        write_gradients[(self.num_rows, self.parts)](
            *self._logits(),
            self.constants,
            *self._sizes(),
            self.beta,
            self.scale * share * nats,
            KIND=self._kind(),
            **self._options(),
            BLOCK=self.tile,
            num_warps=self.launch.num_warps,
        )
        return self.logits_2nV[: self.num_rows]

    def _kind(self) -> int:
        from dms_kernels.distill_loss.divergence import BETWEEN, FORWARD, REVERSE

        kind = {0.0: FORWARD, 1.0: REVERSE}.get(self.beta, BETWEEN)
        return kind.value

    def _logits(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        n = self.num_rows
        # A bias that is not there is not read; something must stand in its place.
        bias, bias_t = (self.constants if x is None else x for x in (self.bias, self.bias_t))
        return self.logits_2nV[:n], self.logits_2nV[n : 2 * n], bias, bias_t

    def _sizes(self) -> tuple[int, int, int, int, float, float]:
        return self.logits_2nV.stride(0), self.V, self.tiles, self.num_rows, self.inner, self.unit

    def _options(self) -> dict[str, bool]:
        return {
            "HAS_BIAS_S": self.bias is not None,
            "HAS_BIAS_T": self.bias_t is not None,
            "HAS_CAP": self.has_cap,
            "FLIP": self.flip,
        }


def _add_product(sum_VM: Tensor, grad_Vn: Tensor, hidden_nM: Tensor) -> None:
    """Adds a product of halves to a float32 sum, without a copy of the sum's size where the device's library can."""
    if grad_Vn.dtype == torch.float32:
        sum_VM.addmm_(grad_Vn, hidden_nM)
    elif grad_Vn.is_cuda:
        torch.addmm(sum_VM, grad_Vn, hidden_nM, out_dtype=torch.float32, out=sum_VM)
    else:
        sum_VM.addmm_(grad_Vn.float(), hidden_nM.float())
