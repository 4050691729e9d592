"""What pages of each dtype make of an entry."""

import pytest
import torch

from dms_kernels.quantization import (
    KEY_LEVELS,
    KV_DTYPES,
    VALUE_LEVELS,
    dequantize,
    fake_quantize,
    group_size,
    quantize,
    scales_of_pages,
    stored_width,
)


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
@pytest.mark.parametrize("head_dim", [16, 48, 64, 80, 128])
def test_numbers_and_scales_have_the_shapes_that_pages_have(kv_dtype, head_dim):
    dtype = KV_DTYPES[kv_dtype]
    stored, scales = quantize(torch.randn(5, 2, 3, head_dim), dtype, 1)
    assert stored.dtype == dtype and stored.shape == (5, 2, 3, stored_width(head_dim, dtype))
    assert (tuple(scales.shape), scales.dtype) == scales_of_pages((5, 2, 3), head_dim, dtype)
    assert dequantize(stored, scales, 1).shape == (5, 2, 3, head_dim)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_entry_is_off_by_half_a_step_at_most(dtype):
    torch.manual_seed(0)
    x = (torch.randn(400, 64) * torch.logspace(-3, 2, 400)[:, None] + 3 * torch.randn(400, 1)).to(dtype)
    largest = x.float().abs().amax(-1, keepdim=True)
    # The same numbers as keys and as values.
    read = {kind: dequantize(*quantize(torch.stack([x, x]), KV_DTYPES[kind], 0), 0) for kind in KV_DTYPES}
    error = {kind: (found - x.float()).abs() for kind, found in read.items()}
    assert (error["int8"] <= largest / 127 * 0.501).all()
    # Three bits of mantissa; below 2^-6 of the dtype's, steps of 2^-9.
    assert (error["fp8"] <= torch.maximum(x.float().abs() / 16, largest / 448 * 2**-10) * 1.001).all()
    groups = x.float().unflatten(-1, (-1, group_size(64)))
    span = groups.amax(-1) - groups.amin(-1)
    # Beside half a step, the rounding of the scale and of the least component to float16.
    for found, levels in zip(error["int4"], (KEY_LEVELS, VALUE_LEVELS), strict=True):
        bound = span / (2 * levels) + groups.abs().amax(-1) * 2**-10 + 1e-6
        assert (found.unflatten(-1, (-1, group_size(64))) <= bound[..., None]).all()
    assert error["int4"][0].square().mean() < 0.3 * error["int4"][1].square().mean()
    for kind, found in read.items():
        for one, is_key in zip(found, (True, False), strict=True):
            assert torch.equal(fake_quantize(x, KV_DTYPES[kind], is_key), one.to(dtype))


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
@pytest.mark.parametrize("value", [0.0, 1.0, -2.5, 3e38])
def test_equal_components_and_extremes_stay_finite(kv_dtype, value):
    x = torch.full((3, 2, 32), value)
    read = dequantize(*quantize(x, KV_DTYPES[kv_dtype], 1), 1)
    assert read.isfinite().all()
    if abs(value) < 1e5:
        torch.testing.assert_close(read, x)


def test_components_lie_in_order():
    components = torch.arange(32.0)
    stored, scales = quantize(torch.stack([components, components.remainder(16)]), torch.uint8, 0)
    assert stored[:, :4].tolist() == [[0x10, 0x32, 0x54, 0x76]] * 2 and torch.equal(stored[:, :8], stored[:, 8:])
    assert scales[:, :2].view(torch.float16).tolist() == [[[1.0], [0.0]]] * 2
    # Fifth bits of the key's 16 upper components: of the even ones beside it, of the odd ones beside the value.
    assert scales[:, 2].tolist() == [[-256], [-256]]
    one = torch.zeros(2, 32)
    one[0, 5] = 1.0
    assert quantize(one, torch.uint8, 0)[1][:, 2].tolist() == [[0], [4]]


def test_a_head_without_groups_is_refused():
    with pytest.raises(ValueError, match=r"whose size is a multiple of 16, and this model's have 24; choose kv_dtype int8"):
        quantize(torch.zeros(2, 24), torch.uint8, 0)
