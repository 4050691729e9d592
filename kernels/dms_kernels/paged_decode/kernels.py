"""The Triton kernel of `paged_decode`.

A fixed number of programs share out all tiles of all heads evenly. A tile is TILE entries of one head, and a head's tiles stand in
one line with the next head's: pending tokens, ring, pages. Every program takes an equal run of that line, whatever the heads hold,
and reads all lengths on the device, so that a captured launch stays right while the cache grows. Heads that one program reads whole
are written at once. Of a head that is cut each program leaves its part (a sum of values, a maximum, a sum of weights) in a workspace,
and whoever comes last merges the parts, in the order of their programs, so that the result does not depend on who that is. Of many
parts (TREE) first groups are merged, side by side, then what came of them.

With several windows a head's lists of pages follow one another; those that do not stay for good are masked by position.

Shapes: B batch, H KV heads, G query heads of each, T queries, D head dim, R ring slots, S pending tokens, P entries of a page, K
windows.
"""

from typing import no_type_check

from dms_kernels.arguments import FOR_GOOD as _FOR_GOOD
from dms_kernels.packing import load_packed
from dms_kernels.paged_decode.merging import merge, write

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise RuntimeError("this needs Triton; install it (pip install triton)") from error

FOR_GOOD = tl.constexpr(_FOR_GOOD)


@triton.jit
def _tiles(num_entries, TILE: tl.constexpr):
    return (num_entries + TILE - 1) // TILE


@triton.jit
def _tiles_of(seq_len, num_kept, window, num_new, TILE: tl.constexpr):
    """At least one, so that a program writes the output of a head that holds nothing."""
    stored = _tiles(tl.minimum(seq_len, window + 1), TILE) + _tiles(num_kept, TILE)
    return tl.maximum(stored + _tiles(num_new, TILE), 1)


@triton.jit
def _lengths(
    head, b, there, seq_len, num_kept, real, slot, H,
    TILE: tl.constexpr, PAGES: tl.constexpr, REAL: tl.constexpr, SLOTS: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """seq_len and num_kept of heads, and which head of the state each is; a row that is not real, or in no slot, has nothing. Of several lists num_kept
    is the sum, each in whole tiles."""
    if REAL:
        there = there & (tl.load(real + b, mask=there, other=0) != 0)
    row, held = b, head
    if SLOTS:
        row = tl.load(slot + b, mask=there, other=-1)
        there = there & (row >= 0)
        row = tl.maximum(row, 0)
        held = row * H + head % H
    length = tl.load(seq_len + row, mask=there, other=0)
    kept = length * 0
    if PAGES:
        if K == 1:
            kept = tl.load(num_kept + held, mask=there, other=0)
        else:
            for c in tl.static_range(K):
                kept += _tiles(tl.load(num_kept + held * K + c, mask=there, other=0), TILE) * TILE
    return length, kept, held


@triton.jit
def _tiles_of_heads(
    first, seq_len, num_kept, real, slot, num_heads, H, window, num_new,
    TILE: tl.constexpr, CHUNK: tl.constexpr, PAGES: tl.constexpr, REAL: tl.constexpr, SLOTS: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """[CHUNK]: the tiles of the heads from `first` on, 0 behind the last."""
    head = first + tl.arange(0, CHUNK)
    there = head < num_heads
    length, kept, _ = _lengths(head, head // H, there, seq_len, num_kept, real, slot, H, TILE, PAGES, REAL, SLOTS, K)
    return tl.where(there, _tiles_of(length, kept, window, num_new, TILE), 0)


@triton.jit
def _lift(dtype: tl.constexpr):
    """Factor on weights times scales of int8 values, which would otherwise fall below float16's normal numbers."""
    return 64.0 if dtype == tl.float16 else 1.0


@triton.jit
def _absorb(acc, top, total, q, k, v, visible, k_scale, v_scale, inner, outer, CAPPED: tl.constexpr, QUANTIZED: tl.constexpr):
    """One tile more into the running softmax. total [rows, TILE] is summed over the tiles alone: a sum over its columns would
    make the warps wait for each other at every tile."""
    s = tl.dot(q, tl.trans(k), input_precision="ieee")
    if QUANTIZED:
        s *= k_scale[None, :]
    s *= inner
    if CAPPED:
        # tanh, in a form that does not overflow.
        s = outer * (1.0 - 2.0 / (tl.exp2(s) + 1.0))
    s = tl.where(visible, s, float("-inf"))
    new_top = tl.maximum(top, tl.max(s, 1))
    # While a row has seen nothing, any finite number will do.
    shift = tl.where(new_top == float("-inf"), 0.0, new_top)
    p = tl.exp2(s - shift[:, None])
    fade = tl.exp2(top - shift)
    total = total * fade[:, None] + p
    if QUANTIZED:
        p *= v_scale[None, :]
    acc = tl.dot(p.to(v.dtype), v, acc * fade[:, None], input_precision="ieee")
    return acc, new_top, total


@triton.jit
def _see(position, state, q_position, window, WINDOWS: tl.constexpr):
    """[rows, TILE] bool; q_position -1 sees nothing, as no position is negative there."""
    distance = q_position[:, None] - position[None, :]
    if len(WINDOWS) == 0:
        return (distance >= 0) & ((distance <= window) | (state != 1)[None, :])
    else:
        lifetime = tl.where(state == 1, window, FOR_GOOD)
        for j in tl.static_range(1, len(WINDOWS)):
            lifetime = tl.where(state == j + 2, WINDOWS[j], lifetime)
        return (distance >= 0) & (distance <= lifetime[None, :])


@triton.jit
def _read_new(
    acc, top, total, q, q_position, first, last, k_row, v_row, position_row, state_row, num_new, stride_k, stride_v, window, inner, outer,
    D: tl.constexpr, DP: tl.constexpr, TILE: tl.constexpr, CAPPED: tl.constexpr, WINDOWS: tl.constexpr,
):  # fmt: skip
    """Tiles [first, last) of the new tokens."""
    offs, dim = tl.arange(0, TILE), tl.arange(0, DP)
    for tile in range(first, last):
        at = tile * TILE + offs
        there = at < num_new
        mask = there[:, None] & (dim < D)[None, :]
        k = tl.load(k_row + at.to(tl.int64)[:, None] * stride_k + dim[None, :], mask=mask, other=0.0)
        v = tl.load(v_row + at.to(tl.int64)[:, None] * stride_v + dim[None, :], mask=mask, other=0.0)
        position = tl.load(position_row + at, mask=there, other=-1)
        state = tl.load(state_row + at, mask=there, other=0)
        visible = _see(position, state, q_position, window, WINDOWS) & (position >= 0)[None, :]
        acc, top, total = _absorb(acc, top, total, q, k, v, visible, 0.0, 0.0, inner, outer, CAPPED, False)
    return acc, top, total


@triton.jit
def _page_of(table_row, place, num_pages, offs, TILE: tl.constexpr, P: tl.constexpr):
    """Where tile `place` of a head's pages lies: a number where a tile lies in one page, [TILE] otherwise; 0 outside of them."""
    # Division rounds towards 0, which would put half a tile before the first page into it.
    from_0 = tl.maximum(place, 0)
    if P % TILE == 0:
        at = from_0 * TILE // P
    else:
        at = (from_0 * TILE + offs) // P
    return tl.load(table_row + at, mask=at < tl.where(place >= 0, num_pages, 0), other=0)


@triton.jit
def _read_stored(
    acc, top, total, q, q_position, first, last,
    ring_head, state_row, length, num_slots, window, last_state,
    pages, table_row, kept, scales, page_positions, inner, outer,
    D: tl.constexpr, DP: tl.constexpr, TILE: tl.constexpr, P: tl.constexpr, RING: tl.constexpr, PAGES: tl.constexpr,
    POSITIONS: tl.constexpr, LAST: tl.constexpr, CAPPED: tl.constexpr, QUANTIZED: tl.constexpr, GROUP: tl.constexpr, STAGES: tl.constexpr,
    WINDOWS: tl.constexpr, LIST: tl.constexpr,
):  # fmt: skip
    """Tiles [first, last) of the ring and of the pages that follow it, in one loop, so that loads run ahead from one into the
    other. Pages of another dtype than the ring's, and those of each list but the first, are read by another call. LIST > 0: that list,
    of which a query sees what is within its window. GROUP > 0: pages of int4, as in `packing`, which become numbers as they are read."""
    # Of an entry in pages.
    WIDTH: tl.constexpr = D // 2 if GROUP > 0 else D
    SCALED: tl.constexpr = QUANTIZED and GROUP == 0
    offs, dim = tl.arange(0, TILE), tl.arange(0, DP)
    in_ring = tl.minimum(length, window + 1)
    ring_tiles = _tiles(in_ring, TILE)
    num_pages = _tiles(kept, P)
    # The last token and its slot.
    end = tl.maximum(length - 1, 0)
    newest = end % (window + 1)
    if PAGES:
        # One tile ahead of its use.
        page = _page_of(table_row, first - ring_tiles, num_pages, offs, TILE, P)
    for tile in tl.range(first, last, num_stages=STAGES):
        place = tile - ring_tiles
        is_ring = tile < ring_tiles
        # Pointers are chosen as scalars: of a choice between tensors the compiler does not see that rows are contiguous.
        if PAGES:
            if P % TILE == 0:
                page_base = pages + page.to(tl.int64) * (2 * P * WIDTH) + place * TILE % P * WIDTH
                row = offs * WIDTH
            else:
                page_base = pages
                # Of ring tiles the page is 0, and rows follow one another.
                row = page.to(tl.int64) * (2 * P * WIDTH) + (offs - offs // P * P * (1 - is_ring.to(tl.int32))) * WIDTH
            base, to_v, num_here = page_base, P * WIDTH, kept - place * TILE
            if RING:
                base = tl.where(is_ring, ring_head + tile * (TILE * D), page_base)
                to_v = tl.where(is_ring, num_slots * D, P * D)
                num_here = tl.where(is_ring, in_ring - tile * TILE, kept - place * TILE)
        else:
            base, to_v, num_here = ring_head + tile * (TILE * D), num_slots * D, in_ring - tile * TILE
            row = offs * D
        k_row = base + row
        there = offs < num_here
        if GROUP > 0:
            scale_row = scales + (page.to(tl.int64) * (2 * P) + (place * TILE + offs) % P) * (3 * (D // GROUP))
            k = load_packed(k_row, scale_row, there, q.dtype, True, P, D, DP, GROUP, True)
            v = load_packed(k_row, scale_row, there, q.dtype, False, P, D, DP, GROUP, True)
        else:
            if DP == D:
                mask = there[:, None]
            else:
                mask = there[:, None] & (dim < D)[None, :]
            k = tl.load(k_row[:, None] + dim[None, :], mask=mask, other=0.0)
            v = tl.load(k_row[:, None] + (to_v + dim[None, :]), mask=mask, other=0.0)
        visible = there[None, :]
        if POSITIONS:
            if RING:
                slot = tile * TILE + offs
                age = newest - slot
                position = end - tl.where(age < 0, age + window + 1, age)
                state = tl.load(state_row + slot, mask=slot < in_ring, other=0).to(tl.int32)
                if LAST:
                    state = tl.where((position == end) & (last_state != 2), last_state, state)
                if PAGES:
                    # Entries of pages are as kept tokens of the beginning.
                    position, state = tl.where(is_ring, position, 0), tl.where(is_ring, state, 0)
                visible = visible & _see(position, state, q_position, window, WINDOWS)
            else:
                visible = visible & (q_position >= 0)[:, None]
        if LIST > 0:
            entry = page.to(tl.int64) * P + (place * TILE + offs) % P
            position = tl.load(page_positions + entry, mask=there, other=0)
            if POSITIONS:
                visible = visible & (q_position[:, None] - position[None, :] <= WINDOWS[LIST])
            else:
                visible = visible & (end - position <= WINDOWS[LIST])[None, :]
        k_scale, v_scale = 0.0, 0.0
        if SCALED:
            scale_row = scales + page.to(tl.int64) * (2 * P) + (place * TILE + offs) % P
            k_scale = tl.load(scale_row, mask=there, other=0.0)
            v_scale = tl.load(scale_row + P, mask=there, other=0.0) * _lift(q.dtype)
            k, v = k.to(q.dtype), v.to(q.dtype)
        if PAGES:
            page = _page_of(table_row, place + 1, num_pages, offs, TILE, P)
        acc, top, total = _absorb(acc, top, total, q, k, v, visible, k_scale, v_scale, inner, outer, CAPPED, SCALED)
    return acc, top, total


# These change while a cache grows, and what is compiled should not.
@triton.jit(do_not_specialize=["num_heads", "num_slots", "num_new", "max_pages"])
@no_type_check
def decode_kernel(
    q, ring, ring_state, seq_len, pages, table, num_kept, scales, page_positions, q_position, real, slot,
    new_k, new_v, new_position, new_state, last_state, sink,
    out, part_acc, part_top, part_total, tickets,
    num_heads, H, num_slots, window, num_new, max_pages, num_processors,
    q_stride_b, q_stride_h, q_stride_t, k_stride_b, k_stride_h, k_stride_s, v_stride_b, v_stride_h, v_stride_s,
    inner, outer,
    G: tl.constexpr, T: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, ROWS: tl.constexpr, PART_ROWS: tl.constexpr,
    PARTS: tl.constexpr, TILE: tl.constexpr, P: tl.constexpr, CHUNK: tl.constexpr, WAVES: tl.constexpr, SHARE: tl.constexpr,
    PAGES: tl.constexpr, REAL: tl.constexpr, SLOTS: tl.constexpr, NEW: tl.constexpr, POSITIONS: tl.constexpr, LAST: tl.constexpr, SINK: tl.constexpr, CAPPED: tl.constexpr,
    QUANTIZED: tl.constexpr, GROUP: tl.constexpr, STAGES: tl.constexpr, TREE: tl.constexpr, WINDOWS: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """Grid (num_processors * WAVES, blocks of ROWS of a head's G * T rows of queries).

    part_acc [blocks, 2 * programs, PART_ROWS, DP], part_top and part_total [blocks, 2 * programs, PART_ROWS] float32 need no
    values before; tickets [blocks, B * H] int32 are 0 before and after, and with TREE so are [blocks, 2 * programs] after them.
    inner, outer: the scores' factors, in powers of 2.
    """
    program, block = tl.program_id(0), tl.program_id(1)
    row0 = block * ROWS
    part_acc += (block * tl.num_programs(0)).to(tl.int64) * (2 * PART_ROWS * DP)
    part_top += block * tl.num_programs(0) * (2 * PART_ROWS)
    part_total += block * tl.num_programs(0) * (2 * PART_ROWS)
    group_tickets = tickets + tl.num_programs(1) * num_heads + block * (2 * tl.num_programs(0))
    tickets += block * num_heads

    all_tiles = 0
    for start in range(0, num_heads, CHUNK):
        all_tiles += tl.sum(
            _tiles_of_heads(start, seq_len, num_kept, real, slot, num_heads, H, window, num_new, TILE, CHUNK, PAGES, REAL, SLOTS, K)
        )
    # As many programs as processors unless each then has several shares: every cut costs a part, and parts cost a merge.
    programs = num_processors * tl.maximum(1, tl.minimum(WAVES, all_tiles // (SHARE * num_processors)))
    programs = tl.minimum(programs, _tiles(all_tiles, 2)).to(tl.int64)
    tile = (program * all_tiles.to(tl.int64) // programs).to(tl.int32)
    end = tl.minimum((program + 1) * all_tiles.to(tl.int64) // programs, all_tiles).to(tl.int32)

    # The head of the first tile, and where its tiles begin.
    head, begin, before = 0, 0, 0
    for start in range(0, num_heads, CHUNK):
        tiles = _tiles_of_heads(start, seq_len, num_kept, real, slot, num_heads, H, window, num_new, TILE, CHUNK, PAGES, REAL, SLOTS, K)
        passed = (before + tl.cumsum(tiles, 0) <= tile) & (start + tl.arange(0, CHUNK) < num_heads)
        head += tl.sum(passed.to(tl.int32))
        begin += tl.sum(tl.where(passed, tiles, 0))
        before += tl.sum(tiles)

    row = tl.arange(0, ROWS)
    dim = tl.arange(0, DP)
    used = row0 + row < G * T
    t, g = (row0 + row) // G, (row0 + row) % G
    while tile < end:
        b, h = head // H, head % H
        length, kept, held = _lengths(head, b, head >= 0, seq_len, num_kept, real, slot, H, TILE, PAGES, REAL, SLOTS, K)
        finish = begin + _tiles_of(length, kept, window, num_new, TILE)
        upto = tl.minimum(finish, end)
        q_at = q + b.to(tl.int64) * q_stride_b + (h * G + g)[:, None].to(tl.int64) * q_stride_h + t[:, None] * q_stride_t + dim[None, :]
        query = tl.load(q_at, mask=used[:, None] & (dim < D)[None, :], other=0.0)
        at_position = row
        if POSITIONS:
            at_position = tl.load(q_position + b * T + t, mask=used, other=-1)
        ruled = 2
        if LAST:
            ruled = tl.load(last_state + head).to(tl.int32)
        acc = tl.zeros([ROWS, DP], tl.float32)
        top = tl.full([ROWS], float("-inf"), tl.float32)
        total = tl.zeros([ROWS, TILE], tl.float32)
        first, last = tile - begin, upto - begin
        if NEW:
            new_tiles = _tiles(num_new, TILE)
            acc, top, total = _read_new(
                acc, top, total, query, at_position, first, tl.minimum(last, new_tiles),
                new_k + b.to(tl.int64) * k_stride_b + h.to(tl.int64) * k_stride_h,
                new_v + b.to(tl.int64) * v_stride_b + h.to(tl.int64) * v_stride_h,
                new_position + b * num_new, new_state + head.to(tl.int64) * num_new,
                num_new, k_stride_s, v_stride_s, window, inner, outer, D, DP, TILE, CAPPED, WINDOWS,
            )  # fmt: skip
            first, last = tl.maximum(first - new_tiles, 0), last - new_tiles
        ring_head = ring + held.to(tl.int64) * 2 * num_slots * D
        state_row = ring_state + held.to(tl.int64) * num_slots
        table_row = table
        if PAGES:
            table_row = table + held.to(tl.int64) * (K * max_pages)
        ring_last = last
        if K > 1:
            # Where the first list ends, and the second begins.
            ring_tiles = _tiles(tl.minimum(length, window + 1), TILE)
            upto_kept = kept
            kept = kept * 0
            if PAGES:
                kept = tl.load(num_kept + held * K, mask=upto_kept > 0, other=0)
            list_begin = ring_tiles + _tiles(kept, TILE)
            ring_last = tl.minimum(last, list_begin)
        if QUANTIZED:
            ring_last = tl.minimum(last, _tiles(tl.minimum(length, window + 1), TILE))
        acc, top, total = _read_stored(
            acc, top, total, query, at_position, first, ring_last, ring_head, state_row, length, num_slots, window, ruled,
            pages, table_row, kept, scales, page_positions, inner, outer,
            D, DP, TILE, P, True, PAGES and not QUANTIZED, POSITIONS, LAST, CAPPED, False, 0, STAGES, WINDOWS, 0,
        )  # fmt: skip
        if QUANTIZED:
            if GROUP == 0:
                acc *= _lift(query.dtype)
            list_last = last
            if K > 1:
                list_last = tl.minimum(last, list_begin)
            acc, top, total = _read_stored(
                acc, top, total, query, at_position, tl.maximum(first, ring_last), list_last, ring_head, state_row, length, num_slots, window, ruled,
                pages, table_row, kept, scales, page_positions, inner, outer,
                D, DP, TILE, P, False, True, POSITIONS, LAST, CAPPED, True, GROUP, STAGES, WINDOWS, 0,
            )  # fmt: skip
        if PAGES:
            for c in tl.static_range(1, K):
                # Each list by itself: its tiles as if they followed the ring's.
                kept = tl.load(num_kept + held * K + c, mask=upto_kept > 0, other=0)
                ahead = list_begin - ring_tiles
                list_end = list_begin + _tiles(kept, TILE)
                acc, top, total = _read_stored(
                    acc, top, total, query, at_position, tl.maximum(first, list_begin) - ahead, tl.minimum(last, list_end) - ahead,
                    ring_head, state_row, length, num_slots, window, ruled,
                    pages, table_row + c * max_pages, kept, scales, page_positions, inner, outer,
                    D, DP, TILE, P, False, True, POSITIONS, LAST, CAPPED, QUANTIZED, GROUP, STAGES, WINDOWS, c,
                )  # fmt: skip
                list_begin = list_end
        if QUANTIZED and GROUP == 0:
            acc *= 1.0 / _lift(query.dtype)
        weight = tl.sum(total, 1)
        if (tile == begin) & (upto == finish):
            write(out, acc, top, weight, sink, row, row0, b, h, H * G, G, T, D, DP, SINK)
        else:
            place = (2 * program + (tile == begin).to(tl.int32)) * PART_ROWS + row
            tl.store(part_acc + place.to(tl.int64)[:, None] * DP + dim[None, :], acc, mask=(row < PART_ROWS)[:, None] & (dim >= 0)[None, :])
            tl.store(part_top + place, top, mask=row < PART_ROWS)
            tl.store(part_total + place, weight, mask=row < PART_ROWS)
            # Tile t is with the last program p for which p * all_tiles // programs <= t.
            first_program = (((begin + 1) * programs - 1) // all_tiles).to(tl.int32)
            num_parts = ((finish * programs - 1) // all_tiles).to(tl.int32) - first_program + 1
            part_row = tl.arange(0, PART_ROWS)
            # All threads' parts are written before one of them says so.
            tl.debug_barrier()
            if TREE:
                # Groups of PARTS are merged where their last part is made, side by side, and then the groups.
                group = (program - first_program) // PARTS
                group_first = group * PARTS
                num_groups = (num_parts + PARTS - 1) // PARTS
                in_group = tl.minimum(num_parts - group_first, PARTS)
                group_place = 2 * (first_program + group_first) + (group == 0).to(tl.int32)
                if tl.atomic_add(group_tickets + group_place, 1, sem="acq_rel", scope="gpu") == in_group - 1:
                    tl.store(group_tickets + group_place, 0)
                    o, whole_top, whole = merge(
                        part_acc, part_top, part_total, first_program, group_first, 1, in_group, part_row, DP, PART_ROWS, PARTS
                    )
                    if num_groups == 1:
                        write(out, o, whole_top, whole, sink, part_row, row0, b, h, H * G, G, T, D, DP, SINK)
                    else:
                        # In place of the group's first part, which all threads have read.
                        tl.debug_barrier()
                        part_place = group_place * PART_ROWS + part_row
                        tl.store(part_acc + part_place.to(tl.int64)[:, None] * DP + dim[None, :], o)
                        tl.store(part_top + part_place, whole_top)
                        tl.store(part_total + part_place, whole)
                        tl.debug_barrier()
                        if tl.atomic_add(tickets + head, 1, sem="acq_rel", scope="gpu") == num_groups - 1:
                            tl.store(tickets + head, 0)
                            o, whole_top, whole = merge(
                                part_acc, part_top, part_total, first_program, 0, PARTS, num_groups, part_row, DP, PART_ROWS, PARTS
                            )
                            write(out, o, whole_top, whole, sink, part_row, row0, b, h, H * G, G, T, D, DP, SINK)
            elif tl.atomic_add(tickets + head, 1, sem="acq_rel", scope="gpu") == num_parts - 1:
                tl.store(tickets + head, 0)
                o, whole_top, whole = merge(part_acc, part_top, part_total, first_program, 0, 1, num_parts, part_row, DP, PART_ROWS, PARTS)
                write(out, o, whole_top, whole, sink, part_row, row0, b, h, H * G, G, T, D, DP, SINK)
        tile = upto
        begin = finish
        head += 1
