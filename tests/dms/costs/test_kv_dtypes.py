"""Bytes of KV dtypes: by hand for one layer, against what `dms_kernels.quantization` makes, and which are refused."""

from dataclasses import replace

import pytest
import torch
from transformers import AutoConfig

from dms.config import DMSConfig
from dms.costs import hardware, kv
from dms.costs.analysis import analyze
from dms.costs.kv import DTYPES, KV
from dms.costs.shapes import AttentionShape, measure
from dms_kernels.quantization import KV_DTYPES, quantize

LAYER = AttentionShape(
    layer=0, num_query_heads=32, num_heads=8, key_dim=128, value_dim=128, gated=True, holds=True, window=None, causal=True
)
H100 = hardware.load().gpu("h100-80")


def heads_of(size):
    return replace(LAYER, key_dim=size, value_dim=size)


# Key and value, each: components, and a float32 scale; of int4 half a byte a component, and three numbers of 16 bits for each 32, or 16.
@pytest.mark.parametrize(
    ("size", "dtype", "expected"),
    [
        (128, "model", 2 * 256),
        (128, "int8", 2 * (128 + 4)),
        (128, "fp8", 2 * (128 + 4)),
        (128, "int4", 2 * (64 + 4 * 6)),
        (80, "int4", 2 * (40 + 5 * 6)),
        (16, "int4", 2 * (8 + 6)),
    ],
)
def test_an_entry_by_hand_and_as_it_is_stored(size, dtype, expected):
    assert kv.entry_bytes(heads_of(size), dtype) == expected
    if dtype != "model":
        assert sum(x.nbytes for x in quantize(torch.randn(2, size), KV_DTYPES[dtype], 0)) == expected


@pytest.mark.parametrize(("dtype", "entry"), [("model", 512), ("int8", 264), ("fp8", 264), ("int4", 176)])
def test_one_layer_by_hand(dtype, entry):
    """Of T = 4,096 tokens 257 are in the ring and an eighth of the others in pages of 64, the last of them half full."""
    one, kept = KV(cr=8.0, dtype=dtype), (4096 - 257) / 8
    pages = kept / 64 + 0.5
    assert kv.paged_bytes(LAYER, one, 4096) == pytest.approx(pages * 64 * entry)
    # The ring stays at 16 bits; a flag a slot, 64 places in the table, a count and a place on the free list a page, two numbers a head.
    assert kv.held_bytes(LAYER, one, 4096) == pytest.approx(257 * (512 + 1) + pages * (64 * entry + 8) + 64 * 4 + 4 + 8)
    assert kv.read_bytes(LAYER, one, 4096) == pytest.approx(257 * 512 + kept * entry + kept / 64 * 4)
    assert kv.written_bytes(LAYER, one, 4096) == pytest.approx(512 + entry / 8)
    dense = KV(dtype=dtype)
    assert kv.held_bytes(LAYER, dense, 4096) == kv.read_bytes(LAYER, dense, 4096) == kv.paged_bytes(LAYER, dense, 4096) == 4096 * entry


def test_what_does_not_evict_stays_at_16_bits():
    sliding, beside = replace(LAYER, window=128, gated=False), replace(LAYER, gated=False)
    for dtype in DTYPES:
        assert kv.held_bytes(sliding, KV(dtype=dtype), 4096) == kv.held_bytes(sliding, KV(cr=8.0, dtype=dtype), 4096) == 127 * 512
        assert kv.held_bytes(beside, KV(cr=8.0, dtype=dtype), 4096) == 4096 * 512
        assert kv.paged_bytes(sliding, KV(cr=8.0, dtype=dtype), 4096) == 0


def test_a_dtype_that_there_is_not():
    with pytest.raises(ValueError, match=r"a KV dtype is 'in4' \(did you mean 'int4'\?\); there are model, int8, fp8, int4"):
        KV(dtype="in4")


def test_heads_without_groups():
    sizes = {
        "hidden_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 24,
        "vocab_size": 99,
    }
    shape = measure(AutoConfig.for_model("llama", **sizes, intermediate_size=64, max_position_embeddings=8192), DMSConfig(window=16))
    found = analyze(shape, "h100-80", H100, batches=[1])
    assert {one.dtype for one in found.caches} == {"model", "int8"}
    assert any(note.startswith("no int4: ") and "multiple of 16" in note and "24" in note for note in found.notes)
    with pytest.raises(ValueError, match="multiple of 16, and this model's have 24"):
        analyze(shape, "h100-80", H100, batches=[1], dtypes=["int4"])


def test_given_dtypes_are_those_of_all_figures():
    sizes = {
        "hidden_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "vocab_size": 99,
    }
    shape = measure(AutoConfig.for_model("llama", **sizes, intermediate_size=64, max_position_embeddings=8192), DMSConfig(window=16))
    found = analyze(shape, "h100-80", H100, batches=[1], ratios=[4.0], dtypes=["int4", "fp8"])
    assert [(one.name, one.dtype) for one in found.caches] == [("dense", "fp8"), ("CR 4", "fp8"), ("dense", "int4"), ("CR 4", "int4")]
    assert found.widest == found.caches[:2] and [one.label for one in found.widest] == ["dense fp8", "CR 4 fp8"]
    for values in (found.points, found.limits, found.tiers):
        assert {one.kv for one in values} == set(found.caches)
