"""Rows of several documents: read as if each were alone; the last one goes on, and the others leave nothing behind."""

import pytest
import torch

from dms.cache import DMSCache, masked_cache


def _positions(lengths: list[int]) -> torch.Tensor:
    return torch.cat([torch.arange(length) for length in lengths])


@torch.no_grad()
@pytest.mark.parametrize("lengths", [[[20, 13], [1, 32]], [[33], [5, 28]], [[30, 1, 2], [11, 11, 11]]], ids=str)
@pytest.mark.parametrize("alignment", ["own", "next"])
@pytest.mark.parametrize(
    ("window", "family"),
    [
        pytest.param(0, "llama", marks=pytest.mark.slow),
        (4, "llama"),
        (4, "gemma4_text"),
        pytest.param(40, "llama", marks=pytest.mark.slow),
        ((1, 9, 14), "llama"),
    ],
)
def test_the_last_document_goes_on(window, family, alignment, lengths, evicting, make_batch):
    model = evicting(family, window=window, alignment=alignment, sinks=1)
    ids = make_batch(2, 60)["input_ids"]
    position = torch.stack([_positions(row) for row in lengths])
    caches = DMSCache(model, page_size=16), masked_cache(model)
    alone = [DMSCache(model, page_size=16) for _ in lengths]
    packed = [model(input_ids=ids[:, :33], position_ids=position, past_key_values=cache).logits for cache in caches]
    assert (packed[0] - packed[1]).abs().max() < 1e-4
    for row, (cache, documents) in enumerate(zip(alone, lengths, strict=True)):
        logits = model(input_ids=ids[row : row + 1, 33 - documents[-1] : 33], past_key_values=cache).logits
        assert (packed[0][row, 33 - documents[-1] :] - logits[0]).abs().max() < 1e-4
    last = torch.tensor([documents[-1] for documents in lengths])
    for start, stop in ((33, 34), (34, 45), *((i, i + 1) for i in range(45, 60))):
        at = last[:, None] + torch.arange(start - 33, stop - 33)
        found, expected = (model(input_ids=ids[:, start:stop], position_ids=at, past_key_values=cache).logits for cache in caches)
        assert (found - expected).abs().max() < 1e-4
        for row, cache in enumerate(alone):
            logits = model(input_ids=ids[row : row + 1, start:stop], position_ids=at[row : row + 1], past_key_values=cache).logits
            assert (found[row] - logits[0]).abs().max() < 1e-4
    together, apart = caches[0].report(warn=False), [cache.report(warn=False) for cache in alone]
    assert (together.seen, together.alive) == (sum(one.seen for one in apart), sum(one.alive for one in apart))
