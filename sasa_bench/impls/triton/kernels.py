"""Local self-attention on tensor cores: a block of queries of one head against its halo, by ``tl.dot``.

A program owns QUERY_ROWS x QUERY_COLUMNS queries of one head of one image. Their windows lie in a halo of
QUERY_ROWS + K - 1 rows and QUERY_COLUMNS + K - 1 columns, padded to COLUMNS; ROWS halo rows are multiplied at a time
and the softmax is accumulated over them, so that no tensor with K*K entries exists. q.r is two products of the queries
with the K row and the K column embeddings, moved from window to halo coordinates. Where a halo position takes no part,
its logit starts at LOWEST instead. The backward has one kernel by queries and one by keys; every value has one writer.

Maps are pixel-major: pixel (y, x) of image b begins at b * image_stride + (y * width + x) * pixel_stride and holds its
channels side by side. Logarithms of the softmax's denominator are in base 2.
"""

# Triton reads the annotations of these functions, so this module has no `from __future__ import annotations`.

import triton
import triton.language as tl

LOWEST = tl.constexpr(-1.0e30)
LOG2_E = tl.constexpr(1.4426950408889634)
SUMS = tl.constexpr(8)


@triton.jit
def position_table(
    rel_row,
    rel_col,
    head,
    K: tl.constexpr,
    WIDTH: tl.constexpr,
    CHANNELS: tl.constexpr,
    WINDOW: tl.constexpr,
):
    """Row and column embeddings [CHANNELS, WINDOW] of a head; each is zero in the channels of the other."""
    HALF: tl.constexpr = WIDTH // 2
    channel = tl.arange(0, CHANNELS)[:, None]
    step = tl.arange(0, WINDOW)[None, :]
    row = tl.load(rel_row + (head * HALF + channel) * K + step, mask=(channel < HALF) & (step < K), other=0.0)
    in_column = (channel >= HALF) & (channel < WIDTH) & (step < K)
    column = tl.load(rel_col + (head * (WIDTH - HALF) + channel - HALF) * K + step, mask=in_column, other=0.0)
    return row, column


@triton.jit
def start_of_logits(
    terms,
    offset,
    takes_part,
    K: tl.constexpr,
    WINDOW: tl.constexpr,
    POSITION: tl.constexpr,
):
    """q.r at the window offsets [queries, size] of halo rows or columns; LOWEST outside the window and the image."""
    inside = (offset >= 0) & (offset < K) & takes_part
    if POSITION:
        return tl.where(inside, tl.gather(terms, tl.minimum(tl.maximum(offset, 0), WINDOW - 1), axis=1), LOWEST)
    return tl.where(inside, 0.0, LOWEST)


@triton.jit
def within(index, size):
    """Whether 0 <= index < size, in one comparison: a negative index is a large unsigned one.

    A size of 1 is a constant of the compiler, which has no method `to`.
    """
    return index.to(tl.uint32, bitcast=True) < tl.cast(size, tl.uint32)


@triton.jit
def halo_rows(first_y, height, QUERY_ROWS: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr, EVERY: tl.constexpr):
    """Halo rows to visit, first and end: those of the image, unless EVERY; one round where ROWS hold them all."""
    RADIUS: tl.constexpr = K // 2
    HALO: tl.constexpr = QUERY_ROWS + K - 1
    if HALO <= ROWS:
        return 0, 1
    if EVERY:
        return 0, HALO
    return tl.maximum(0, RADIUS - first_y), tl.minimum(HALO, height + RADIUS - first_y)


@triton.jit
def forward(
    q_map, k_map, v_map, rel_row, rel_col, y_map, log2_sum, height, width, heads,
    image_stride, pixel_stride, y_image_stride, y_pixel_stride,
    K: tl.constexpr, WIDTH: tl.constexpr, POSITION: tl.constexpr, ZERO_BORDER: tl.constexpr,
    PRECISION: tl.constexpr, CHANNELS: tl.constexpr, WINDOW: tl.constexpr, QUERY_ROWS: tl.constexpr,
    QUERY_COLUMNS: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """y, and log2_sum [B, heads, H, W]. A program goes down BLOCKS blocks.

    Grid: (programs of an image * heads, images).
    """
    RADIUS: tl.constexpr = K // 2
    QUERIES: tl.constexpr = QUERY_ROWS * QUERY_COLUMNS
    ONCE: tl.constexpr = QUERY_ROWS + K - 1 <= ROWS
    head = tl.program_id(0) % heads
    program = tl.program_id(0) // heads
    image = tl.program_id(1).to(tl.int64)
    across = tl.cdiv(width, QUERY_COLUMNS)
    first_x = program % across * QUERY_COLUMNS
    query = tl.arange(0, QUERIES)
    query_row, query_column = query // QUERY_COLUMNS, query % QUERY_COLUMNS
    query_x = first_x + query_column
    channel = tl.arange(0, CHANNELS)[None, :]
    at = image * image_stride + head * WIDTH
    q_map, k_map, v_map = q_map + at, k_map + at, v_map + at
    y_map += image * y_image_stride + head * WIDTH
    log2_sum += (image * heads + head) * height * width

    halo_column = tl.arange(0, COLUMNS)
    across_window = halo_column[None, :] - query_column[:, None]
    column_inside = ZERO_BORDER | within(first_x - RADIUS + halo_column, width)
    slot = tl.arange(0, ROWS * COLUMNS)
    slot_row, slot_column = slot // COLUMNS, slot % COLUMNS
    slot_column_inside = within(first_x - RADIUS + slot_column, width)
    slot_offsets = (slot_row * width + slot_column)[:, None] * pixel_stride + channel
    if POSITION:
        rows, columns = position_table(rel_row, rel_col, head, K, WIDTH, CHANNELS, WINDOW)

    first_block = program // across * BLOCKS
    for block in range(first_block, tl.minimum(first_block + BLOCKS, tl.cdiv(height, QUERY_ROWS))):
        first_y = block * QUERY_ROWS
        query_y = first_y + query_row
        query_inside = (query_y < height) & (query_x < width)
        query_pixel = query_y * width + query_x
        own = query_inside[:, None] & (channel < WIDTH)
        q = tl.load(q_map + (query_pixel[:, None] * pixel_stride + channel), mask=own, other=0.0)
        row_terms, column_terms = 0.0, 0.0
        if POSITION:
            row_terms = tl.dot(q, rows, input_precision=PRECISION)
            column_terms = tl.dot(q, columns, input_precision=PRECISION)
        column_start = start_of_logits(column_terms, across_window, column_inside[None, :], K, WINDOW, POSITION)
        peak = tl.full([QUERIES], LOWEST, tl.float32)
        total = tl.zeros([QUERIES], tl.float32)
        y = tl.zeros([QUERIES, CHANNELS], tl.float32)
        begin, end = halo_rows(first_y, height, QUERY_ROWS, K, ROWS, ZERO_BORDER)
        for first in range(begin, end, ROWS):
            halo_row = first + tl.arange(0, ROWS)
            row_inside = ZERO_BORDER | within(first_y - RADIUS + halo_row, height)
            down_window = halo_row[None, :] - query_row[:, None]
            row_start = start_of_logits(row_terms, down_window, row_inside[None, :], K, WINDOW, POSITION)
            slot_y = first_y - RADIUS + first + slot_row
            there = (within(slot_y, height) & slot_column_inside)[:, None] & (channel < WIDTH)
            corner = ((first_y - RADIUS + first) * width + first_x - RADIUS) * pixel_stride
            k = tl.load(k_map + corner + slot_offsets, mask=there, other=0.0)
            v = tl.load(v_map + corner + slot_offsets, mask=there, other=0.0)
            start = tl.reshape(row_start[:, :, None] + column_start[:, None, :], [QUERIES, ROWS * COLUMNS])
            logits = tl.dot(q, tl.trans(k), start, input_precision=PRECISION)
            if ONCE:
                peak = tl.max(logits, 1)
            else:
                new_peak = tl.maximum(peak, tl.max(logits, 1))
                rescale = tl.exp2((peak - new_peak) * LOG2_E)
                total = total * rescale
                y = y * rescale[:, None]
                peak = new_peak
            weights = tl.exp2(logits * LOG2_E - (peak * LOG2_E)[:, None]).to(v.dtype)
            # The sum of the weights is a product too: tensor cores have the time, the adders do not.
            ones = tl.full([ROWS * COLUMNS, SUMS], 1.0, v.dtype)
            total += tl.max(tl.dot(weights, ones, input_precision=PRECISION), 1)
            y = tl.dot(weights, v, y, input_precision=PRECISION)
        to = query_pixel[:, None] * y_pixel_stride + channel
        log2_total = tl.log2(total)
        tl.store(y_map + to, (y * tl.exp2(-log2_total)[:, None]).to(y_map.dtype.element_ty), mask=own)
        tl.store(log2_sum + query_pixel, peak * LOG2_E + log2_total, mask=query_inside)


@triton.jit
def backward_queries(
    q_map, k_map, v_map, rel_row, rel_col, y_map, dy_map, log2_sum, dq_map, delta_map, row_sums, column_sums,
    height, width, heads, image_stride, pixel_stride, y_image_stride, y_pixel_stride, dq_image_stride, dq_pixel_stride,
    K: tl.constexpr, WIDTH: tl.constexpr, POSITION: tl.constexpr, ZERO_BORDER: tl.constexpr,
    PRECISION: tl.constexpr, CHANNELS: tl.constexpr, WINDOW: tl.constexpr, QUERY_ROWS: tl.constexpr,
    QUERY_COLUMNS: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """dq, delta = dy.y [B, heads, H, W], and the program's share of the gradients of rel_row and rel_col.

    A program goes down BLOCKS blocks and adds up their shares, row_sums and column_sums [B, heads, programs, CHANNELS,
    WINDOW]. Grid: (programs of an image * heads, images).
    """
    RADIUS: tl.constexpr = K // 2
    QUERIES: tl.constexpr = QUERY_ROWS * QUERY_COLUMNS
    head = tl.program_id(0) % heads
    program = tl.program_id(0) // heads
    programs = tl.num_programs(0) // heads
    image = tl.program_id(1).to(tl.int64)
    across = tl.cdiv(width, QUERY_COLUMNS)
    first_x = program % across * QUERY_COLUMNS
    query = tl.arange(0, QUERIES)
    query_row, query_column = query // QUERY_COLUMNS, query % QUERY_COLUMNS
    query_x = first_x + query_column
    channel = tl.arange(0, CHANNELS)[None, :]
    at = image * image_stride + head * WIDTH
    q_map, k_map, v_map = q_map + at, k_map + at, v_map + at
    y_map += image * y_image_stride + head * WIDTH
    dy_map += image * y_image_stride + head * WIDTH
    dq_map += image * dq_image_stride + head * WIDTH
    plane = (image * heads + head) * height * width
    log2_sum += plane
    delta_map += plane

    halo_column = tl.arange(0, COLUMNS)
    across_window = halo_column[None, :] - query_column[:, None]
    column_inside = ZERO_BORDER | within(first_x - RADIUS + halo_column, width)
    slot = tl.arange(0, ROWS * COLUMNS)
    slot_row, slot_column = slot // COLUMNS, slot % COLUMNS
    slot_column_inside = within(first_x - RADIUS + slot_column, width)
    slot_offsets = (slot_row * width + slot_column)[:, None] * pixel_stride + channel
    step = tl.arange(0, WINDOW)[None, :]
    if POSITION:
        rows, columns = position_table(rel_row, rel_col, head, K, WIDTH, CHANNELS, WINDOW)
        row_share = tl.zeros([CHANNELS, WINDOW], tl.float32)
        column_share = tl.zeros([CHANNELS, WINDOW], tl.float32)

    first_block = program // across * BLOCKS
    for block in range(first_block, tl.minimum(first_block + BLOCKS, tl.cdiv(height, QUERY_ROWS))):
        first_y = block * QUERY_ROWS
        query_y = first_y + query_row
        query_inside = (query_y < height) & (query_x < width)
        query_pixel = query_y * width + query_x
        own = query_inside[:, None] & (channel < WIDTH)
        q = tl.load(q_map + (query_pixel[:, None] * pixel_stride + channel), mask=own, other=0.0)
        own_y = query_pixel[:, None] * y_pixel_stride + channel
        dy = tl.load(dy_map + own_y, mask=own, other=0.0)
        y = tl.load(y_map + own_y, mask=own, other=0.0)
        delta = tl.sum(dy.to(tl.float32) * y.to(tl.float32), 1)
        tl.store(delta_map + query_pixel, delta, mask=query_inside)
        denominator = tl.load(log2_sum + query_pixel, mask=query_inside, other=float("inf"))

        row_terms, column_terms = 0.0, 0.0
        if POSITION:
            row_terms = tl.dot(q, rows, input_precision=PRECISION)
            column_terms = tl.dot(q, columns, input_precision=PRECISION)
        column_start = start_of_logits(column_terms, across_window, column_inside[None, :], K, WINDOW, POSITION)
        dq = tl.zeros([QUERIES, CHANNELS], tl.float32)
        by_row = tl.zeros([QUERIES, WINDOW], tl.float32)
        by_column = tl.zeros([QUERIES, COLUMNS], tl.float32)
        begin, end = halo_rows(first_y, height, QUERY_ROWS, K, ROWS, ZERO_BORDER)
        for first in range(begin, end, ROWS):
            halo_row = first + tl.arange(0, ROWS)
            row_inside = ZERO_BORDER | within(first_y - RADIUS + halo_row, height)
            down_window = halo_row[None, :] - query_row[:, None]
            row_start = start_of_logits(row_terms, down_window, row_inside[None, :], K, WINDOW, POSITION)
            slot_y = first_y - RADIUS + first + slot_row
            there = (within(slot_y, height) & slot_column_inside)[:, None] & (channel < WIDTH)
            corner = ((first_y - RADIUS + first) * width + first_x - RADIUS) * pixel_stride
            k = tl.load(k_map + corner + slot_offsets, mask=there, other=0.0)
            v = tl.load(v_map + corner + slot_offsets, mask=there, other=0.0)
            start = tl.reshape(row_start[:, :, None] + column_start[:, None, :], [QUERIES, ROWS * COLUMNS])
            logits = tl.dot(q, tl.trans(k), start, input_precision=PRECISION)
            weights = tl.exp2(logits * LOG2_E - denominator[:, None])
            ds = weights * (tl.dot(dy, tl.trans(v), input_precision=PRECISION) - delta[:, None])
            dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
            if POSITION:
                by_halo = tl.reshape(ds, [QUERIES, ROWS, COLUMNS])
                row = step + query_row[:, None] - first
                moved = tl.gather(tl.sum(by_halo, 2), tl.minimum(tl.maximum(row, 0), ROWS - 1), axis=1)
                by_row += tl.where((row >= 0) & (row < ROWS) & (step < K), moved, 0.0)
                by_column += tl.sum(by_halo, 1)
        if POSITION:
            column = tl.minimum(step + query_column[:, None], COLUMNS - 1)
            by_offset = tl.where(step < K, tl.gather(by_column, column, axis=1), 0.0)
            row_weights, column_weights = by_row.to(q.dtype), by_offset.to(q.dtype)
            dq = tl.dot(row_weights, tl.trans(rows), dq, input_precision=PRECISION)
            dq = tl.dot(column_weights, tl.trans(columns), dq, input_precision=PRECISION)
            row_share = tl.dot(tl.trans(q), row_weights, row_share, input_precision=PRECISION)
            column_share = tl.dot(tl.trans(q), column_weights, column_share, input_precision=PRECISION)
        to = query_pixel[:, None] * dq_pixel_stride + channel
        tl.store(dq_map + to, dq.to(dq_map.dtype.element_ty), mask=own)

    if POSITION:
        to = ((image * heads + head) * programs + program) * (CHANNELS * WINDOW)
        entry = to + tl.arange(0, CHANNELS)[:, None] * WINDOW + step
        tl.store(row_sums + entry, row_share)
        tl.store(column_sums + entry, column_share)


@triton.jit
def backward_keys(
    q_map, k_map, v_map, rel_row, rel_col, dy_map, log2_sum, delta_map, dk_map, dv_map, height, width, heads,
    image_stride, pixel_stride, y_image_stride, y_pixel_stride, dk_image_stride, dk_pixel_stride,
    K: tl.constexpr, WIDTH: tl.constexpr, POSITION: tl.constexpr, ZERO_BORDER: tl.constexpr,
    PRECISION: tl.constexpr, CHANNELS: tl.constexpr, WINDOW: tl.constexpr, QUERY_ROWS: tl.constexpr,
    QUERY_COLUMNS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """dk and dv. A program owns a block of keys and visits, one row at a time, the queries whose window holds them.

    Grid: (blocks of an image * heads, images).
    """
    RADIUS: tl.constexpr = K // 2
    KEYS: tl.constexpr = QUERY_ROWS * QUERY_COLUMNS
    HALF: tl.constexpr = WIDTH // 2
    head = tl.program_id(0) % heads
    block = tl.program_id(0) // heads
    image = tl.program_id(1).to(tl.int64)
    across = tl.cdiv(width, QUERY_COLUMNS)
    first_y, first_x = block // across * QUERY_ROWS, block % across * QUERY_COLUMNS
    key = tl.arange(0, KEYS)
    key_row, key_column = key // QUERY_COLUMNS, key % QUERY_COLUMNS
    key_y, key_x = first_y + key_row, first_x + key_column
    key_pixel = (key_y * width + key_x)[:, None]
    channel = tl.arange(0, CHANNELS)[None, :]
    own = ((key_y < height) & (key_x < width))[:, None] & (channel < WIDTH)
    at = image * image_stride + head * WIDTH
    q_map, k_map, v_map = q_map + at, k_map + at, v_map + at
    dy_map += image * y_image_stride + head * WIDTH
    plane = (image * heads + head) * height * width
    log2_sum += plane
    delta_map += plane
    k = tl.load(k_map + (key_pixel * pixel_stride + channel), mask=own, other=0.0)
    v = tl.load(v_map + (key_pixel * pixel_stride + channel), mask=own, other=0.0)

    halo_column = tl.arange(0, COLUMNS)
    query_x = first_x - RADIUS + halo_column
    column_inside = within(query_x, width)
    across_window = key_column[:, None] - halo_column[None, :] + 2 * RADIUS
    in_columns = (across_window >= 0) & (across_window < K)
    across_window = tl.minimum(tl.maximum(across_window, 0), WINDOW - 1)
    if POSITION:
        _, columns = position_table(rel_row, rel_col, head, K, WIDTH, CHANNELS, WINDOW)
        columns = tl.trans(columns)
        rel_row += head * HALF * K
    dk = tl.zeros([KEYS, CHANNELS], tl.float32)
    dv = tl.zeros([KEYS, CHANNELS], tl.float32)
    begin, end = halo_rows(first_y, height, QUERY_ROWS, K, 1, False)
    for halo_row in range(begin, end):
        query_pixel = (first_y - RADIUS + halo_row) * width + query_x
        there = column_inside[:, None] & (channel < WIDTH)
        q = tl.load(q_map + (query_pixel[:, None] * pixel_stride + channel), mask=there, other=0.0)
        dy = tl.load(dy_map + (query_pixel[:, None] * y_pixel_stride + channel), mask=there, other=0.0)
        denominator = tl.load(log2_sum + query_pixel, mask=column_inside, other=float("inf"))
        delta = tl.load(delta_map + query_pixel, mask=column_inside, other=0.0)
        down_window = key_row - halo_row + 2 * RADIUS
        in_rows = ((down_window >= 0) & (down_window < K))[:, None]
        logits = tl.dot(k, tl.trans(q), input_precision=PRECISION)
        if POSITION:
            row = tl.load(rel_row + channel * K + down_window[:, None], mask=in_rows & (channel < HALF), other=0.0)
            logits = tl.dot(row, tl.trans(q), logits, input_precision=PRECISION)
            column_terms = tl.dot(columns, tl.trans(q), input_precision=PRECISION)
            logits += tl.gather(column_terms, across_window, axis=0)
        weights = tl.where(in_rows & in_columns, tl.exp2(logits * LOG2_E - denominator[None, :]), 0.0)
        ds = weights * (tl.dot(v, tl.trans(dy), input_precision=PRECISION) - delta[None, :])
        dv = tl.dot(weights.to(dy.dtype), dy, dv, input_precision=PRECISION)
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)

    to = image * dk_image_stride + head * WIDTH + key_pixel * dk_pixel_stride + channel
    tl.store(dk_map + to, dk.to(dk_map.dtype.element_ty), mask=own)
    tl.store(dv_map + to, dv.to(dv_map.dtype.element_ty), mask=own)
