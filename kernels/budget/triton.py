"""What bisections on a device share: the range of `naive.bisect_share`, and how an answer is read from many.

How many answers a round asks for, and who follows the bisection through them, is up to the kernels that count: one
program keeps all in its registers (`index.top_p_blocks`), or many programs each add up a part of the counts and every
one of them follows the answers of the last launch (`index.vertical_slash`). One loop for both would have to give up
either.
"""

from __future__ import annotations

import triton
import triton.language as tl

from . import naive

CLOSE_ENOUGH = tl.constexpr(naive.CLOSE_ENOUGH)
LOWEST, HIGHEST = tl.constexpr(naive.LOWEST), tl.constexpr(naive.HIGHEST)
HALVINGS = tl.constexpr(naive.HALVINGS)


@triton.jit
def pick(values, place, index):
    """The one of `values` whose place is `index`."""
    return tl.sum(tl.where(place == index, values, 0.0), 0)
