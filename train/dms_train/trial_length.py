"""Under trial: gates that hold beyond their training length, by training at several lengths, and at positions that jump.

Both are functions of the recipe and a sequence's number, so that a continued run, and any split into micro-batches, sees the same.
B sequences, T tokens of a sequence.
"""

from functools import cache
from random import Random

import torch

from dms.config import DMSConfig
from dms.masks import Tokens
from dms.training.budgets import Budget, savings


def length_at(lengths: list[int], step: int) -> int:
    """Tokens of the documents of optimizer step 1, 2, ...: in turn, so that all lengths get the same number of tokens."""
    return lengths[(step - 1) % len(lengths)]


def divide(batch: dict[str, torch.Tensor], length: int, shortest: int) -> dict[str, torch.Tensor]:
    """A micro-batch whose sequences are documents of `length` tokens end to end, with one document a sequence.

    shortest: of all lengths of the run; documents are numbered so that no two of the run have the same noise.
    """
    T = batch["input_ids"].shape[1]
    parts = T // length
    divided = {name: tensor.view(-1, length) for name, tensor in batch.items() if name != "number"}
    divided["position_ids"] = divided["position_ids"] - divided["position_ids"][:, :1]
    divided["number"] = (batch["number"][:, None] * (T // shortest) + torch.arange(parts)).flatten()
    return divided


def windows_at(config: DMSConfig, trained_length: int, length: int) -> DMSConfig:
    """The configuration whose windows are to `length` what those of `config` are to `trained_length`, rounded.

    Raises:
        ValueError: so short a length that two windows become one.
    """
    scaled = [round(window * length / trained_length) for window in config.windows]
    return DMSConfig(**(config.to_dict() | {"window": scaled if len(scaled) > 1 else scaled[0]}))


def target_at_length(target: float, length: int, longest: int, config: DMSConfig, config_there: DMSConfig, budget: Budget) -> float:
    """The share to save in documents of `length` tokens for which gates evict as often as for `target` in those of the longest.

    Of a short document the same window is a larger part: an equal share could not be saved, or would teach gates to evict more in long ones.
    config: at the longest; config_there: at `length`.
    """
    return target * _most_saved(length, config_there, budget) / _most_saved(longest, config, budget)


@cache
def _most_saved(length: int, config: DMSConfig, budget: Budget) -> float:
    """The share that is saved where all is evicted, by the first window."""
    tokens = Tokens(torch.ones(1, length, dtype=torch.int32), torch.arange(length, dtype=torch.int32)[None])
    saved_BTK, whole_BT = savings(tokens, config.windows, sinks=config.sinks, alignment=config.alignment, budget=budget)
    return float(saved_BTK[..., 0].sum() / whole_BT.sum())


def add_jumps(batch: dict[str, torch.Tensor], most: int, seed: int) -> dict[str, torch.Tensor]:
    """Add `model_position_ids` [B, T]: positions that jump by 1..most at one token of each sequence, both drawn anew for each.

    The distances of a longer text at the price of a short one (PoSE, arXiv 2309.10400). To a rotary embedding, which sees distances
    alone, positions that all begin later would be the same ones.
    """
    place_BT = batch["position_ids"]
    moved = torch.zeros_like(place_BT)
    for row, number in enumerate(batch["number"].tolist()):
        rng = Random(f"{seed}:position_jump:{number}")
        moved[row, rng.randrange(1, place_BT.shape[1]) :] = rng.randint(1, most)
    return {**batch, "model_position_ids": place_BT + moved}
