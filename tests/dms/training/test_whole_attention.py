"""Whole documents in evict mode by the kernels of training, beside the masked reference."""

import pytest
import torch

from dms.modes import set_mode, state_of
from dms.training.soft_decisions import whole_attention


@pytest.mark.parametrize("window", [5, (2, 9, 25)])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma4_text", "gpt_oss", "gpt_neox"])
@torch.no_grad()
def test_it_equals_the_masked_reference(family, window, build_gated):
    """Capped scores, sink logits and layers that follow others among them."""
    model = build_gated(family, window=window, sinks=1)
    set_mode(model, "evict")
    ids = torch.randint(2, 97, (2, 70), generator=torch.Generator().manual_seed(0))
    expected = model(input_ids=ids, use_cache=False).logits
    state_of(model).masked_attention = whole_attention
    assert (model(input_ids=ids, use_cache=False).logits - expected).abs().max() < 1e-4
