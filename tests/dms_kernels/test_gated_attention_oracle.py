"""The fused gated attention against PyTorch's own attention kernels, in float64: two calls, merged by their log-sum-exps.

Near is a sliding window. Far is causal attention of the queries after the window over the keys before it, the gate's bias
in one more dimension of the keys. The backward of each is PyTorch's too, given the log-sum-exp and the output of both, and
the gate's gradient is the added column of dK.
"""

import pytest
import torch
from largest import note

pytest.importorskip("triton")

from dms_kernels import dispatch, gated_attention
from dms_kernels.gated_attention import launch
from dms_kernels.gated_attention.reference import gated_attention_reference

pytestmark = pytest.mark.skipif(not dispatch.is_interpreted(), reason="these run in Triton's interpreter")

_FORWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def _stock_attention(q, k, v, log_keep, grad_out, window, scale):
    """out [B,T,Hq,D] and the gradients of q, k, v and log_keep. Only for window < T - 1: else there is no far part."""
    G, far = q.shape[2] // k.shape[2], window + 1
    T, D = q.shape[1], q.shape[3]
    q_BHqTD, grad_BHqTD = q.transpose(1, 2).contiguous(), grad_out.transpose(1, 2).contiguous()
    k_BHqTD, v_BHqTD = (x.repeat_interleave(G, 2).transpose(1, 2).contiguous() for x in (k, v))
    bias_BHqT1 = log_keep.repeat_interleave(G, 2).transpose(1, 2)[..., None]
    gap = torch.arange(T)[:, None] - torch.arange(T)
    mask = torch.zeros(T, T, dtype=q.dtype).masked_fill((gap < 0) | (gap > window), -torch.inf)
    near = q_BHqTD, k_BHqTD, v_BHqTD
    pad = torch.nn.functional.pad
    # scale (q k + log_keep / scale) = scale q k + log_keep; v has as many dimensions as k.
    long_q = pad(q_BHqTD[:, :, far:], (0, 1), value=1.0)
    long_k = torch.cat([k_BHqTD, bias_BHqT1 / scale], 3)[:, :, :-far]
    long = long_q, long_k, pad(v_BHqTD[:, :, :-far], (0, 1))

    near_out, near_lse = _FORWARD(*near, 0.0, False, attn_mask=mask, scale=scale)
    far_out, far_lse = _FORWARD(*long, 0.0, True, scale=scale)
    lse, out = near_lse.clone(), near_out.clone()
    lse[..., far:] = torch.logaddexp(near_lse[..., far:], far_lse)
    out *= (near_lse - lse).exp()[..., None]
    out[:, :, far:] += far_out[..., :D] * (far_lse - lse[..., far:]).exp()[..., None]

    grads = [*_BACKWARD(grad_BHqTD, *near, out, lse, 0.0, False, attn_mask=mask, scale=scale)]
    long_out, long_grad = (pad(x[:, :, far:], (0, 1)).contiguous() for x in (out, grad_BHqTD))
    grad_q, grad_k, grad_v = _BACKWARD(long_grad, *long, long_out, lse[..., far:].contiguous(), 0.0, True, scale=scale)
    grads[0][:, :, far:] += grad_q[..., :D]
    grads[1][:, :, :-far] += grad_k[..., :D]
    grads[2][:, :, :-far] += grad_v[..., :D]
    grad_gate = pad(grad_k[..., D] / scale, (0, far))
    # The copies of a KV head's keys for its G query heads.
    grad_k, grad_v, grad_gate = (x.unflatten(1, (-1, G)).sum(2).transpose(1, 2) for x in (*grads[1:], grad_gate))
    return out.transpose(1, 2), grads[0].transpose(1, 2), grad_k, grad_v, grad_gate


def _inputs(B, T, H, G, D):
    generator = torch.Generator().manual_seed(0)
    shapes = ((B, T, H * G, D), (B, T, H, D), (B, T, H, D), (B, T, H))
    *qkv, logits = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return [*qkv, torch.nn.functional.logsigmoid(6 * logits)]


def _ours(function, inputs, grad_out, window, scale):
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = function(*leaves, window=window, scale=scale, segment_ids=None)
    out.backward(grad_out)
    return out.detach(), *(x.grad for x in leaves)


@pytest.mark.parametrize(("shape", "window"), [((1, 37, 1, 3, 16), 5), ((2, 26, 2, 1, 8), 0)])
def test_kernels_equal_stock_attention(monkeypatch, shape, window):
    monkeypatch.setenv("DMS_KERNELS", "triton")
    monkeypatch.setattr(launch, "pick_tile", lambda *_: launch.Tile(16, 16, 4, 2))
    inputs = _inputs(*shape)
    grad_out = torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    want = _stock_attention(*inputs, grad_out, window, 0.4)
    for actual, expected in zip(_ours(gated_attention_reference, inputs, grad_out, window, 0.4), want, strict=True):
        note("stock kernels against the dense reference, float64", difference=float((actual - expected).abs().max()))
        torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11)
    single = [x.float() for x in inputs]
    for actual, expected in zip(_ours(gated_attention, single, grad_out.float(), window, 0.4), want, strict=True):
        note("gated_attention float32 against stock kernels", difference=float((actual - expected).abs().max()))
        torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=5e-6)
