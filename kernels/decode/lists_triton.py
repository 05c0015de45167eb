"""What the Triton kernels of decode read: keys of a list of pages or of a window, whatever stands in the list."""

from __future__ import annotations

import triton
import triton.language as tl

#: Pages of a list that are checked at a time, and bits of `FAULTS`.
CHECKED = 512
COUNT, NEGATIVE, FUTURE, ORDER = (tl.constexpr(1 << bit) for bit in range(4))


@triton.jit
def reach(
    length,
    pages,
    counts,
    known,
    sequence,
    tile,
    group,
    steps,
    rows,
    width,
    window,
    LISTS_ARE_OWN: tl.constexpr,
    PAGE: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """What a tile reads: position of its first key, number of keys, the place of its list of pages and how many that
    has, and one past the last key that its newest token may see. Whatever a list says, it is read within its width."""
    first_step = tile * rows // group
    last_step = (tl.minimum(tile * rows + rows, steps * group) - 1) // group
    visible = length - steps + 1 + last_step
    # Where nobody is, nothing but the length is looked at.
    held = length > 0
    count = 0
    if PAGE > 0:
        own = 0
        lists = 1
        if LISTS_ARE_OWN:
            own = tile * rows % group
            lists = group
        place = (sequence * lists + own).to(tl.int64) * steps + first_step
        if OVERLAP:  # known without waiting for them
            count = known
            last = (visible - 1) // PAGE
            listed = tl.minimum(count, width)
        else:
            count = tl.load(counts + place, mask=held, other=1)
            listed = tl.minimum(tl.maximum(count, 1), width)
            last = tl.load(pages + place * width + listed - 1, mask=held, other=0)
            last = tl.minimum(tl.maximum(last, 0), tl.maximum(visible - 1, 0) // PAGE)
        first = 0
        number = (listed - 1) * PAGE + tl.minimum(PAGE, visible - last * PAGE)
    else:
        place = sequence.to(tl.int64)
        first = tl.maximum(length - steps + 1 + first_step - window, 0)
        number = visible - first
    number = tl.where(held, tl.maximum(number, 0), 0)
    return first, number, place, count, visible


@triton.jit
def _either(a, b):
    return a | b


@triton.jit
def faults(listed, count, width, visible, PAGE: tl.constexpr, CHECKED: tl.constexpr):
    """What is wrong with a list of pages, in bits."""
    last = (visible - 1) // PAGE  # the page that the token is in
    wrong = tl.zeros((CHECKED,), tl.int32)
    number = tl.minimum(count, width)
    start = 0
    while start < number:
        slot = start + tl.arange(0, CHECKED)
        valid = slot < number
        page = tl.load(listed + slot, mask=valid, other=0)
        before = tl.load(listed + slot - 1, mask=valid & (slot > 0), other=0)
        here = tl.where(page < 0, NEGATIVE, 0) | tl.where(page > last, FUTURE, 0)
        here |= tl.where((slot > 0) & (before >= page), ORDER, 0)
        wrong |= tl.where(valid, here, 0)
        start += CHECKED
    return tl.reduce(wrong, 0, _either) | tl.where((count < 1) | (count > width), COUNT, 0)
