"""Tiers of the KV cache: figures by hand, what binds, what grows with what, and what the command says of them."""

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from dms_train.cli import app
from said import says
from transformers import AutoConfig
from typer.testing import CliRunner

from dms.config import DMSConfig
from dms.costs import hardware, inference
from dms.costs.inference import Machine
from dms.costs.kv import DTYPES, KV
from dms.costs.shapes import measure
from dms.costs.tiers import TIERS, tier_point

CONFIG = Path(__file__).resolve().parents[2] / "recipes" / "configs" / "Llama-3.1-8B.json"
KNOWN = hardware.load()
H100 = KNOWN.gpu("h100-80")
# Bytes of an entry of a head of 128.
ENTRY = {"model": 512, "int8": 264, "fp8": 264, "int4": 176}


@pytest.fixture(scope="module")
def llama():
    return measure(AutoConfig.from_pretrained(str(CONFIG)), DMSConfig())


def point(shape, tier, kv=None, context=32768, num=1, gpu=H100, known=KNOWN):
    return tier_point(shape, kv or KV(), Machine(num=num), gpu, known, tier, context)


def with_node(**values):
    return replace(KNOWN, node=replace(KNOWN.node, **values))


def test_the_device_alone_is_what_fits_it(llama):
    for kv in (KV(), KV(cr=8.0, dtype="int4")):
        one = point(llama, "device", kv)
        assert one.batch == inference.largest_batch(llama, kv, Machine(), H100.memory, 32768) > 0
        step = inference.decode(llama, kv, Machine(), one.batch, 32768)
        assert one.tokens_per_second == one.batch / (step.bytes / 3.35e12) and one.binds == "memory"
        assert one.moved_bytes == 0 and one.seconds_back is None and one.seconds_away is None


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_dense_cache_outside_by_hand(llama, dtype):
    one, cache = point(llama, "host", KV(dtype=dtype)), 32 * 8 * 32768 * ENTRY[dtype]
    assert (one.cache_bytes, one.moved_bytes, one.batch) == (cache, cache, 256_000_000_000 // cache)
    assert one.seconds.total == pytest.approx(one.batch * cache / 64e9) and one.binds == "PCIe"
    # A link that is full gives as many tokens as caches fit through it, whatever the batch.
    assert one.tokens_per_second == pytest.approx(64e9 / cache)
    assert one.seconds_back == one.seconds_away == cache / 64e9
    disk = point(llama, "disk", KV(dtype=dtype))
    assert disk.tokens_per_second == pytest.approx(6.5e9 / cache) and disk.binds == "NVMe"
    assert (disk.seconds_back, disk.seconds_away) == (cache / 6.5e9, cache / 3.5e9)


def test_an_evicting_cache_outside_by_hand(llama):
    """The ring stays: it does not cross at each step, and comes back with an idle conversation."""
    kv, pages = KV(cr=8.0, dtype="int4"), (32768 - 257) / 8 / 64 + 0.5
    one, moved = point(llama, "host", kv), 32 * 8 * pages * 64 * 176
    # Ring and flags; 64 places of a table; of a page a count and a free place; counts of a head and of a sequence in a layer.
    beside = 32 * 8 * (257 * 513 + 64 * 4 + pages * 8 + 12) + 32 * 12
    assert one.moved_bytes == pytest.approx(moved) and one.cache_bytes == pytest.approx(moved + beside)
    assert one.seconds_back == pytest.approx((moved + beside) / 64e9)
    # Room for two of 32 layers; what a step's activations take is little.
    left = 80e9 - inference.fixed(llama, kv, Machine())
    assert one.batch == pytest.approx(left / (beside + moved / 16), rel=0.01) and one.batch * moved < 256e9


def test_weights_bind_where_little_crosses(llama):
    """A single sequence of little context: weights take longer to read than its pages to come."""
    small = with_node(memory=32 * 8 * 600 * 512.0)
    one = point(llama, "host", context=512, known=small)
    assert one.batch == 1 and one.binds == "memory"
    step = inference.decode(llama, KV(), Machine(), 1, 512)
    # What has come was written to the device's memory.
    assert one.seconds.total == pytest.approx((step.bytes + 32 * 8 * 512 * 512) / 3.35e12)
    slow = replace(H100, flops=replace(H100.flops, bf16=1e9))
    assert point(llama, "host", context=512, known=small, gpu=slow).binds == "compute"


@pytest.mark.parametrize(("computing", "coming"), [(1.0, 3.0), (3.0, 1.0), (2.0, 2.0)])
def test_two_layers_of_room_suffice_for_the_bound(computing, coming):
    """Step after step with room for two layers: the pages of one come when those of two before are done with."""
    layers, steps = 32, 50
    come, done = [], []
    for number in range(layers * steps):
        free = done[number - 2] if number >= 2 else 0.0
        come.append(max(come[-1] if come else 0.0, free) + coming)
        done.append(max(come[-1], done[-1] if done else 0.0) + computing)
    assert done[-1] / steps == pytest.approx(layers * max(computing, coming), rel=0.01)


@pytest.mark.parametrize("tier", TIERS)
def test_more_evicted_and_fewer_bits_are_never_worse(llama, tier):
    for caches in ([KV(cr=cr, dtype=dtype) for cr in (None, 2.0, 4.0, 8.0, 16.0)] for dtype in DTYPES):
        _grow([point(llama, tier, kv) for kv in caches])
    for cr in (None, 4.0, 8.0):
        _grow([point(llama, tier, KV(cr=cr, dtype=dtype)) for dtype in ("model", "int8", "int4")])
    _grow([point(llama, tier, KV(cr=8.0), context) for context in (131072, 32768, 8192)])


def _grow(points):
    for one, other in pairwise(points):
        assert other.batch >= one.batch and other.tokens_per_second > one.tokens_per_second and other.cache_bytes < one.cache_bytes
        assert other.tier == "device" or other.seconds_back < one.seconds_back


def test_farther_tiers_are_slower(llama):
    for kv in (KV(), KV(cr=8.0, dtype="int4")):
        device, host, disk = (point(llama, tier, kv) for tier in TIERS)
        assert device.tokens_per_second > host.tokens_per_second > disk.tokens_per_second
        assert device.batch < host.batch <= disk.batch and host.seconds_back < disk.seconds_back


def test_what_limits_how_many_fit(llama):
    cache = 32 * 8 * 32768 * 512
    assert point(llama, "host", known=with_node(memory=5.5 * cache)).batch == 5
    assert point(llama, "host", known=with_node(memory=0.5 * cache)).batch == 0
    none = point(llama, "host", known=with_node(memory=0.5 * cache))
    assert none.seconds is None and none.tokens_per_second == 0 and none.binds is None
    drive = replace(KNOWN.node.drive, capacity=3.0 * cache)
    assert point(llama, "disk", known=with_node(drive=drive)).batch == 3


def test_gpus_that_share_a_model_share_main_memory(llama):
    one, eight = (point(llama, "host", num=num) for num in (1, 8))
    assert eight.moved_bytes == one.moved_bytes / 8 and eight.binds == "main memory"
    # 300 GB/s for eight links of 64.
    assert eight.tokens_per_second == pytest.approx(one.tokens_per_second * 300 / 64)


def test_layers_without_growing_caches_stay():
    config = AutoConfig.for_model("mistral", hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16)
    config.sliding_window = 512
    shape = measure(config, DMSConfig())
    device, host, disk = (point(shape, tier, context=4096) for tier in TIERS)
    assert host.moved_bytes == 0 and host.batch == disk.batch == device.batch and host.tokens_per_second == device.tokens_per_second


def test_the_command_shows_and_writes_tiers(tmp_path):
    out = tmp_path / "out.json"
    arguments = ["analyze", str(CONFIG), "--context", "32768", "--batch", "8", "--cr", "4", "--cr", "8", "--json", str(out)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert says(result.output, "tiers at 32K") and says(result.output, "256 GB of main memory a GPU, over PCIe at 64 GB/s")
    rows = [" ".join(line.replace("|", " ").split()) for line in result.output.splitlines()]
    assert "dense 16-bit 4,295 14 623 memory 59 14.9 PCIe 234 1.51 NVMe 67.1 661" in rows
    values = json.loads(out.read_text())
    assert len(values["tiers"]) == 3 * 3 * 3
    (one,) = [one for one in values["tiers"] if (one["tier"], one["cr_decided"], one["kv_dtype"]) == ("host", 8.0, "int4")]
    assert (one["batch"], one["binds"]) == (1381, "PCIe") and one["tokens_per_second"] == pytest.approx(1381 / one["seconds"])
    assert values["node"]["drive"]["read"] == 6.5e9 and values["gpu"]["pcie"] == 64e9
