"""How well a model predicts each token of a text, without ever holding the logits of all of them.

Shapes: B batch, T tokens, M model dim, V vocabulary.
"""

import itertools
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from transformers.cache_utils import Cache

from dms.evaluation.policies import PolicyCache
from dms.hf_compat import cache_argument, output_cache
from dms.lm_head import difference_of_head, make_logits, text_decoder
from dms.modes import reading

# Float32 logits that are alive at once; what is made of them is as large again.
CHUNK_BYTES = 2**28
_SAMPLE = 16


@dataclass(frozen=True)
class Predictions:
    """How well tokens 1..T-1 of each text are predicted, each from those before it."""

    nll_BT: torch.Tensor
    """[B, T - 1] float32: negative log-likelihood in nats."""
    right_BT: torch.Tensor
    """[B, T - 1] bool: the first choice is the token."""
    cache: Cache | None
    """What the forward pass left."""


@torch.no_grad()
def predict(model: Any, ids_BT: torch.Tensor, *, use_cache: bool, cache: Cache | None = None) -> Predictions:
    """One forward pass over `ids_BT` [B, T] in the model's mode. cache: None: of the model's own making, if it uses one."""
    outputs = _forward(model, ids_BT, _knows_head(model, ids_BT), use_cache=use_cache, cache=cache)
    nll_BT, right_BT = _score_outputs(model, outputs, ids_BT[:, 1:])
    return Predictions(nll_BT, right_BT, output_cache(outputs) if use_cache else None)


@torch.no_grad()
def predict_in_parts(model: Any, ids_BT: torch.Tensor, cache: Cache, *, num_given: int, chunk: int) -> Predictions:
    """The same over a cache that evicts after each forward pass: the first `num_given` tokens in parts of `chunk`, then one at a time."""
    knows_head, parts = _knows_head(model, ids_BT), []
    T = ids_BT.shape[1]
    ends = [*range(chunk, num_given, chunk), *range(num_given, T + 1)]
    with reading(model, T):
        for first, end in itertools.pairwise([0, *ends]):
            outputs = _forward(model, ids_BT[:, first:end], knows_head, use_cache=True, cache=cache)
            if end == num_given and isinstance(cache, PolicyCache):
                cache.finish_prompt(model, ids_BT[:, :end])
            # The last token of all has no next one.
            if first + 1 < T:
                parts.append(_score_outputs(model, outputs, ids_BT[:, first + 1 : end + 1]))
    nll_BT, right_BT = (torch.cat(scores, 1) for scores in zip(*parts, strict=True))
    return Predictions(nll_BT, right_BT, cache)


class PredictionsBesideDense(NamedTuple):
    """How well tokens 1..T-1 of each text are predicted, and how far from the dense model."""

    nll_BT: torch.Tensor
    """[B, T - 1] float32: negative log-likelihood in nats."""
    right_BT: torch.Tensor
    """[B, T - 1] bool: the first choice is the token."""
    kl_BT: torch.Tensor
    """[B, T - 1] float32: KL(dense || model) in nats."""


@torch.no_grad()
def score_beside_dense(model: Any, ids_BT: torch.Tensor, hidden_BTM: torch.Tensor, dense_BTM: torch.Tensor) -> PredictionsBesideDense:
    """Score final hidden states of `ids_BT` [B, T] beside the dense model's, through a head that `dms.lm_head` knows."""
    shape, target_N = ids_BT[:, 1:].shape, ids_BT[:, 1:].flatten()
    # Of both models there are logits, and their log-probabilities.
    rows = max(1, CHUNK_BYTES // (16 * model.config.get_text_config().vocab_size))
    parts = []
    hidden_NM, dense_NM = (hidden[:, :-1].flatten(0, 1) for hidden in (hidden_BTM, dense_BTM))
    for hidden_nM, dense_nM, target_n in zip(hidden_NM.split(rows), dense_NM.split(rows), target_N.split(rows), strict=True):
        logits_nV = make_logits(model, hidden_nM)
        log_nV, log_dense_nV = (logits.float().log_softmax(-1) for logits in (logits_nV, make_logits(model, dense_nM)))
        parts.append((*_score(logits_nV, target_n), (log_dense_nV.exp() * (log_dense_nV - log_nV)).sum(-1)))
    return PredictionsBesideDense(*(torch.cat(part).view(shape) for part in zip(*parts, strict=True)))


def _knows_head(model: Any, ids_BT: torch.Tensor) -> bool:
    """Whether logits can be made from hidden states part by part: of a family whose head is not known, its own logits are taken, all at once."""
    return difference_of_head(model, ids_BT[:1, :_SAMPLE]) is None


def _forward(model: Any, ids_BT: torch.Tensor, knows_head: bool, *, use_cache: bool, cache: Cache | None = None) -> Any:
    """Hidden states where the head is known, else logits. cache: None: the model makes its own, if it uses one."""
    module = text_decoder(model) if knows_head else model
    given = {} if cache is None else cache_argument(module, cache)
    return module(input_ids=ids_BT, use_cache=use_cache, **given)


def _score_outputs(model: Any, outputs: Any, target_BT: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """nll and right [B, T'] of the T' targets, which are the tokens after the first T' of the forward pass."""
    T, target_N = target_BT.shape[1], target_BT.flatten()
    if hasattr(outputs, "logits"):
        score = [_score(outputs.logits[:, :T].flatten(0, 1), target_N)]
    else:
        hidden_NM = outputs.last_hidden_state[:, :T].flatten(0, 1)
        rows = max(1, CHUNK_BYTES // (4 * model.config.get_text_config().vocab_size))
        score = [
            _score(make_logits(model, hidden_nM), target_n)
            for hidden_nM, target_n in zip(hidden_NM.split(rows), target_N.split(rows), strict=True)
        ]
    nll_N, right_N = (torch.cat(parts) for parts in zip(*score, strict=True))
    return nll_N.view(target_BT.shape), right_N.view(target_BT.shape)


def _score(logits_nV: torch.Tensor, target_n: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    logits_nV = logits_nV.float()
    return torch.nn.functional.cross_entropy(logits_nV, target_n, reduction="none"), logits_nV.argmax(-1) == target_n
