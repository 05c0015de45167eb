"""What kernels do that begin before the one in front of them on the stream has ended."""

from __future__ import annotations

import triton
import triton.language as tl

#: Bytes of a page of a GPU's memory, and how many of them at most are looked at in one storage of a sequence.
MEMORY_PAGE = 1 << 21
MOST_PAGES = 128


@triton.jit
def touch(held, start, length, DIM: tl.constexpr, MEMORY_PAGE: tl.constexpr, MOST_PAGES: tl.constexpr):
    """Ask for an entry of each page of memory that the `length` rows of `held (…, DIM)` from `start` on lie in.

    Where memory is read all over, finding out where its pages are takes longer than reading. What is read is dropped,
    and nobody waits for it.
    """
    rows: tl.constexpr = MEMORY_PAGE // (DIM * held.dtype.element_ty.primitive_bitwidth // 8)
    row = tl.minimum(tl.arange(0, MOST_PAGES) * rows, tl.maximum(length - 1, 0))
    address = (held + (start + row) * DIM).to(tl.int64)
    tl.inline_asm_elementwise(
        "{ .reg .b16 dropped; ld.volatile.global.b16 dropped, [$1]; mov.b32 $0, 0; }",
        "=r,l",
        [address],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )
