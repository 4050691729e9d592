"""Planned sequences as arrays and micro-batches. B sequences, T tokens of a sequence."""

from dataclasses import dataclass

import numpy as np
import torch

from dms_train.data.mixture import PlannedSequence


@dataclass(frozen=True)
class SequenceArrays:
    """Sequences of one length."""

    ids: np.ndarray
    """[B, T] int32."""
    segment: np.ndarray
    """[B, T] int32: 1, 2, ... by document, 0 for padding."""
    counted: np.ndarray
    """[B, T] bool: whether the loss counts the prediction at a token."""
    number: np.ndarray
    """[B] int64: the sequence's number in the run, which names its noise."""


def make_arrays(planned: list[PlannedSequence], length: int, pad_id: int) -> SequenceArrays:
    ids = np.full((len(planned), length), pad_id, np.int32)
    segment = np.zeros((len(planned), length), np.int32)
    counted = np.zeros((len(planned), length), bool)
    for b, sequence in enumerate(planned):
        at = 0
        for place, piece in enumerate(sequence.pieces, 1):
            document_ids, document_counted = piece.document.arrays()
            end = at + piece.length
            ids[b, at:end] = document_ids[piece.start : piece.stop]
            counted[b, at:end] = document_counted[piece.start : piece.stop]
            segment[b, at:end] = place
            at = end
    return SequenceArrays(ids, segment, counted, np.array([sequence.number for sequence in planned], np.int64))


def micro_batches(arrays: SequenceArrays, size: int) -> list[dict[str, torch.Tensor]]:
    """`size` sequences each, as `distill_step` takes them: positions restart with each document, and with padding."""
    batches = []
    for start in range(0, len(arrays.number), size):
        part = slice(start, start + size)
        batches.append(
            {
                "input_ids": torch.from_numpy(arrays.ids[part].astype(np.int64)),
                "segment_ids": torch.from_numpy(arrays.segment[part].astype(np.int64)),
                "position_ids": torch.from_numpy(_positions(arrays.segment[part])),
                "loss_mask": torch.from_numpy(arrays.counted[part].copy()),
                "number": torch.from_numpy(arrays.number[part].copy()),
            }
        )
    return batches


def _positions(segment_BT: np.ndarray) -> np.ndarray:
    place_T = np.arange(segment_BT.shape[1])
    starts_BT = np.ones(segment_BT.shape, bool)
    starts_BT[:, 1:] = segment_BT[:, 1:] != segment_BT[:, :-1]
    return place_T - np.maximum.accumulate(np.where(starts_BT, place_T, 0), axis=1)
