"""Every touch of torch's private parts in `dms.costs.torch_compat`: held against what is installed, and named where it is broken on purpose."""

import inspect
import re
import sys
from pathlib import Path

import pytest
import torch
from torch.utils import flop_counter

from dms.costs import torch_compat
from dms.upstream import UpstreamChanged

TOUCHES = [
    name
    for name, value in vars(torch_compat).items()
    if inspect.isfunction(value) and value.__module__ == torch_compat.__name__ and name[0] != "_"
]
UPSTREAM = Path(__file__).parents[3] / "docs" / "upstream.md"


# What is assumed, held against the installed version.


def test_watch_operators():
    seen = []
    weight = torch.ones(3, 4, requires_grad=True)
    with torch_compat.watch_operators(lambda operator, args, kwargs, result: seen.append((operator.overloadpacket, result))):
        out = torch.ones(2, 3) @ weight
        out.backward(torch.ones(2, 4))
    torch.ones(2, 3) @ weight
    # Forward, and the gradient by the weight.
    products = [result for packet, result in seen if packet is torch.ops.aten.mm]
    assert [tuple(result.shape) for result in products] == [(2, 4), (3, 4)]


def test_fake_tensors():
    with torch_compat.fake_tensors():
        x = torch.empty(10**9, 2)
        out = x @ torch.empty(2, 7)
        # A mode of ours may stand within.
        with torch_compat.watch_operators(lambda *_: None):
            out = out + 1
    assert out.shape == (10**9, 7) and out.device.type == "cpu" and type(out).__name__ == "FakeTensor"


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_storage_key(device):
    x, other = torch.empty(4, 6, device=device), torch.empty(4, 6, device=device)
    key = torch_compat.storage_key(x)
    assert key == torch_compat.storage_key(x.T[1:]) == torch_compat.storage_key(torch.nn.Parameter(x))
    assert key != torch_compat.storage_key(other)


def test_grouped_product():
    ends = torch.tensor([2, 4], dtype=torch.int32, device="meta")
    rows, experts = torch.empty(4, 16, dtype=torch.bfloat16, device="meta"), torch.empty(2, 16, 8, dtype=torch.bfloat16, device="meta")
    assert torch_compat.grouped_product()(rows, experts, ends).shape == (4, 8)


def test_product_flops():
    count = torch_compat.product_flops()[torch.ops.aten.mm]
    a, b = torch.empty(3, 5), torch.empty(5, 7)
    assert count(a, b, out_val=a @ b) == 2 * 3 * 5 * 7


# What is raised where it is not so any more.


def _watch(patch):
    patch.setitem(sys.modules, "torch.utils._python_dispatch", None)
    with torch_compat.watch_operators(print):
        pass


def _fake(patch):
    patch.setitem(sys.modules, "torch._subclasses.fake_tensor", None)
    torch_compat.fake_tensors()


class _Tensor:
    def untyped_storage(self):
        return object()


class _NoOperators:
    class ops:
        aten = object()


def _grouped(patch):
    patch.setattr(torch_compat, "torch", _NoOperators)
    torch_compat.grouped_product()


def _products(patch):
    patch.setattr(flop_counter, "flop_registry", {})
    torch_compat.product_flops()


BREAKS = {
    "watch_operators": _watch,
    "fake_tensors": _fake,
    "storage_key": lambda patch: torch_compat.storage_key(_Tensor()),
    "grouped_product": _grouped,
    "product_flops": _products,
}


@pytest.mark.parametrize("touch", BREAKS)
def test_a_broken_touch_is_named(touch, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(UpstreamChanged) as error:
        BREAKS[touch](patch)
    assert re.match(rf"torch \S+: torch_compat\.{touch} needs .+, which is not there any more; .*see docs/upstream\.md$", str(error.value))


def test_every_touch_is_held_broken_and_listed():
    section = UPSTREAM.read_text(encoding="utf-8").partition("`dms/costs/torch_compat.py`")[2].partition("\n## ")[0]
    assert re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE) == TOUCHES
    for touch in TOUCHES:
        assert f"test_{touch}" in globals() and touch in BREAKS, touch
        assert re.search(r"\n\n    Assumes: ", getattr(torch_compat, touch).__doc__), touch
