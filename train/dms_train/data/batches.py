"""Rows as arrays and micro-batches. R rows, T tokens of a row."""

from dataclasses import dataclass

import numpy as np
import torch

from dms_train.data.mixture import PlannedRow


@dataclass(frozen=True)
class Rows:
    """ids_RT int32; segment_RT int32, 1, 2, ... by document and 0 for padding; counted_RT bool; number_R int64."""

    ids: np.ndarray
    segment: np.ndarray
    counted: np.ndarray
    number: np.ndarray


def make_rows(planned: list[PlannedRow], length: int, pad_id: int) -> Rows:
    ids = np.full((len(planned), length), pad_id, np.int32)
    segment = np.zeros((len(planned), length), np.int32)
    counted = np.zeros((len(planned), length), bool)
    for row, plan in enumerate(planned):
        at = 0
        for place, piece in enumerate(plan.pieces, 1):
            document_ids, document_counted = piece.document.arrays()
            end = at + piece.length
            ids[row, at:end] = document_ids[piece.start : piece.stop]
            counted[row, at:end] = document_counted[piece.start : piece.stop]
            segment[row, at:end] = place
            at = end
    return Rows(ids, segment, counted, np.array([plan.number for plan in planned], np.int64))


def micro_batches(rows: Rows, size: int) -> list[dict[str, torch.Tensor]]:
    """`size` rows each, as `distill_step` takes them: positions restart with each document, and with padding."""
    batches = []
    for start in range(0, len(rows.number), size):
        part = slice(start, start + size)
        batches.append(
            {
                "input_ids": torch.from_numpy(rows.ids[part].astype(np.int64)),
                "segment_ids": torch.from_numpy(rows.segment[part].astype(np.int64)),
                "position_ids": torch.from_numpy(_positions(rows.segment[part])),
                "loss_mask": torch.from_numpy(rows.counted[part].copy()),
                "number": torch.from_numpy(rows.number[part].copy()),
            }
        )
    return batches


def _positions(segment_RT: np.ndarray) -> np.ndarray:
    place_T = np.arange(segment_RT.shape[1])
    starts_RT = np.ones(segment_RT.shape, bool)
    starts_RT[:, 1:] = segment_RT[:, 1:] != segment_RT[:, :-1]
    return place_T - np.maximum.accumulate(np.where(starts_RT, place_T, 0), axis=1)
