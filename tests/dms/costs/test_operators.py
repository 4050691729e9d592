"""The tracker counts every storage once, for as long as it lives."""

import torch

from dms.costs.operators import LiveBytes


class Keeps(torch.autograd.Function):
    """Saves a tensor that it makes inside, and lets another go."""

    @staticmethod
    def forward(ctx, x):
        inside = x * 2
        ctx.save_for_backward(inside)
        return (x + 1) + inside

    @staticmethod
    def backward(ctx, grad):
        (inside,) = ctx.saved_tensors
        return grad * inside


def test_made_kept_and_freed():
    with LiveBytes() as live:
        a = torch.zeros(100)
        assert live.now == 400
        view = a[10:].view(9, 10)
        a.add_(1)
        assert live.now == 400
        b = a + 1
        assert live.now == live.peak == 800
        del b
        assert (live.now, live.peak) == (400, 800)
        live.reset_peak()
        del a
        assert live.now == live.peak == 400 and view.sum() == 90


def test_what_functions_keep_inside_and_what_was_there_before():
    x = torch.ones(50, requires_grad=True)
    with LiveBytes(x) as live:
        assert live.now == 200
        out = Keeps.apply(x)
        # x, what is saved, the result; at the most x + 1 too.
        assert (live.now, live.peak) == (600, 800)
        out.backward(torch.ones(50))
        assert x.grad is not None
        out = None
        # x and its gradient.
        assert live.now == 400
