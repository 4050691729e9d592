"""Draw the next token with random numbers that belong to a sequence, so that what else is in its batch changes nothing.

Shapes: B batch, V vocabulary.
"""

import torch


def draw_tokens(logits_BV: torch.Tensor, draw_B: list[float], *, temperature: float, top_p: float) -> torch.Tensor:
    """[B] int64: of each row the token at which its cumulative probability passes its draw in [0, 1)."""
    # From the likeliest on: the tail, where sums are coarse, comes last.
    share_BV, order_BV = torch.sort(torch.softmax(logits_BV.float() / temperature, dim=-1), dim=-1, descending=True)
    below_BV = share_BV.cumsum(dim=-1)
    # The tokens that make up top_p: all before which less than that has been summed.
    kept_B1 = (below_BV - share_BV < top_p).sum(dim=-1, keepdim=True)
    reached_B1 = below_BV.gather(-1, kept_B1 - 1)
    drawn_B1 = torch.tensor(draw_B, device=logits_BV.device, dtype=below_BV.dtype)[:, None]
    place_B1 = torch.minimum(torch.searchsorted(below_BV, drawn_B1 * reached_B1, right=True), kept_B1 - 1)
    return order_BV.gather(-1, place_B1)[:, 0]
