"""Training attention without its work: it computes nothing, and saves and allocates what the real one would by the route that it took.

Shapes: B batch, T tokens, Hq query heads, H KV heads, G = Hq / H, D head dim.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from dms import hf_compat
from dms.borrowed import attend_without, query_source
from dms.modes import state_of
from dms.training.packed_attention import PackedAttention

# Scores of one block of the chunked route, as `dms_kernels.gated_attention.chunked` sizes it on a CPU.
_CHUNKED_TILE, _CHUNKED_ROWS = 2**18, (16, 128)


@contextmanager
def replaced_attention(model: nn.Module, attend: Callable[..., torch.Tensor]) -> Iterator[None]:
    """Within it gated layers of a retrofitted model attend in training by a function of the same arguments as
    `dms.training.soft_decisions.train_attention`, in recomputations too."""

    def replace(module: Any, *_) -> None:
        pending = module.dms_pending
        if pending is None:
            return
        if pending.func is attend_without:
            module.dms_pending = functools.partial(attend_without, functools.partial(attend, **pending.args[0].keywords))
        else:
            module.dms_pending = functools.partial(attend, **pending.keywords)

    state = state_of(model)
    if state.config.is_borrowed:
        # Decided where the queries are made.
        hooks = [query_source(layer).register_forward_hook(lambda *_, module=layer.module: replace(module)) for layer in state.layers]
    else:
        hooks = [layer.module.register_forward_pre_hook(replace) for layers in (state.layers, state.following) for layer in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def stand_in_attention(query, key, value, *, log_keep_BTH, kernels: bool, s_aux=None, **_) -> torch.Tensor:
    """As `dms.training.soft_decisions.train_attention`. query [B, Hq, T, D], key and value [B, H, T, D] -> [B, T, Hq, D]."""
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    if torch.is_autocast_enabled("cpu"):
        # As the real one does: rotation by float32 angles leaves float32.
        q, k, v = (x.to(torch.get_autocast_dtype("cpu")) for x in (q, k, v))
    return _StandIn.apply(q, k, v, log_keep_BTH, s_aux, kernels)


class StandInPackedAttention(PackedAttention):
    """As `PackedAttention`, for sequences that lie in one process."""

    def __init__(self, kernels: bool):
        super().__init__()
        self.kernels, self.attention_name = kernels, f"dms_planned_rows_{'kernels' if kernels else 'chunked'}"
        hf_compat.register_attention(self.attention_name, self._attention)

    def _attention(self, module, query, key, value, attention_mask, sliding_window=None, **kwargs):
        pending = getattr(module, "dms_pending", None)
        if pending is not None:
            module.dms_pending = None
            return pending(query, key, value, **kwargs), None
        log_keep = None if sliding_window is None else key.new_empty(key.shape[0], key.shape[2], key.shape[1], dtype=torch.float32)
        return stand_in_attention(query, key, value, log_keep_BTH=log_keep, kernels=self.kernels, **kwargs), None


class _StandIn(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q_BTHqD, k_BTHD, v_BTHD, log_keep_BTH, sink_logits, kernels):
        B, T, Hq, D = q_BTHqD.shape
        lse_BHqT = q_BTHqD.new_empty(B, Hq, T, dtype=torch.float32)
        if kernels:
            # Without gates there are no far keys to choose from.
            norms = () if log_keep_BTH is None else (torch.empty_like(lse_BHqT), lse_BHqT.new_empty(k_BTHD.shape[:3]))
            workspace = [] if log_keep_BTH is None else _lists(k_BTHD, log_keep_BTH)
        else:
            norms = ()
            # The own scores' product copies the queries.
            workspace = [torch.empty_like(q_BTHqD), _block(q_BTHqD, k_BTHD, 1), *_far(k_BTHD)]
        out_BTHqD = q_BTHqD.new_empty(B, T, Hq, D)
        ctx.kernels = kernels
        ctx.save_for_backward(q_BTHqD, k_BTHD, v_BTHD, log_keep_BTH, sink_logits, out_BTHqD, lse_BHqT, *norms)
        del workspace
        return out_BTHqD

    @staticmethod
    def backward(ctx, grad_out):
        inputs = ctx.saved_tensors[:5]
        q_BTHqD, k_BTHD = inputs[:2]
        # With documents or padding the gradient is masked first; then a sum for each row.
        workspace = [torch.empty_like(grad_out)]
        if ctx.kernels:
            lists = [] if inputs[3] is None else _lists(k_BTHD, inputs[3])
            workspace += [*lists, *(torch.empty_like(ctx.saved_tensors[6]) for _ in range(2))]
        else:
            workspace += [_block(q_BTHqD, k_BTHD, 2), *_far(k_BTHD), *_far(k_BTHD), *_far(k_BTHD)]
        grads = [torch.empty_like(x) if needed else None for x, needed in zip(inputs, ctx.needs_input_grad, strict=False)]
        del workspace
        return *grads, None


def _lists(k_BTHD: torch.Tensor, log_keep: torch.Tensor) -> list[torch.Tensor]:
    """The kernels' lists of far keys, one for each window (log_keep [B, T, H] or [B, T, H, K]), and those keys and values side by side."""
    num_windows = log_keep[0, 0, 0].numel()
    sizes = [k_BTHD.new_empty((num_windows, *k_BTHD.shape[:3]), dtype=torch.float32) for _ in range(4)]
    return [*(k_BTHD.new_empty((num_windows, *k_BTHD.shape)) for _ in range(2)), *sizes]


def _block(q_BTHqD: torch.Tensor, k_BTHD: torch.Tensor, num: int) -> torch.Tensor:
    T, G = q_BTHqD.shape[1], q_BTHqD.shape[2] // k_BTHD.shape[2]
    rows = min(max(_CHUNKED_TILE // (G * T), _CHUNKED_ROWS[0]), _CHUNKED_ROWS[1], T)
    return q_BTHqD.new_empty(num * rows * G * T, dtype=torch.float32)


def _far(k_BTHD: torch.Tensor) -> list[torch.Tensor]:
    """Far keys and values of one head."""
    return [k_BTHD.new_empty(k_BTHD.shape[1], k_BTHD.shape[3], dtype=torch.float32) for _ in range(2)]
