"""The CUDA kernels of BlockSparseConv and BlockSparseGemm, in Triton. build.py compiles them ahead of time.

A block-sparse convolution is an implicit matrix product over the kept blocks only. One program computes BM output
channels (rows) of BN output pixels, for all kept tiles of its row and all taps of the kernel:

    acc[m, p] = sum over tiles t of the row, taps r, k < BK:  w[t, r, m, k] * x[pixel(p, r), BK * channel_tile[t] + k]

Its input is channels-last with the channels in the order and padding of the packed weight, so that a tile's channels
are one aligned run: asynchronous 16-byte loads, whatever the permutation, the padding and the number of channels were.
`channels_last` brings an input of any layout there; it applies input_perm for nothing while it transposes. The output
permutation is applied by the store.

Where the pixels are too few to fill the GPU (batch 1, small maps), SPLIT divides a row's work over several programs,
whose partial sums `sum_splits` adds up in a fixed order: the result does not depend on timing.

Neighboring threads should touch neighboring values. Where the compiler cannot know which these are (behind a
permutation or a division by a map's size) it lets neighboring threads go along the first dimension of a tile, so that
is the one that is contiguous in memory: channels where they are last, else pixels. build.py records it.

The parameters are the contract with conv.cc, which fills them in: build.py checks their order and types against it.
"""

import triton
import triton.language as tl


@triton.jit
def block_sparse_conv(
    x_ptr,  # [N, D, H, W, C]
    w_ptr,  # [tiles, taps, BM * parts, BK]
    bias_ptr,  # float32 [rows * BM * parts], reordered
    y_ptr,  # [N, OC, OD, OH, OW] or [N, OD, OH, OW, OC]; SPLIT: float32 [splits, rows * BM, P]
    addend_ptr,  # like y; with LAST only
    tile_begin_ptr,  # int32 [packed rows + 1]: the tiles of each packed row
    channel_tile_ptr,  # int32 [tiles + 1]: each tile reads channels BK * this and up of x; one spare entry
    row_order_ptr,  # int32 [packed rows]: heaviest first
    output_channel_ptr,  # int32 [packed rows * BM * parts]: the channel of y, -1 for padding
    C,  # channels of x, a multiple of BK
    D,
    H,
    W,
    OC,
    OD,
    OH,
    OW,
    P,  # N * OD * OH * OW
    stride_d,
    stride_h,
    stride_w,
    pad_d,
    pad_h,
    pad_w,
    dilation_d,
    dilation_h,
    dilation_w,
    taps,  # kernel_d * kernel_h * kernel_w; these three only for TAPS = 0
    kernel_h,
    kernel_w,
    w_tap,  # values of w for one tile and tap: BM * parts * BK
    parts,  # programs that share a packed row, each BM of its output channels
    splits,
    has_addend,  # whether addend is added to the sums before they are limited
    low,  # float32: the output is limited to [low, high]
    high,
    TAPS: tl.constexpr,  # 1: one tap; 9: 3 x 3 in (H, W); 0: any kernel
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    SWAP: tl.constexpr,  # pixels are the M side of the matrix instruction: for BM < 64, which wgmma does not take as M
    LAST: tl.constexpr,  # the output is channels-last
    SPLIT: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Output tile (pixels program_id(0), channels program_id(1)), part program_id(2) of the sum."""
    rank = tl.program_id(1)
    row = tl.load(row_order_ptr + rank // parts)
    part = rank % parts
    p = tl.program_id(0) * BN + tl.arange(0, BN)
    p_valid = p < P
    plane = OH * OW
    volume = OD * plane
    n = p // volume
    q = p - n * volume  # output position inside the image
    od = q // plane
    oh = (q - od * plane) // OW
    ow = q - od * plane - oh * OW
    id0 = od * stride_d - pad_d
    ih0 = oh * stride_h - pad_h
    iw0 = ow * stride_w - pad_w
    image = n * (D * H * W * C)
    m = tl.arange(0, BM)
    k = tl.arange(0, BK)

    if TAPS == 0:
        tap_count = taps
        columns = kernel_w
        plane_taps = kernel_h * kernel_w
    else:
        tap_count = TAPS
        columns = 3
        plane_taps = TAPS
    begin = tl.load(tile_begin_ptr + row)
    count = (tl.load(tile_begin_ptr + row + 1) - begin) * tap_count
    if SPLIT:
        split = tl.program_id(2)
        start = count * split // splits
        stop = count * (split + 1) // splits
    else:
        start = 0
        stop = count
    # The one offset that needs 64 bits: conv.cc cuts a batch so that those into x and y fit 32.
    w_row = w_ptr + begin.to(tl.int64) * tap_count * w_tap + part * (BM * BK)
    if SWAP:  # noqa: SIM108  (as in the other places)
        acc = tl.zeros((BN, BM), dtype=tl.float32)
    else:
        acc = tl.zeros((BM, BN), dtype=tl.float32)
    if LAST and has_addend != 0:
        # The sum starts with the addend: at the end, with all sums beside it, it would not fit the registers. (Nor does
        # it here where y is NCHW, whose addresses are more complex: there the addend is left to sum_splits.)
        channel_in = tl.load(output_channel_ptr + row * (BM * parts) + part * BM + m)
        added = tl.load(
            addend_ptr + ((p * OC)[None, :] + channel_in[:, None]),
            mask=p_valid[None, :] & (channel_in >= 0)[:, None],
            other=0.0,
        )
        if SWAP:
            added = tl.trans(added)
        acc += added.to(tl.float32)

    # The tile of the next step is loaded one step ahead: a load whose address depends on another load of the same
    # step would cost the pipeline a stage. The last step reads the spare entry.
    following = tl.load(channel_tile_ptr + begin + start // tap_count)
    for i in tl.range(start, stop, num_stages=STAGES):
        channel = following * BK
        following = tl.load(channel_tile_ptr + begin + (i + 1) // tap_count)
        if TAPS == 1:
            pz, py, px = id0, ih0, iw0
        else:
            tap = i % tap_count
            if TAPS == 0:
                kd = tap // plane_taps
                pz = id0 + kd * dilation_d
                tap = tap - kd * plane_taps
            else:
                pz = id0
            kh = tap // columns
            py = ih0 + kh * dilation_h
            px = iw0 + (tap - kh * columns) * dilation_w
        valid = p_valid & (py >= 0) & (py < H) & (px >= 0) & (px < W)
        if TAPS != 9:
            valid = valid & (pz >= 0) & (pz < D)
            pixel = image + ((pz * H + py) * W + px) * C
        else:
            pixel = image + (py * W + px) * C
        wp = w_row + i * w_tap
        if SWAP:
            xt = tl.load(x_ptr + pixel[:, None] + (channel + k)[None, :], mask=valid[:, None], other=0.0)
            wt = tl.load(wp + m[None, :] * BK + k[:, None])
            acc = tl.dot(xt, wt, acc, input_precision=PRECISION)
        else:
            xt = tl.load(x_ptr + pixel[None, :] + (channel + k)[:, None], mask=valid[None, :], other=0.0)
            wt = tl.load(wp + m[:, None] * BK + k[None, :])
            acc = tl.dot(wt, xt, acc, input_precision=PRECISION)

    r = row * (BM * parts) + part * BM + m
    if SPLIT:
        if SWAP:
            acc = tl.trans(acc)
        rows = tl.num_programs(1) * BM
        slot = (split * rows + r) * P
        tl.store(y_ptr + slot[:, None] + p[None, :], acc, mask=p_valid[None, :])
    else:
        if SWAP == LAST:
            acc = tl.trans(acc)
        bias = tl.load(bias_ptr + r)
        channel_out = tl.load(output_channel_ptr + r)
        if LAST:
            acc += bias[:, None]
            yp = y_ptr + ((p * OC)[None, :] + channel_out[:, None])
            mask = p_valid[None, :] & (channel_out >= 0)[:, None]
        else:
            acc += bias[None, :]
            yp = y_ptr + ((n * OC * volume + q)[:, None] + (channel_out * volume)[None, :])
            mask = p_valid[:, None] & (channel_out >= 0)[None, :]
        acc = tl.maximum(acc, low, propagate_nan=tl.PropagateNan.ALL)
        acc = tl.minimum(acc, high, propagate_nan=tl.PropagateNan.ALL)
        tl.store(yp, acc.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def sum_splits(
    partial_ptr,  # float32 [splits, R, P]
    bias_ptr,  # float32 [R]
    y_ptr,  # [N, OC, volume], or with LAST [P, OC]
    addend_ptr,  # like y
    output_channel_ptr,  # int32 [R]
    R,  # rows, with their padding: a multiple of BR
    OC,
    volume,  # OD * OH * OW
    P,  # N * volume
    splits,
    has_addend,
    low,
    high,
    LAST: tl.constexpr,
    BR: tl.constexpr,
    BP: tl.constexpr,
):
    """The sum of the partial sums, with bias and activation, at its place in y."""
    p = tl.program_id(0) * BP + tl.arange(0, BP)
    r = tl.program_id(1) * BR + tl.arange(0, BR)
    p_valid = p < P
    channel = tl.load(output_channel_ptr + r)
    total = tl.zeros((BR, BP), dtype=tl.float32)
    source = partial_ptr + ((r * P)[:, None] + p[None, :])
    for _ in range(splits):
        total += tl.load(source, mask=p_valid[None, :], other=0.0)
        source += R * P
    total += tl.load(bias_ptr + r)[:, None]
    if LAST:
        place = (p * OC)[None, :] + channel[:, None]
        valid = p_valid[None, :] & (channel >= 0)[:, None]
    else:
        total = tl.trans(total)
        n = p // volume
        place = (n * OC * volume + (p - n * volume))[:, None] + (channel * volume)[None, :]
        valid = p_valid[:, None] & (channel >= 0)[None, :]
    if has_addend != 0:
        total += tl.load(addend_ptr + place, mask=valid, other=0.0).to(tl.float32)
    total = tl.maximum(total, low, propagate_nan=tl.PropagateNan.ALL)
    total = tl.minimum(total, high, propagate_nan=tl.PropagateNan.ALL)
    tl.store(y_ptr + place, total.to(y_ptr.dtype.element_ty), mask=valid)


@triton.jit
def channels_last(
    x_ptr,  # [N, C, volume], or with LAST [P, C]; values as integers of the same size
    y_ptr,  # [P, packed]
    channel_ptr,  # int32 [packed]: the channel of x, -1 for a zero
    C,
    volume,
    P,  # N * volume
    packed,  # a multiple of BC
    LAST: tl.constexpr,
    ROUND: tl.constexpr,  # float32 to the nearest TF32: the matrix instructions would cut the rest off
    BC: tl.constexpr,
    BP: tl.constexpr,
):
    """The input with its channels last, in the packed weight's order, with zeros where that has padding."""
    p = tl.program_id(0) * BP + tl.arange(0, BP)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    channel = tl.load(channel_ptr + c)
    p_valid = p < P
    if LAST:
        value = tl.load(
            x_ptr + ((p * C)[None, :] + channel[:, None]),
            mask=p_valid[None, :] & (channel >= 0)[:, None],
            other=0,
        )
        value = tl.trans(value)
    else:
        n = p // volume
        start = n * C * volume + (p - n * volume)
        value = tl.load(
            x_ptr + (start[:, None] + (channel * volume)[None, :]),
            mask=p_valid[:, None] & (channel >= 0)[None, :],
            other=0,
        )
    if ROUND:
        special = (value & 0x7F800000) == 0x7F800000  # infinity and NaN
        value = tl.where(special, value, (value + 0x1000) & -0x2000)
    tl.store(y_ptr + ((p * packed)[:, None] + c[None, :]), value, mask=p_valid[:, None])


@triton.jit
def max_pool(
    x_ptr,  # [N, H, W, C]
    y_ptr,  # [N, OH, OW, C]
    C,
    H,
    W,
    OH,
    OW,
    P,  # N * OH * OW
    kernel_h,
    kernel_w,
    stride_h,
    stride_w,
    pad_h,
    pad_w,
    BC: tl.constexpr,
    BP: tl.constexpr,
):
    """The largest value of each window, channels-last: neighboring threads take neighboring channels. NaN stays NaN."""
    p = tl.program_id(0) * BP + tl.arange(0, BP)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    p_valid = p < P
    plane = OH * OW
    n = p // plane
    oh = (p - n * plane) // OW
    ow = p - n * plane - oh * OW
    image = n * (H * W * C)
    c_valid = (c < C)[None, :]
    largest = tl.full((BP, BC), float("-inf"), tl.float32)
    for tap in range(kernel_h * kernel_w):
        ih = oh * stride_h - pad_h + tap // kernel_w
        iw = ow * stride_w - pad_w + tap % kernel_w
        valid = p_valid & (ih >= 0) & (ih < H) & (iw >= 0) & (iw < W)
        place = (image + (ih * W + iw) * C)[:, None] + c[None, :]
        value = tl.load(x_ptr + place, mask=valid[:, None] & c_valid, other=float("-inf")).to(tl.float32)
        largest = tl.maximum(largest, value, propagate_nan=tl.PropagateNan.ALL)
    place = (p * C)[:, None] + c[None, :]
    tl.store(y_ptr + place, largest.to(y_ptr.dtype.element_ty), mask=p_valid[:, None] & c_valid)
