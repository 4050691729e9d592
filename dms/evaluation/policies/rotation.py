"""How an attention layer rotates its queries by their positions: undone for those that came, and averaged over those to come.

Shapes: B batch, H heads, N queries, D head dim, R cosines of a position.
"""

from collections.abc import Sequence
from typing import Any

import torch

from dms.attention import evict_attention
from dms.evaluation.policies import rotary_compat
from dms.layer_discovery import AttentionLayer, FollowingLayer
from dms.modes import set_mode, state_of
from dms.placement import compute_device
from dms.upstream import UpstreamChanged

# Where one and the same query is looked at, to see whether the rotation is the layer's own.
_POSITIONS = (0, 1, 7)


class Rotation:
    """Of one layer. Queries come as they are or rotated; results are float32, or float64 for such queries."""

    def __init__(self, model: Any, layer: AttentionLayer):
        self._decoder, self._module = state_of(model).decoder, layer.module

    def apply(self, x_BHND: torch.Tensor, position_N: torch.Tensor) -> torch.Tensor:
        """What was not rotated, at these positions."""
        return self._rotate(x_BHND, *self._at(position_N))

    def undo(self, query_BHND: torch.Tensor, position_N: torch.Tensor) -> torch.Tensor:
        """Queries at these positions as they were before."""
        cos, sin = self._at(position_N)
        # Some models scale both.
        square = cos.square() + sin.square()
        return self._rotate(query_BHND, cos / square, -sin / square)

    def ahead(self, x_BHND: torch.Tensor, first: int, number: int) -> torch.Tensor:
        """What was not rotated, by the mean of the rotations at `number` positions from `first` on. It is linear in cosines and sines."""
        cos, sin = self._at(torch.arange(first, first + number, device=x_BHND.device))
        shape = (1, x_BHND.shape[2], cos.shape[2])
        return self._rotate(x_BHND, cos.mean(1, keepdim=True).expand(shape), sin.mean(1, keepdim=True).expand(shape))

    def _at(self, position_N: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return rotary_compat.rotary_embedding(self._decoder, self._module, position_N)

    def _rotate(self, x_BHND: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        wide = torch.promote_types(x_BHND.dtype, torch.float32)
        return rotary_compat.rotate(self._module, x_BHND.to(wide), cos.to(wide), sin.to(wide))


class NoRotation(Rotation):
    """Of a layer whose queries know no position."""

    def apply(self, x_BHND: torch.Tensor, position_N: torch.Tensor) -> torch.Tensor:
        return x_BHND.to(torch.promote_types(x_BHND.dtype, torch.float32))

    def undo(self, query_BHND: torch.Tensor, position_N: torch.Tensor) -> torch.Tensor:
        return self.apply(query_BHND, position_N)

    def ahead(self, x_BHND: torch.Tensor, first: int, number: int) -> torch.Tensor:
        return self.apply(x_BHND, torch.empty(0))


def rotations(model: Any) -> dict[int, Rotation]:
    """Of all layers with gates, by index, each held against what its layer does.

    Raises:
        ValueError: a model that rotates in another way, or by frequencies that depend on a text's length.
    """
    state = state_of(model)
    if state.rotary.changes:
        raise ValueError(
            f"the rotary frequencies of {type(model).__name__} depend on a text's length, so that those of future positions are not known; leave out "
            "policies that estimate future queries (expected_attention)"
        )
    return {layer.index: _rotation(model, layer, query_PH1D) for layer, query_PH1D in _same_queries(model, _POSITIONS).items()}


def _rotation(model: Any, layer: AttentionLayer, query_PH1D: torch.Tensor) -> Rotation:
    """query [P, H, 1, D]: one query of each head, at each of _POSITIONS."""
    tolerance = 1e-3 if query_PH1D.dtype in (torch.float32, torch.float64) else 0.05
    first, position = query_PH1D[:1], torch.tensor(_POSITIONS, device=query_PH1D.device)
    reason = "it rotates queries in another way"
    for kind in (NoRotation, Rotation):
        rotation = kind(model, layer)
        try:
            found = [rotation.apply(rotation.undo(first, position[:1]), position[i : i + 1]) for i in range(len(_POSITIONS))]
        except (UpstreamChanged, RuntimeError) as error:
            reason = str(error)
            continue
        if (torch.cat(found) - query_PH1D).norm() <= tolerance * query_PH1D.norm():
            return rotation
    raise ValueError(
        f"how {layer.name} of {type(model).__name__} rotates its queries is not known here ({reason}); leave out policies that estimate future "
        "queries (expected_attention)"
    )


@torch.no_grad()
def _same_queries(model: Any, positions: Sequence[int]) -> dict[AttentionLayer, torch.Tensor]:
    """By layer with a gate: queries [P, Hq, 1, D] that differ by their position alone, one for each of `positions`.

    A token that stands alone attends to itself wherever it is, so that all layers give it the same hidden states.
    """
    state = state_of(model)
    queries: list[torch.Tensor] = []

    def note(query, key, value, **options):
        queries.append(query)
        return evict_attention(query, key, value, **options)

    mode, before, device = state.mode, state.masked_attention, compute_device(model)
    set_mode(model, "evict")
    state.masked_attention = note
    try:
        ids_P1 = torch.zeros(len(positions), 1, dtype=torch.long, device=device)
        model(input_ids=ids_P1, position_ids=torch.tensor(positions, device=device)[:, None], use_cache=False)
    finally:
        state.masked_attention = before
        set_mode(model, mode)
    both: list[AttentionLayer | FollowingLayer] = [*state.layers, *state.following]
    layers = sorted(both, key=lambda layer: layer.index)
    return {layer: query for layer, query in zip(layers, queries, strict=True) if isinstance(layer, AttentionLayer)}
