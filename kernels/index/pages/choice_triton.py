"""The best pages of a row of scores in Triton.

Nothing is sorted: the smallest score that is taken is found by counting the scores that reach some values.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _ordered(bits):
    """Integers in the order of the fp32 numbers with these bits; its own inverse."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _narrowed(low, high, reached, above, read, value, count):
    """The range of the search, and how many scores reach its ends, once it is known that `count` reach a value."""
    enough = count >= read
    return (
        tl.where(enough, value, low),
        tl.where(enough, high, value),
        tl.where(enough, count, reached),
        tl.where(enough, above, count),
    )


@triton.jit
def _threshold(score, low, high, a, b, reached, read, TURNS: tl.constexpr):
    """The smallest of the `read` largest scores, or a value that just as many scores reach; and how many reach it.

    Args:
        score: NaN where there is none.
        low, high: the smallest and the largest score; `reached`: the number of scores, at least `read`.
        a, b: where to look first, if they lie in this order between these two.
    """
    third = 0.3333333
    if (low < a) & (a < b) & (b < high):
        pass
    else:
        a = low * (1.0 - third) + high * third
        b = low * third + high * (1.0 - third)
    # Then ranges of values: few operations on single numbers, which all threads wait for.
    above = 1  # scores that reach `high`
    turn = 0
    while (turn < TURNS) & (reached > read) & (low < a) & (a < b) & (b < high):
        # Two counts of 16 bits in one sum: most of a turn goes by putting the program's warps together.
        both = tl.sum((score >= a).to(tl.int32) + ((score >= b).to(tl.int32) << 16))
        at_a, at_b = both & 0xFFFF, (both >> 16) & 0xFFFF
        between = reached - above
        low, high, reached, above = _narrowed(low, high, reached, above, read, a, at_a)
        if at_a >= read:
            low, high, reached, above = _narrowed(low, high, reached, above, read, b, at_b)
        # Where a turn has halved what is between, scores spread evenly enough that their number says where to look,
        # give or take half of its spread; otherwise thirds, which no spread of scores makes slow.
        left = reached - above
        root = tl.rsqrt(tl.maximum(left, 1).to(tl.float32))
        single = root * root
        at = (reached - read).to(tl.float32) * single
        even = 2 * left <= between
        lower = tl.where(even, tl.maximum(at - 0.25 * root, 0.3 * single), third)
        upper = tl.where(even, tl.minimum(at + 0.25 * root, 1.0 - 0.3 * single), 1.0 - third)
        a = low * (1.0 - lower) + high * lower
        b = low * (1.0 - upper) + high * upper
        turn += 1
    # Halves of the range of bit patterns: 32 turns at most, whatever the scores are.
    first, last = _ordered(low.to(tl.int32, bitcast=True)), _ordered(high.to(tl.int32, bitcast=True))
    while (reached > read) & (first < last):
        # first < middle <= last, and their difference may not be an int32.
        middle = (first & last) + ((first ^ last) >> 1) + ((first ^ last) & 1)
        count = tl.sum((score >= _ordered(middle).to(tl.float32, bitcast=True)).to(tl.int32))
        if count >= read:
            first = middle
            reached = count
        else:
            last = middle - 1
    return _ordered(first).to(tl.float32, bitcast=True), reached


@triton.jit
def row_of_scores(scores, place, columns, PADDED: tl.constexpr):
    """All scores of row `place`, in groups of 32, of which each can be one number whose bits say which are meant."""
    ids = tl.arange(0, PADDED // 32)[:, None] * 32 + tl.arange(0, 32)[None, :]
    # It need not be known yet how many are looked at: one load does not wait for the other.
    return tl.load(scores + place * columns + ids, mask=ids < columns, other=0.0)


@triton.jit
def choose(
    score,
    pages,
    place,
    width,
    before,
    read,
    low,
    high,
    a,
    b,
    KNOWN: tl.constexpr,
    PADDED: tl.constexpr,
    VALUE_TURNS: tl.constexpr,
):
    """Write the best `read` of the first `before` pages, by their scores, to list `place`, and `before`.

    Where it is known that scores are numbers, from `low` to `high`, the search begins at `a` and `b`.
    """
    group = tl.arange(0, PADDED // 32)
    bit = tl.arange(0, 32)[None, :]
    ids = group[:, None] * 32 + bit
    if not KNOWN:
        score = tl.where(score == score, score, float("-inf"))
    # What is no score is NaN from here on, which reaches no value, and which minimum and maximum pass over.
    score = tl.where(ids < before, score, float("nan"))
    if not KNOWN:
        low, high = tl.min(score), tl.max(score)
        a, b = low, high
    least, reached = _threshold(score, low, high, a, b, before, tl.maximum(read, 1), VALUE_TURNS)
    chosen = _bits(score >= least, bit)
    if reached > read:
        # Ties at the smallest: as many as there is room for, from the right.
        equal = _bits(score == least, bit)
        number = _ones(equal)
        excess = tl.minimum(tl.maximum(reached - read - (tl.cumsum(number, 0) - number), 0), number)
        left = equal
        for turn in range(tl.max(excess, 0)):
            left = tl.where(turn < excess, left & (left - 1), left)
        chosen = chosen & ~(equal ^ left)
    chosen = tl.where(read > 0, chosen, 0)
    number = _ones(chosen)
    target = pages + place * width
    slot = tl.cumsum(number, 0) - number
    for turn in range(tl.max(number, 0)):
        lowest = chosen & -chosen
        # Its place among the bits: the exponent of the number that it is.
        at = (lowest.to(tl.uint32, bitcast=True).to(tl.float32).to(tl.int32, bitcast=True) >> 23) - 127
        tl.store(target + slot + turn, group * 32 + at, mask=(turn < number) & (slot + turn < width))
        chosen = chosen ^ lowest
    tl.store(target + read, before, mask=read < width)


@triton.jit
def _bits(which, bit):
    """Of each row of 32, one number."""
    return tl.sum(which.to(tl.int32) << bit, 1)


@triton.jit
def _ones(x):
    """How many bits of an int32 are set."""
    x -= (x >> 1) & 0x55555555
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    return (x * 0x01010101 >> 24) & 0xFF
