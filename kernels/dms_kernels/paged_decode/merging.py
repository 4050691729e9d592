"""What a program of `decode_kernel` does with the parts of a head: merges them, and writes the output.

Shapes: T queries, Hq query heads, G of them for each KV head, D head dim.
"""

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise RuntimeError("this needs Triton; install it (pip install triton)") from error


@triton.jit
def write(
    out, o, top, total, sink, row, row0, b, h, Hq, G: tl.constexpr, T: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, SINK: tl.constexpr
):
    """o / total to the output [B, T, Hq, D]; rows that see nothing become 0. Row t * G + g of the head is query t of its head g."""
    dim = tl.arange(0, DP)
    t, head = (row0 + row) // G, h * G + (row0 + row) % G
    real = row0 + row < G * T
    if SINK:
        logit = tl.load(sink + head, mask=real, other=0.0).to(tl.float32) * 1.4426950408889634
        new_top = tl.maximum(top, logit)
        # A row that sees nothing, beside a sink logit of -inf: any finite number will do.
        shift = tl.where(new_top == float("-inf"), 0.0, new_top)
        fade = tl.exp2(top - shift)
        o, total = o * fade[:, None], total * fade + tl.exp2(logit - shift)
    o = o / tl.where(total > 0, total, 1.0)[:, None]
    at = (b.to(tl.int64) * T + t) * Hq + head
    tl.store(out + at[:, None] * D + dim[None, :], o.to(out.dtype.element_ty), mask=real[:, None] & (dim < D)[None, :])


@triton.jit
def merge(
    part_acc, part_top, part_total, first_program, first, step, num_parts, row, DP: tl.constexpr, ROWS: tl.constexpr, PARTS: tl.constexpr
):
    """`num_parts` parts of one head, from its part `first` on every `step`-th, as one [ROWS, DP], its maximum and its sum [ROWS];
    PARTS of them at a time, each lane adding up its own, so that the loads do not wait for each other."""
    lane, dim = tl.arange(0, PARTS), tl.arange(0, DP)
    acc = tl.zeros([PARTS, ROWS, DP], tl.float32)
    top = tl.full([PARTS, ROWS], float("-inf"), tl.float32)
    total = tl.zeros([PARTS, ROWS], tl.float32)
    for start in range(0, num_parts, PARTS):
        part = first + (start + lane) * step
        # The program in which the head begins may end another's before it, and keeps this part in its second place.
        at = (2 * (first_program + part) + (part == 0).to(tl.int32))[:, None] * ROWS + row[None, :]
        there = (start + lane < num_parts)[:, None] & (row >= 0)[None, :]
        # Around the first-level cache, which does not see what other processors write.
        next_top = tl.load(part_top + at, mask=there, other=float("-inf"), cache_modifier=".cg")
        next_total = tl.load(part_total + at, mask=there, other=0.0, cache_modifier=".cg")
        values = tl.load(
            part_acc + at.to(tl.int64)[:, :, None] * DP + dim[None, None, :], mask=there[:, :, None], other=0.0, cache_modifier=".cg"
        )
        new_top = tl.maximum(top, next_top)
        shift = tl.where(new_top == float("-inf"), 0.0, new_top)
        fade, weight = tl.exp2(top - shift), tl.exp2(next_top - shift)
        acc = acc * fade[:, :, None] + values * weight[:, :, None]
        total = total * fade + next_total * weight
        top = new_top
    whole_top = tl.max(top, 0)
    shift = tl.where(whole_top == float("-inf"), 0.0, whole_top)
    weight = tl.exp2(top - shift[None, :])
    return tl.sum(acc * weight[:, :, None], 0), whole_top, tl.sum(total * weight, 0)
