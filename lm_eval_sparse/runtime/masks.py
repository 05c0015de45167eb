"""What a layer lets its queries see, read from the mask function that transformers hands over.

A window or a chunk may be longer than any prompt that is run on trial, and need not show in any argument of the
attention call. The function that says which keys a query sees is defined for every position, so it is asked about
positions far away.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass

import torch
from torch import Tensor

#: Keys that one far query is asked about beside those near an edge.
SAMPLED = 4096


@dataclass(frozen=True)
class Sight:
    """Which keys at or before its own position a query sees.

    Attributes:
        kind: `full`; `window`, the last `size` keys; `chunk`, those of its own chunk of `size` positions; `other`.
        size: tokens; 0 for `full` and `other`.
        plain: whether it is transformers' own causal mask function, which needs no mask to be made.
    """

    kind: str
    size: int = 0
    plain: bool = False

    def __str__(self) -> str:
        return {
            "full": "full causal attention",
            "window": f"sliding window of {self.size} tokens",
            "chunk": f"attention within chunks of {self.size} tokens",
        }.get(self.kind, "a mask that is neither causal nor a window")


FULL = Sight("full")
OTHER = Sight("other")

MaskFunction = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def sight_of(mask_function: MaskFunction, longest: int, device: torch.device, plain: bool) -> Sight:
    """What `mask_function(batch, head, query, key)` shows of positions below `longest`, for the first row of a batch.

    It is asked about single queries, the last possible one among them, and about keys up to just behind them.
    A function that cannot answer for positions that no input has (it looks something up there) is `OTHER`.
    """
    generator = torch.Generator().manual_seed(longest)
    some = torch.randint(1, max(2, longest), (6,), generator=generator).tolist()
    queries = sorted({q for q in (0, 1, 7, 63, longest // 3, longest // 2, longest - 2, longest - 1, *some) if q >= 0})
    lowest: dict[int, int] = {}
    for query in queries:
        first = _lowest(mask_function, query, device, generator)
        if first is None:
            return OTHER
        lowest[query] = first
    if not any(lowest.values()):
        return Sight("full", 0, plain)
    widths = {query - first + 1 for query, first in lowest.items() if first}
    if len(widths) == 1 and all(query + 1 <= min(widths) for query, first in lowest.items() if not first):
        return Sight("window", widths.pop())
    # The first query that does not see key 0 begins a chunk, and so does the lowest key that any query sees.
    size = _chunk(mask_function, lowest, device)
    if size and all(first == query // size * size for query, first in lowest.items()):
        return Sight("chunk", size)
    return OTHER


def structure(function: object) -> Hashable | None:
    """What two mask functions share that show the same: their code and the numbers in it; None where tensors decide."""
    if function is None or isinstance(function, int | float | str):
        return function if function is not None else ("nothing",)
    if isinstance(function, tuple):
        parts = tuple(structure(part) for part in function)
        return None if None in parts else parts
    code = getattr(function, "__code__", None)
    if code is None:
        return None
    held = (*(cell.cell_contents for cell in function.__closure__ or ()), function.__defaults__)
    parts = structure(held)
    return None if parts is None else (code, parts)


def _seen(mask_function: MaskFunction, query: int, keys: Tensor, device: torch.device) -> Tensor:
    """`(n,)` bool on the host: which of these keys `(n,)` the query at this position sees."""
    zero = torch.zeros((), dtype=torch.long, device=device)
    at = torch.full((), query, dtype=torch.long, device=device)
    return torch.as_tensor(mask_function(zero, zero, at, keys.to(device))).expand(keys.shape).bool().cpu()


def _lowest(mask_function: MaskFunction, query: int, device: torch.device, generator: torch.Generator) -> int | None:
    """The lowest key that a query sees, when it sees all from there to its own position and none behind; else None."""
    near = torch.arange(max(0, query - SAMPLED), query + 1)
    far = torch.randint(0, query + 1, (SAMPLED,), generator=generator)
    behind = query + 1 + torch.tensor([0, 1, 5, 64])
    keys = torch.cat([torch.cat([torch.arange(min(SAMPLED, query + 1)), far, near]).unique(), behind])
    try:
        seen = _seen(mask_function, query, keys, device)
        past, future = seen[: -len(behind)], seen[-len(behind) :]
        if bool(future.any()) or not bool(past.any()):
            return None
        place = int(past.int().argmax())
        if not bool(past[place:].all()):
            return None
        first = int(keys[place])
        if place:  # the edge lies behind the last key that is not seen
            gap = torch.arange(int(keys[place - 1]) + 1, first + 1)
            inside = _seen(mask_function, query, gap, device)
            edge = int(inside.int().argmax())
            if not bool(inside[edge:].all()):
                return None
            first = int(gap[edge])
        return first
    except Exception:  # whatever a function raises that cannot answer for these positions
        return None


def _chunk(mask_function: MaskFunction, lowest: dict[int, int], device: torch.device) -> int:
    """The size of chunks by which these lowest keys may come about, or 0.

    Every chunk begins at a multiple of its size: the smallest one that is known bounds it, and the queries around a
    begin are asked for the next one.
    """
    begin = max(lowest.values())
    query = next(query for query, first in lowest.items() if first == begin)
    low, high = query, query + 1  # the chunk of `query` ends somewhere behind it: look for where
    step = 1
    while True:
        high = query + step
        try:
            if not bool(_seen(mask_function, high, torch.tensor([begin]), device)[0]):
                break
        except Exception:  # as above
            return 0
        low, step = high, step * 2
        if step > 1 << 40:
            return 0
    while high - low > 1:
        middle = (low + high) // 2
        if bool(_seen(mask_function, middle, torch.tensor([begin]), device)[0]):
            low = middle
        else:
            high = middle
    return high - begin
