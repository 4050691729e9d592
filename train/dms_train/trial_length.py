"""Under trial: gates that hold beyond their training length, by training at several lengths and at positions that begin anywhere.

Both are functions of the recipe and a sequence's number, so that a continued run, and any split into micro-batches, sees the same.
B sequences, T tokens of a sequence.
"""

from random import Random

import torch


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


def add_offsets(batch: dict[str, torch.Tensor], most: int, seed: int) -> dict[str, torch.Tensor]:
    """Add `position_offset` [B] int64, drawn from 0..most for each sequence of the run: what the models' positions begin at."""
    drawn = [Random(f"{seed}:position_offset:{number}").randint(0, most) for number in batch["number"].tolist()]
    return {**batch, "position_offset": torch.tensor(drawn)}
