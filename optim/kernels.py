"""Triton kernels: what eager torch does to a tensor in tens of passes, in one.

Imported on CUDA only, through `fused.py`, which has what the arguments mean. The operators that they equal are in
`adam.py`, `codec.py` and `codebook.py`, `rounding.py`, `lift.py`: the same tables, the same draws, sums in the order of
the hardware. Codes are equal or one apart, as a last bit of a moment may differ.

A tensor is seen as rows of `width` values and each row as blocks of SIZE, the last of them shorter; a program takes
TILES blocks.
"""

import triton
import triton.language as tl

FP32, BF16, INT8, INT4, FP8 = (tl.constexpr(i) for i in range(5))
"""How a moment is kept (CODEC)."""
NEAREST, STOCHASTIC, FRESH = (tl.constexpr(i) for i in range(3))
"""How a weight is written (WRITE): to the nearest, stochastically to bf16, or as a step from zero, without reading."""
LEAST = tl.constexpr(1e-37)
"""As `codec.TINY`."""


@triton.jit
def keyed_bits(index, seed, seed_high):
    """`rounding.keyed_bits` of uint32 indices."""
    bits = index * 0x9E3779B9 + seed
    bits = (bits ^ (bits >> 15)) * 0x85EBCA6B
    bits = ((bits ^ (bits >> 13)) + seed_high) * 0xC2B2AE35
    bits = (bits ^ (bits >> 16)) * 0x27D4EB2F
    return bits ^ (bits >> 15)


@triton.jit
def stochastic_bf16(wide, index, seed, seed_high):
    """`rounding.round_to_bf16_` of the values at these flat indices."""
    draws = keyed_bits(index.to(tl.uint32), seed.to(tl.uint32), seed_high.to(tl.uint32)) & 0xFFFF
    bits = (wide.to(tl.uint32, bitcast=True) + draws) & 0xFFFF0000
    return bits.to(tl.float32, bitcast=True).to(tl.bfloat16)


@triton.jit
def decoded(codes, scale, power, table, place, pair, numbers, mask, valid, odd, CODEC: tl.constexpr):
    """Values of a moment: of a tile (TILES, SIZE), of whose blocks `numbers` are the indices."""
    # one return: those of branches that are not taken would be compiled, and must agree
    if CODEC < INT8:
        found = tl.load(codes + place, mask, other=0.0).to(tl.float32)
    else:
        largest = tl.load(scale + numbers, valid, other=0.0)
        if CODEC == INT8:
            found = tl.load(table + tl.load(codes + place, mask, other=0).to(tl.int32))
        elif CODEC == INT4:
            both = tl.load(codes + pair, mask, other=0).to(tl.int32)
            found = tl.load(table + tl.where(odd, both & 15, both >> 4))
        else:
            row = (tl.load(power + numbers, valid, other=1.0) * 16).to(tl.int32) * 256
            found = tl.load(table + row[:, None] + tl.load(codes + place, mask, other=0).to(tl.int32))
        found *= largest[:, None]
    return found


@triton.jit
def e4m3(magnitude):
    """Bits of the nearest E4M3 of numbers in [0, 448], ties to even, as int32."""
    bits = magnitude.to(tl.int32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - ((127 - 7) << 3)
    small = (magnitude * 512.0 + 8388608.0).to(tl.int32, bitcast=True) & 0xFF  # rounds to a whole number
    return tl.where(magnitude < 0.015625, small, normal)


@triton.jit
def encode(
    values, codes, scale, power, cells, place, pair, numbers, mask, valid,
    CODEC: tl.constexpr, SIGNED: tl.constexpr, EXPANSION: tl.constexpr, TILES: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """Write a moment as its codec's `write` does. `place` are flat indices, `pair` those of bytes with two codes,
    `mask` which of them there are."""
    if CODEC == FP32:
        tl.store(codes + place, values, mask)
    elif CODEC == BF16:
        tl.store(codes + place, values.to(tl.bfloat16), mask)
    else:
        values = tl.where(mask, values, 0.0)
        largest = tl.max(tl.abs(values), 1)
        inverse = tl.div_rn(1.0, tl.maximum(largest, LEAST))
        tl.store(scale + numbers, largest, valid)
        if CODEC == FP8:
            magnitude = tl.abs(values)
            smallest = tl.minimum(tl.min(tl.where(magnitude > 0, magnitude, float("inf")), 1), largest)
            span = tl.log2(tl.maximum(largest, LEAST)) - tl.log2(tl.maximum(smallest, LEAST))
            k = tl.floor(16 * EXPANSION / tl.maximum(span, 1e-6)) / 16
            k = tl.minimum(tl.maximum(k, 0.0625), 64.0)
            tl.store(power + numbers, k, valid)
            unit = tl.exp2(tl.log2(magnitude * inverse[:, None]) * k[:, None]) * 448.0
            found = e4m3(tl.minimum(unit, 448.0))
            if SIGNED:
                found = found | ((values.to(tl.int32, bitcast=True) >> 24) & 0x80)
            tl.store(codes + place, found.to(tl.uint8), mask)
        else:
            bits = (values * inverse[:, None]).to(tl.int32, bitcast=True)
            found = tl.abs((tl.load(cells + ((bits >> 16) & 0xFFFF)) + bits) >> 16)
            if CODEC == INT8:
                tl.store(codes + place, found.to(tl.uint8), mask)
            else:
                first, second = tl.split(tl.reshape(found, (TILES, SIZE // 2, 2)))
                at, _ = tl.split(tl.reshape(pair, (TILES, SIZE // 2, 2)))
                there, _ = tl.split(tl.reshape(mask.to(tl.int32), (TILES, SIZE // 2, 2)))
                tl.store(codes + at, ((first << 4) | second).to(tl.uint8), there != 0)


@triton.jit(do_not_specialize=["first", "seed", "seed_high"])
def adamw(
    weight, grad, m, m_scale, m_power, v, v_scale, v_power, m_table, m_cells, v_table, v_cells,
    width, blocks, count, first, seed, seed_high,
    beta1, fresh1, beta2, fresh2, size, root, eps, decay, after,
    CODEC: tl.constexpr, WRITE: tl.constexpr, EXPANSION: tl.constexpr, TILES: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """One step of AdamW: W <- after (decay W - size m / (sqrt(v) / root + eps)), `fresh` being 1 - beta."""
    numbers = tl.program_id(0).to(tl.int64) * TILES + tl.arange(0, TILES)
    valid = numbers < count
    within = tl.arange(0, SIZE)
    column = (numbers % blocks)[:, None] * SIZE + within[None, :]
    mask = valid[:, None] & (column < width)
    place = (numbers // blocks)[:, None] * width + column
    pair = (numbers // blocks)[:, None] * ((width + 1) // 2) + column // 2  # rows begin with a byte of their own
    odd = (within % 2 == 1)[None, :]

    g = tl.load(grad + place, mask, other=0.0).to(tl.float32)
    mean = decoded(m, m_scale, m_power, m_table, place, pair, numbers, mask, valid, odd, CODEC)
    square = decoded(v, v_scale, v_power, v_table, place, pair, numbers, mask, valid, odd, CODEC)
    mean = beta1 * mean + fresh1 * g
    square = beta2 * square + fresh2 * g * g
    step = tl.div_rn(size * mean, tl.div_rn(tl.sqrt_rn(square), root) + eps)
    if WRITE == FRESH:
        tl.store(weight + place, (-after * step).to(weight.dtype.element_ty), mask)
    else:
        wide = after * (decay * tl.load(weight + place, mask, other=0.0).to(tl.float32) - step)
        if WRITE == STOCHASTIC:
            tl.store(weight + place, stochastic_bf16(wide, place + first, seed, seed_high), mask)
        else:
            tl.store(weight + place, wide.to(weight.dtype.element_ty), mask)
    encode(mean, m, m_scale, m_power, m_cells, place, pair, numbers, mask, valid, CODEC, True, EXPANSION, TILES, SIZE)
    encode(
        square, v, v_scale, v_power, v_cells, place, pair, numbers, mask, valid, CODEC, False, EXPANSION, TILES, SIZE
    )


@triton.jit(do_not_specialize=["first", "seed", "seed_high"])
def scaled_add(
    weight, grad, factor, width, count, first, seed, seed_high, beta,
    BY_ROW: tl.constexpr, BY_COLUMN: tl.constexpr, WRITE: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """W <- beta W + G s, with s for each row, each column or all."""
    first_place = tl.program_id(0).to(tl.int64) * SIZE
    place = first_place + tl.arange(0, SIZE)
    mask = place < count
    # Numbers of 64 bits are divided once a program, not once a value: no instruction of a GPU does that.
    first_row = first_place // width
    column = (first_place - first_row * width).to(tl.int32) + tl.arange(0, SIZE)
    if BY_ROW:
        s = tl.load(factor + first_row + column // width, mask, other=0.0)
    elif BY_COLUMN:
        s = tl.load(factor + column % width, mask, other=0.0)
    else:
        s = tl.load(factor)
    g = tl.load(grad + place, mask, other=0.0).to(tl.float32)
    wide = beta * tl.load(weight + place, mask, other=0.0).to(tl.float32) + g * s
    if WRITE == STOCHASTIC:
        tl.store(weight + place, stochastic_bf16(wide, place + first, seed, seed_high), mask)
    else:
        tl.store(weight + place, wide.to(weight.dtype.element_ty), mask)


@triton.jit(do_not_specialize=["first", "seed", "seed_high"])
def round_bf16(target, wide, count, first, seed, seed_high, SIZE: tl.constexpr):
    """Write fp32 values into bf16, stochastically."""
    place = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    mask = place < count
    values = tl.load(wide + place, mask, other=0.0)
    tl.store(target + place, stochastic_bf16(values, place + first, seed, seed_high), mask)
