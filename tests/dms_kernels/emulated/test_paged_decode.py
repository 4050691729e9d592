"""paged_decode as compiled, on the emulator: at most twice plain PyTorch's error, and parts that are merged by whoever comes last."""

import pytest
import torch
from cache_arguments import decode_over
from decode_cases import Case, make_case
from few_programs import with_few_programs
from parity import assert_as_precise
from window_caches import make_windows_case

from dms_kernels.paged_decode import paged_decode, reference
from dms_kernels.quantization import dequantize
from emulate.launching import emulating

SHAPES = {
    "ragged heads": {"B": 2, "G": 3, "P": 64, "window": 20, "kept": [[0, 1], [64, 133]], "length": [70, 60]},
    "tiles over several pages": {"B": 1, "P": 16, "window": 9, "kept": [[70, 3]], "length": [40]},
    "lengths 0 and 1": {"B": 3, "P": 32, "kept": [[0, 0], [0, 0], [40, 0]], "length": [0, 1, 30], "sinks": True},
    "int8": {"B": 1, "P": 32, "quantized": torch.int8, "kept": [[70, 3]], "length": [40]},
    "int4": {"B": 1, "P": 32, "quantized": torch.uint8, "kept": [[70, 3]], "length": [40]},
    "int4, head dim 80": {"D": 80, "B": 1, "H": 1, "P": 16, "quantized": torch.uint8, "kept": [[37]], "length": [20]},
    "on trial": {"B": 2, "T": 3, "num_new": 5, "trial": True, "window": 6, "P": 16, "softcap": 2.0, "sinks": True},
    "head dim 80": {"D": 80, "B": 1, "kept": [[70, 3]], "length": [40]},
    "head dim 128": {"D": 128, "B": 1, "G": 4, "kept": [[130, 3]], "length": [40]},
}


def attend(case: Case, capability: int, num_programs=3, **options) -> torch.Tensor:
    with emulating(capability, **options) as emulation:
        out = with_few_programs(lambda: case.run(paged_decode), num_programs)
    assert [launch.kernel for launch in emulation.launches] == ["decode_kernel"]
    return out


def check(case: Case, capability: int, dtype: torch.dtype, **options) -> torch.Tensor:
    narrow = case.cast(dtype)
    out = attend(narrow, capability, **options)
    assert_as_precise("paged_decode", out, narrow.run(reference), narrow.cast(torch.float64).run(reference))
    return out


def test_ragged_heads_and_a_cut_one():
    check(make_case(3, D=64, B=1, G=2, P=16, window=5, kept=[[40, 3]], length=[40]), 90, torch.bfloat16, resident=2)


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_shapes(capability, shape):
    check(make_case(1, **({"D": 64} | shape)), capability, torch.bfloat16)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("shape", ["tiles over several pages", "int8", "int4", "on trial"])
def test_other_dtypes(capability, shape, dtype):
    check(make_case(1, **({"D": 64} | SHAPES[shape])), capability, dtype)


@pytest.mark.slow
def test_the_order_of_programs_does_not_matter(capability):
    case = make_case(3, D=64, B=2, P=16, window=5, kept=[[150, 3], [0, 90]], length=[40, 9]).cast(torch.bfloat16)
    outs = [attend(case, capability, 6, seed=seed, resident=resident) for seed, resident in ((0, 1), (1, 1), (2, 6))]
    assert all(torch.equal(outs[0], out) for out in outs)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    "shape", [{"length": [80, 60]}, *({"length": [80, 60], "num_new": 2, "quantized": kind} for kind in (torch.int8, torch.uint8))], ids=str
)
def test_several_windows(capability, shape, dtype):
    case = make_windows_case(1, D=64, H=2, B=2, **shape)
    narrow = case.cast(dtype)
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 4, 2 if case.new else 1, 64, generator=generator).to(dtype)
    position = case.new["position"][:, -2:].contiguous() if case.new else torch.tensor(case.length)[:, None].int() - 1

    def run(function, q, stored, new):
        more = {f"new_{name}": x for name, x in new.items()} | ({"q_position": position} if new else {})
        return decode_over(function, q, stored, window=stored["windows"][0], scale=0.25, **more)

    with emulating(capability):
        out = with_few_programs(lambda: run(paged_decode, q, narrow.stored, narrow.new))
    wide, plain = narrow.widened(), dict(narrow.stored)
    if shape.get("quantized") == torch.uint8:
        # As the kernel has them: in q's dtype.
        plain["pages"] = dequantize(plain["pages"], plain.pop("page_scales"), 1).to(dtype)
    expected = run(reference, q.double(), wide.stored, wide.new)
    assert_as_precise("paged_decode of several windows", out, run(reference, q, plain, narrow.new), expected)


@pytest.mark.slow
def test_a_sink_logit_of_minus_infinity(capability):
    """As without the sink; queries that see nothing beside it give 0."""
    case = make_case(6, D=64, B=3, sinks=True, P=16, length=[0, 30, 40])
    case.options["sink_logits"][::2] = -torch.inf
    out = check(case, capability, torch.bfloat16)
    assert (out[0] == 0).all()
