"""Sizes of blocks and tiles."""


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def power_of_two(n: int) -> int:
    """The smallest that is not below n."""
    return 1 << (n - 1).bit_length()


def padded(D: int) -> int:
    """A dimension as Triton's blocks and matrix products take it."""
    return max(16, power_of_two(D))
