"""How many rows of logits the loss holds at a time where nobody says: as many as stay within 1.5 GB."""

# What a loss may hold at once beyond its inputs and their gradients.
LOSS_BYTES = 1_500_000_000
# Of it for what goes by tokens instead of rows (indices, the rows' losses) and what an allocator rounds up.
_RESERVED_BYTES = 50_000_000


def rows_within_budget(bytes_per_row: int) -> int:
    """Rows of a chunk, 1 or more; see the routes' `bytes_per_row`."""
    return max(1, (LOSS_BYTES - _RESERVED_BYTES) // bytes_per_row)
