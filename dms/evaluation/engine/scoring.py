"""How well a model predicts each token of a text, without ever holding the logits of all of them.

Shapes: B batch, T tokens, M model dim, V vocabulary.
"""

from dataclasses import dataclass

import torch
from torch import nn
from transformers.cache_utils import Cache

from dms.hf_compat import output_cache
from dms.lm_head import difference_of_head, make_logits

# Float32 logits that are alive at once; what is made of them is as large again.
CHUNK_BYTES = 2**28
_SAMPLE = 16


@dataclass(frozen=True)
class Predictions:
    """Of the tokens 1..T-1, each from those before it. nll_BT [B, T - 1] float32: in nats. right_BT [B, T - 1] bool: the first
    choice is the token. cache: what the forward pass left."""

    nll_BT: torch.Tensor
    right_BT: torch.Tensor
    cache: Cache | None


@torch.no_grad()
def predict(model: nn.Module, ids_BT: torch.Tensor, *, use_cache: bool) -> Predictions:
    """One forward pass over `ids_BT` [B, T] in the model's mode."""
    if difference_of_head(model, ids_BT[:1, :_SAMPLE]) is not None:
        # A family whose head is not known: its own logits, all of them.
        outputs = model(input_ids=ids_BT, use_cache=use_cache)
        score = [_score(outputs.logits[:, :-1].flatten(0, 1), ids_BT[:, 1:].flatten())]
    else:
        outputs = model.get_decoder()(input_ids=ids_BT, use_cache=use_cache)
        hidden_NM, target_N = outputs.last_hidden_state[:, :-1].flatten(0, 1), ids_BT[:, 1:].flatten()
        rows = max(1, CHUNK_BYTES // (4 * model.config.get_text_config().vocab_size))
        score = [
            _score(make_logits(model, hidden_nM), target_n)
            for hidden_nM, target_n in zip(hidden_NM.split(rows), target_N.split(rows), strict=True)
        ]
    nll_N, right_N = (torch.cat(parts) for parts in zip(*score, strict=True))
    shape = (ids_BT.shape[0], ids_BT.shape[1] - 1)
    return Predictions(nll_N.view(shape), right_N.view(shape), output_cache(outputs) if use_cache else None)


def _score(logits_nV: torch.Tensor, target_n: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    logits_nV = logits_nV.float()
    return torch.nn.functional.cross_entropy(logits_nV, target_n, reduction="none"), logits_nV.argmax(-1) == target_n
