"""`generate` over compacted caches: the same tokens as reading the whole text at each step, and every prompt read once."""

from contextlib import contextmanager

import pytest
import torch
from transformers.generation.streamers import BaseStreamer

from dms.cache import DMSCache
from dms.modes import set_mode

# Without a cache generate says that it is slow.
pytestmark = pytest.mark.filterwarnings("ignore:use_cache is False")

NEW = 12
# Each draws from the whole vocabulary, so that a wrong probability anywhere shows.
MANY = {
    "samples": {"num_return_sequences": 3, "do_sample": True, "top_k": 0},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "sampled beams": {"num_beams": 3, "do_sample": True, "top_k": 0},
}
WAYS = {"greedy": {}, "sampled": {"do_sample": True, "top_k": 0}} | MANY


def _copies(options: dict) -> int:
    return max(options.get("num_beams", 1), options.get("num_return_sequences", 1))


def _generate(model, inputs, use_cache=True, **options):
    torch.manual_seed(3)
    options = {"max_new_tokens": NEW, "do_sample": False} | options
    return model.generate(**inputs, use_cache=use_cache, **options)


@contextmanager
def _counted(model):
    """Tokens that the model reads meanwhile, padding included."""
    count = [0]

    def hook(module, args):
        count[0] += args[0].numel()

    handle = model.get_input_embeddings().register_forward_pre_hook(hook)
    yield count
    handle.remove()


@pytest.fixture
def prompts(make_batch):
    """Two, the second left-padded."""
    batch = make_batch(2, 40, left=[0, 13])
    return {name: batch[name] for name in ("input_ids", "attention_mask")}


@pytest.mark.parametrize("chunk", [None, "model.dms.prefill_chunk", "prefill_chunk_size"])
@pytest.mark.parametrize("alignment", ["own", "next"])
@pytest.mark.parametrize("way", WAYS)
def test_the_same_tokens_and_each_prompt_once(way, alignment, chunk, evicting, prompts):
    model, options = evicting(alignment=alignment), WAYS[way]
    expected = _generate(model, prompts, use_cache=False, **options)
    model.dms.prefill_chunk = 9 if chunk == "model.dms.prefill_chunk" else None
    with _counted(model) as count:
        found = _generate(model, prompts, **options, **({"prefill_chunk_size": 9} if chunk == "prefill_chunk_size" else {}))
    model.dms.prefill_chunk = None
    assert torch.equal(found, expected)
    rows = 2 * _copies(options)
    assert count[0] == 2 * 40 + rows * (NEW - 1)
    if way == "samples":
        assert len({tuple(row.tolist()) for row in found}) == rows


@pytest.mark.parametrize("way", ["greedy", "beams"])
def test_a_padded_prompt_is_as_if_it_were_alone(way, evicting, prompts):
    model, copies = evicting(), WAYS[way].get("num_return_sequences", 1)
    together = _generate(model, prompts, **WAYS[way])[copies:, 13:]
    alone = _generate(model, {name: tensor[1:, 13:] for name, tensor in prompts.items()}, **WAYS[way])
    assert torch.equal(together, alone)


def test_a_streamer_is_given_every_token(evicting, prompts):
    class Streamer(BaseStreamer):
        def __init__(self):
            self.given, self.ended = [], False

        def put(self, value):
            self.given += value.flatten().tolist()

        def end(self):
            self.ended = True

    streamer = Streamer()
    alone = {name: tensor[:1] for name, tensor in prompts.items()}
    found = _generate(evicting(), alone, streamer=streamer)
    assert streamer.given == found[0].tolist() and streamer.ended


@pytest.mark.parametrize("alignment", ["own", "next"])
def test_turns_of_a_conversation(alignment, evicting, prompts, make_batch):
    """The cache that a call returns goes into the next: the whole text is given, and what is new of it is read."""
    model = evicting(alignment=alignment)
    text, cache = prompts, None
    for turn in range(3):
        expected = _generate(model, text, use_cache=False)
        past = 0 if cache is None else cache.get_seq_length()
        with _counted(model) as count:
            out = _generate(model, text, past_key_values=cache, return_dict_in_generate=True)
        cache = out.past_key_values
        assert isinstance(cache, DMSCache) and torch.equal(out.sequences, expected)
        # The last token was chosen and not read.
        assert cache.get_seq_length() == out.sequences.shape[1] - 1
        assert count[0] == 2 * (cache.get_seq_length() - past)
        question = make_batch(2, 7, seed=turn)["input_ids"]
        ids = torch.cat([out.sequences, question], 1)
        new = torch.ones(2, ids.shape[1] - text["attention_mask"].shape[1], dtype=torch.long)
        text = {"input_ids": ids, "attention_mask": torch.cat([text["attention_mask"], new], 1)}
    assert cache.report(warn=False).cr > 1.3


@pytest.mark.parametrize("way", WAYS)
def test_going_on_from_a_saved_cache(way, evicting, prompts, make_batch, tmp_path):
    """n samples or beams of each text, whose past is read from a file, and whose pages they share."""
    model, options = evicting(), WAYS[way]
    first = _generate(model, prompts, return_dict_in_generate=True)
    first.past_key_values.save(tmp_path / "cache")
    question = make_batch(2, 5, seed=8)["input_ids"]
    mask = torch.cat([prompts["attention_mask"], torch.ones(2, NEW + 5, dtype=torch.long)], 1)
    text = {"input_ids": torch.cat([first.sequences, question], 1), "attention_mask": mask}
    expected = _generate(model, text, use_cache=False, **options)
    cache = DMSCache.load(tmp_path / "cache", model)
    with _counted(model) as count:
        found = _generate(model, text, past_key_values=cache, **options)
    assert torch.equal(found, expected)
    rows = 2 * _copies(options)
    assert count[0] == 2 * 6 + rows * (NEW - 1)
    # And from as many rows as there are samples, each with a past of its own: again only what is new is read.
    assert cache.batch_size == rows
    if way == "samples":
        longer = {
            "input_ids": found,
            "attention_mask": torch.cat([mask.repeat_interleave(3, 0), torch.ones(rows, NEW, dtype=torch.long)], 1),
        }
        with _counted(model) as count:
            again = _generate(model, longer, past_key_values=cache)
        assert torch.equal(again, _generate(model, longer, use_cache=False))
        assert count[0] == rows * NEW


def test_samples_of_one_prompt_over_as_many_rows(evicting, prompts):
    """The prompt is given once; the cache holds a row for each sample already."""
    model = evicting()
    alone = {name: tensor[:1] for name, tensor in prompts.items()}
    cache = _generate(model, alone, max_new_tokens=1, return_dict_in_generate=True).past_key_values
    longer = {name: torch.cat([tensor, torch.ones(1, 1, dtype=torch.long)], 1) for name, tensor in alone.items()}
    cache.batch_repeat_interleave(3)
    expected = _generate(model, longer, use_cache=False, **MANY["samples"])
    assert torch.equal(_generate(model, longer, past_key_values=cache, **MANY["samples"]), expected)


def test_pages_of_a_prompt_are_shared_by_its_samples(evicting, make_batch):
    model = evicting(window=2)
    ids = make_batch(1, 400)["input_ids"]
    cache = DMSCache(model, page_size=16)
    _generate(model, {"input_ids": ids}, past_key_values=cache, num_return_sequences=8, do_sample=True, max_new_tokens=2)
    layer = cache.layers[0].store
    assert layer.num_kept.shape[0] == 8
    full = int((layer.num_kept[0] // 16).sum())
    assert full > 10 and layer.pool.num_used <= full + 8 * 2 * 2


def test_evict_bias_lasts_for_a_call(evicting, prompts):
    model = evicting()
    caches = {}
    for bias in (None, -100.0, 0.0, 100.0):
        caches[bias] = _generate(model, prompts, evict_bias=bias, return_dict_in_generate=True)
        assert model.dms.evict_bias == 0.0
    report = {bias: out.past_key_values.report(warn=False) for bias, out in caches.items()}
    assert report[-100.0].alive == report[-100.0].seen and report[-100.0].cr == 1.0
    assert report[100.0].alive == 2 * 2 * 2 * 5
    assert report[None].alive == report[0.0].alive
    assert report[100.0].alive < report[0.0].alive < report[-100.0].alive
    set_mode(model, "dense")
    dense = _generate(model, prompts)
    set_mode(model, "evict")
    assert torch.equal(caches[-100.0].sequences, dense) and not torch.equal(caches[0.0].sequences, dense)
    assert torch.equal(caches[100.0].sequences, _biased_without_cache(model, prompts))


def _biased_without_cache(model, prompts):
    model.dms.evict_bias = 100.0
    try:
        return _generate(model, prompts, use_cache=False)
    finally:
        model.dms.evict_bias = 0.0


def test_an_error_resets_the_bias(evicting):
    model = evicting()
    with pytest.raises(ValueError, match="cache_implementation"):
        model.generate(torch.full((1, 3), 5), max_new_tokens=2, evict_bias=3.0, cache_implementation="static")
    assert model.dms.evict_bias == 0.0
