"""A cache in a file: exact, of one model, and nothing that is damaged is read."""

import gc
import json
import struct

import pytest
import torch
from safetensors import safe_open

from dms.cache import CacheFull, DMSCache, held_bytes, serialization
from dms.retrofitting import gate_parameters


@pytest.fixture
def saved(evicting, lockstep, tmp_path):
    """A conversation of two rows, one left-padded, and the file of its cache."""
    one = lockstep(evicting(), page_size=16)
    mask = torch.ones(2, 70, dtype=torch.long)
    mask[1, :30] = 0
    one.read(mask)
    one.cache.save(tmp_path / "cache.safetensors")
    return one, tmp_path / "cache.safetensors"


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gemma3n_text", "gemma4_text", "gpt_oss", "phi3"])
@pytest.mark.parametrize("length", [3, 70])
def test_a_loaded_cache_goes_on(family, length, evicting, lockstep, tmp_path):
    one = lockstep(evicting(family))
    one.read(torch.ones(2, length, dtype=torch.long))
    before = one.cache.report(warn=False)
    one.cache.save(tmp_path / "cache")
    one.cache = DMSCache.load(tmp_path / "cache", one.model)
    loaded = one.cache.report(warn=False)
    assert (loaded.seen, loaded.alive, loaded.cr_decided, loaded.logical_tokens) == (before.seen, before.alive, before.cr_decided, length)
    one.decode(20)
    one.read(torch.ones(2, 30, dtype=torch.long))
    one.same_counts()
    assert one.largest[0] < 1e-4


@pytest.mark.parametrize("page_size", [16, 64])
@pytest.mark.parametrize("alignment", ["own", "next"])
def test_a_loaded_cache_of_several_windows_goes_on(alignment, page_size, evicting, lockstep, page_accounts, tmp_path):
    """What is gone in a front page is not written; pages of another size are filled anew, each entry with its position."""
    one = lockstep(evicting(window=(3, 25, 90), alignment=alignment), page_size=32)
    mask = torch.ones(2, 120, dtype=torch.long)
    mask[1, :31] = 0
    one.read(mask)
    before = one.cache.report(warn=False)
    one.cache.save(tmp_path / "cache")
    with safe_open(str(tmp_path / "cache"), framework="pt") as file:
        num_entries = sum(len(file.get_tensor(f"{i}.positions")) for i in range(len(one.cache.layers)))
    assert num_entries == before.alive - sum(4 * layer.store.num_heads * 2 for layer in one.cache.layers)
    one.cache = DMSCache.load(tmp_path / "cache", one.model, page_size=page_size)
    loaded = one.cache.report(warn=False)
    assert (loaded.seen, loaded.alive, loaded.cr_decided) == (before.seen, before.alive, before.cr_decided)
    page_accounts([one.cache])
    one.decode(40)
    one.read(torch.ones(2, 30, dtype=torch.long))
    one.same_counts()
    page_accounts([one.cache])
    assert one.largest[0] < 1e-4
    one.cache.save(tmp_path / "cache")
    with pytest.raises(ValueError, match=r"dms.window was \[3, 25, 90\] and is \[3, 25, 91\] here"):
        DMSCache.load(tmp_path / "cache", evicting(window=(3, 25, 91), alignment=alignment))


def test_the_file_holds_what_is_alive_alone(saved):
    one, path = saved
    report = one.cache.report(warn=False)
    assert report.bytes_alive < path.stat().st_size < report.bytes
    # Beside entries: a header, and what the rings have room for.
    assert path.stat().st_size < 1.2 * report.bytes_alive + 4096


def test_what_is_on_trial_is_kept(evicting, lockstep, tmp_path):
    one = lockstep(evicting())
    one.read(torch.ones(1, 20, dtype=torch.long))
    for cache in (one.cache, one.oracle):
        cache.activate_past_recording()
    one.read(torch.ones(1, 5, dtype=torch.long))
    one.cache.save(tmp_path / "cache")
    with pytest.raises(ValueError, match="crop of 1 tokens: 0"):
        one.cache.crop(-1)
    one.cache = DMSCache.load(tmp_path / "cache", one.model)
    one.same_counts()
    one.decode(8)
    assert one.largest[0] < 1e-4


def test_options_are_those_of_the_constructor(saved):
    one, path = saved
    assert DMSCache.load(path, one.model).layers[0].page_size == 16
    assert DMSCache.load(path, one.model, page_size=64).layers[0].page_size == 64
    cache = DMSCache.load(path, one.model, max_cache_bytes=10**6)
    assert cache.budget.max_bytes == 10**6
    with pytest.raises(CacheFull, match="max_cache_bytes"):
        DMSCache.load(path, one.model, max_cache_bytes=held_bytes(cache) - 1)


def test_entries_stay_as_they_were_rounded(saved, monkeypatch):
    one, path = saved
    with pytest.raises(
        ValueError,
        match=r"cache.safetensors holds entries of kv_dtype None, and this cache's is 'int8' \(as given, else model.dms.kv_dtype\)",
    ):
        DMSCache.load(path, one.model, kv_dtype="int8")
    monkeypatch.setattr(one.model.dms, "kv_dtype", "fp8")
    with pytest.raises(ValueError, match="kv_dtype None, and this cache's is 'fp8'"):
        DMSCache.load(path, one.model)


def test_an_empty_cache_and_one_without_its_model(build_gated, evicting, tmp_path):
    with pytest.raises(ValueError, match="the cache is empty"):
        DMSCache(evicting()).save(tmp_path / "cache")
    model = build_gated(hidden_size=32)
    model.dms.activate("evict")
    cache = DMSCache(model)
    model(input_ids=torch.full((1, 3), 5), past_key_values=cache)
    del model
    gc.collect()
    with pytest.raises(ValueError, match="the model that made this cache is gone"):
        cache.save(tmp_path / "cache")


def test_states_of_linear_attention_cannot_be_saved(evicting, tmp_path):
    model = evicting("lfm2")
    cache = DMSCache(model)
    model(input_ids=torch.full((1, 3), 5), past_key_values=cache)
    with pytest.raises(ValueError, match="layer 0 of the cache is a LinearAttentionLayer, which cannot be saved"):
        cache.save(tmp_path / "cache")


@pytest.mark.parametrize("what", ["weights", "gates", "window", "sinks", "alignment", "family", "dtype"])
def test_the_cache_of_another_model(what, saved, evicting, build_gated):
    _, path = saved
    options = {"window": {"window": 5}, "sinks": {"sinks": 1}, "alignment": {"alignment": "next"}, "weights": {"seed": 1}}.get(what, {})
    model = build_gated("qwen3" if what == "family" else "llama", hidden_size=32, max_position_embeddings=4096, **options)
    if what == "gates":
        with torch.no_grad():
            next(iter(gate_parameters(model).values())).mul_(1.1)
    if what == "dtype":
        model.to(torch.bfloat16)
    with pytest.raises(ValueError, match="is the cache of another model"):
        DMSCache.load(path, model)
    # The one that made it, built again, may read it.
    DMSCache.load(path, build_gated(hidden_size=32, max_position_embeddings=4096))


@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.999])
def test_a_truncated_file(share, saved):
    one, path = saved
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(ValueError, match=r"cache\.safetensors is damaged"):
        DMSCache.load(path, one.model)


def test_flipped_bits(saved):
    """Anywhere: in the header, in what it says of the model, and in each tensor."""
    one, path = saved
    data = path.read_bytes()
    header = struct.unpack("<Q", data[:8])[0]
    tensors = {name: value for name, value in json.loads(data[8 : 8 + header]).items() if name != "__metadata__"}
    places = [0, 4, 8, 20, data.index(b"sha256") + 12, data.index(b"columns") + 14]
    places += [8 + header + value["data_offsets"][0] for value in tensors.values() if value["data_offsets"][1] > value["data_offsets"][0]]
    for place in places:
        path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        with pytest.raises(ValueError, match=r"is damaged|no cache of this version|cache of another model"):
            DMSCache.load(path, one.model)
    path.write_bytes(data)
    DMSCache.load(path, one.model)


def test_no_file_and_another_kind_of_file(saved, tmp_path):
    one, _ = saved
    with pytest.raises(ValueError, match=r"does not exist; name a file that cache.save wrote"):
        DMSCache.load(tmp_path / "none", one.model)
    with pytest.raises(ValueError, match="does not exist"):
        DMSCache.load(tmp_path, one.model)
    from safetensors.torch import save_file

    save_file({"x": torch.ones(3)}, tmp_path / "weights")
    with pytest.raises(ValueError, match=r"holds no cache of this version of dms \(1, of int4 2\): version is None"):
        DMSCache.load(tmp_path / "weights", one.model)


@torch.no_grad()
def test_entries_of_int4_as_they_were_before_are_refused(evicting, make_batch, tmp_path, monkeypatch):
    model = evicting(window=4)
    cache = DMSCache(model, page_size=16, kv_dtype="int4")
    model(input_ids=make_batch(1, 60)["input_ids"], past_key_values=cache)
    with monkeypatch.context() as patch:
        patch.setattr(serialization, "_VERSION_OF_INT4", "1")
        cache.save(tmp_path / "old")
    with pytest.raises(ValueError, match="holds int4 entries with four bits for keys, as an older version of dms stored them; prefill"):
        DMSCache.load(tmp_path / "old", model)
    cache.save(tmp_path / "new")
    DMSCache.load(tmp_path / "new", model)
