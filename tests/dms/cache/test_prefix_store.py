"""`dms.PrefixStore`: what it gives is what the model would have read; room, damage, and processes that end at any moment."""

import multiprocessing
import os
import random
import signal
import time

import pytest
import torch

import dms
from dms.modes import state_of

pytestmark = pytest.mark.filterwarnings("error::UserWarning")


@pytest.fixture(scope="module")
def model(build_gated):
    model = build_gated("llama")
    dms.set_mode(model, "evict")
    return model


@pytest.fixture(scope="module")
def ids():
    return torch.randint(2, 97, (60,), generator=torch.Generator().manual_seed(3)).tolist()


def read(model, ids):
    """As `generate` reads a prompt."""
    cache = dms.DMSCache(model)
    with torch.no_grad():
        model(input_ids=torch.tensor([ids]), past_key_values=cache)
    return cache


def next_logits(model, cache):
    with torch.no_grad():
        return model(input_ids=torch.tensor([[5, 6, 7]]), past_key_values=cache).logits


def test_the_longest_beginning_is_read_from_a_file(model, ids, tmp_path):
    store = dms.PrefixStore(tmp_path / "store", 10**9)
    assert store.get(model, ids) is None
    for length in (20, 35, 50):
        assert store.put(model, ids[:length], read(model, ids[:length]))
    # Of another text, as long as one that fits.
    assert store.put(model, [9] * 45, read(model, [9] * 45))
    for length, known in ((19, None), (20, 20), (49, 35), (60, 50)):
        found = store.get(model, torch.tensor([ids[:length]]))
        assert (found and found[1]) == known
        if found:
            assert torch.equal(next_logits(model, found[0]), next_logits(model, read(model, ids[:known])))


def test_reading_stores_and_generation_goes_on(model, ids, tmp_path, monkeypatch):
    store, lengths = dms.PrefixStore(tmp_path, 10**9), []
    expected = model.generate(torch.tensor([ids]), max_new_tokens=9, do_sample=False)
    note = model.register_forward_pre_hook(lambda own, args, options: lengths.append(options["input_ids"].shape[1]), with_kwargs=True)
    store.read(model, ids[:30])
    for _ in range(2):
        cache = store.read(model, ids[:50])
        assert torch.equal(model.generate(torch.tensor([ids]), past_key_values=cache, max_new_tokens=9, do_sample=False), expected)
    # The first text, what the second adds, and nothing of it again.
    assert [length for length in lengths if length > 1] == [30, 20, 10, 10]
    monkeypatch.setattr(state_of(model), "prefill_chunk", 16)
    lengths.clear()
    store.read(model, [11] * 40)
    assert lengths == [16, 16, 8]
    note.remove()


def test_what_makes_a_cache_is_part_of_its_name(model, ids, tmp_path, build_gated, monkeypatch):
    store = dms.PrefixStore(tmp_path, 10**9)
    store.put(model, ids, read(model, ids))
    state = state_of(model)
    for name, value in (("evict_bias", 0.5), ("page_size", 16), ("kv_dtype", "int8")):
        with monkeypatch.context() as patch:
            patch.setattr(state, name, value)
            assert store.get(model, ids) is None, name
    for other in (build_gated("llama", window=6), build_gated("llama").double(), build_gated("qwen3")):
        assert store.get(other, ids) is None
    gate = state.layers[0].module.dms_gate
    before = gate.bias.detach().clone()
    with torch.no_grad():
        gate.bias += 1
        assert store.get(model, ids) is None
        gate.bias.copy_(before)
    assert store.get(model, ids)[1] == len(ids)


def test_a_cache_of_another_kind_is_stored_as_that_kind(model, ids, tmp_path):
    store = dms.PrefixStore(tmp_path, 10**9)
    rounded = dms.DMSCache(model, kv_dtype="int8", page_size=16)
    with torch.no_grad():
        model(input_ids=torch.tensor([ids]), past_key_values=rounded)
    assert store.put(model, ids, rounded)
    assert store.get(model, ids) is None and store.get(model, ids, kv_dtype="int8") is None
    found, known = store.get(model, ids, kv_dtype="int8", page_size=16)
    assert known == len(ids) and {(layer.kv_dtype, layer.page_size) for layer in found.layers} == {("int8", 16)}
    # What a caller gets wrong costs no file.
    with pytest.raises(ValueError, match="page_size is 128"):
        store.get(model, ids, page_size=128)
    with pytest.raises(ValueError, match="int3"):
        store.get(model, ids, kv_dtype="int3")
    assert store.get(model, ids, kv_dtype="int8", page_size=16)[1] == len(ids)


def test_what_was_used_longest_ago_makes_room(model, ids, tmp_path):
    one = dms.PrefixStore(tmp_path / "one", 10**9)
    one.put(model, ids, read(model, ids))
    store = dms.PrefixStore(tmp_path / "store", int(3.5 * one.num_bytes))
    texts = [[first, *ids[1:]] for first in (10, 11, 12, 13)]
    for text in texts[:3]:
        store.put(model, text, read(model, text))
        time.sleep(0.01)
    assert store.get(model, texts[0])
    store.put(model, texts[3], read(model, texts[3]))
    assert [store.get(model, text) is not None for text in texts] == [True, False, True, True]
    assert store.num_bytes <= store.max_bytes
    small = dms.PrefixStore(tmp_path / "small", 1000)
    with pytest.warns(UserWarning, match=r"not stored: the cache of 60 tokens takes \d+ bytes, and max_bytes is 1000"):
        assert not small.put(model, ids, read(model, ids))
    assert small.num_bytes == 0


@pytest.mark.parametrize("damage", ["cut", "changed", "empty"])
def test_what_is_damaged_is_dropped_with_a_word(model, ids, tmp_path, damage):
    store = dms.PrefixStore(tmp_path, 10**9)
    for length in (20, 50):
        store.put(model, ids[:length], read(model, ids[:length]))
    (path,) = tmp_path.glob("*/50-*")
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes({"cut": content[: len(content) // 2], "changed": content, "empty": b""}[damage])
    with pytest.warns(UserWarning, match="dropped from the prefix store: .*50-.* is damaged"):
        assert store.get(model, ids)[1] == 20
    assert not path.exists() and store.get(model, ids)[1] == 20


def _work(store, model, texts, seed):
    torch.set_num_threads(1)
    chosen = random.Random(seed)
    while True:
        store.read(model, chosen.choice(texts))


@pytest.mark.parametrize("num_kills", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_processes_that_are_killed_leave_nothing_wrong(model, ids, tmp_path, num_kills):
    """Two processes write, read and make room in one folder, and are killed (-9) at random moments; each file that is there is right."""
    texts = [[first, *ids[: 20 + first]] for first in range(10, 20)]
    expected = [next_logits(model, read(model, text)) for text in texts]
    one = dms.PrefixStore(tmp_path / "one", 10**9)
    one.put(model, texts[-1], read(model, texts[-1]))
    store = dms.PrefixStore(tmp_path / "store", 5 * one.num_bytes)
    random_time, context = random.Random(1), multiprocessing.get_context("fork")
    seen = 0
    for number in range(num_kills):
        workers = [context.Process(target=_work, args=(store, model, texts, 2 * number + n), daemon=True) for n in range(2)]
        for worker in workers:
            worker.start()
        time.sleep(0.3 + random_time.random() / 3)
        for worker in workers:
            os.kill(worker.pid, signal.SIGKILL)
            worker.join()
        for text, logits in zip(texts, expected, strict=True):
            # Nothing is damaged, or a warning would be an error here.
            found = store.get(model, text)
            seen += found is not None
            assert found is None or (torch.allclose(next_logits(model, found[0]), logits, atol=1e-5) and found[1] == len(text))
        # What a killed writer left goes with the next one's work.
        store.put(model, ids, read(model, ids))
        assert store.num_bytes <= store.max_bytes and not list(tmp_path.glob("store/*/.*.unfinished"))
    assert seen


def test_refusals(model, ids, tmp_path):
    with pytest.raises(ValueError, match="max_bytes is 0; give the bytes"):
        dms.PrefixStore(tmp_path, 0)
    store = dms.PrefixStore(tmp_path, 10**9)
    with pytest.raises(ValueError, match=r"1 sequences of 60 tokens, and 59 tokens were given"):
        store.put(model, ids[:59], read(model, ids))
    with pytest.raises(ValueError, match=r"the tokens have shape \[2, 30\]; give those of one sequence"):
        store.read(model, torch.tensor(ids).view(2, 30))
    with pytest.raises(ValueError, match="there are no tokens"):
        store.read(model, [])
