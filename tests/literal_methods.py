"""Twelve methods and one variant, written down from their definitions once more: fp64, loops, no code of the package.

They are oracles, slow on purpose. Arrays are numpy fp64: queries `(H, L, D)` and keys `(H_kv, L, D)` of a prompt, or
queries `(H, D)` of one step and keys `(H_kv, n, D)` that it may see. Query head h uses KV head `h // (H / H_kv)`. Equal
scores go to the later key. `share` is the density that a sparsity leaves, 1 - s; without one native knobs rule.

Long, since each of thirteen methods is written out.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

Sets = list[set[int]]

# ------------------------------------------------------------------------------------------------------ what they share


def capped(scores: np.ndarray, softcap: float | None) -> np.ndarray:
    return scores if softcap is None else softcap * np.tanh(scores / softcap)


def softmax(scores: np.ndarray) -> np.ndarray:
    weights = np.exp(scores - scores.max())
    return weights / weights.sum()


def attention(query: np.ndarray, key: np.ndarray, scale: float, softcap: float | None) -> np.ndarray:
    """Causal weights `(H, L, L)`."""
    heads, length, _ = query.shape
    found = np.zeros((heads, length, length))
    for h in range(heads):
        for i in range(length):
            found[h, i, : i + 1] = softmax(capped(scale * (key[h * len(key) // heads, : i + 1] @ query[h, i]), softcap))
    return found


def ranked(scores: Sequence[float], among: Iterable[int]) -> list[int]:
    """Largest first; equals: the later one first."""
    return sorted(among, key=lambda j: (-scores[j], -j))


def best(scores: Sequence[float], number: int, forced: Iterable[int] = ()) -> set[int]:
    """The forced ones and, up to `number` in all, those of the largest scores."""
    always = set(forced)
    others = ranked(scores, set(range(len(scores))) - always)
    return always | set(others[: max(0, number - len(always))])


@dataclass
class Row:
    """What one list is chosen from: scores, what is always taken, and what taking each one costs."""

    scores: Sequence[float]
    forced: set[int]
    costs: Sequence[int] = field(default_factory=list)

    def cover(self, rest: float) -> set[int]:
        """The forced ones, then the largest first until what is missing is at most `rest` of the row's sum."""
        taken, total = set(self.forced), math.fsum(self.scores)
        missing = math.fsum(self.scores[j] for j in range(len(self.scores)) if j not in taken)
        for j in ranked(self.scores, set(range(len(self.scores))) - taken):
            if missing <= rest * total:
                break
            taken.add(j)
            missing -= self.scores[j]
        return taken

    def steps(self) -> list[tuple[float, int]]:
        """(share that is missing, cost) before each one that is not forced is taken: it is while `rest` is below."""
        others = ranked(self.scores, set(range(len(self.scores))) - self.forced)
        total, missing = math.fsum(self.scores), math.fsum(self.scores[j] for j in others)
        found = []
        for j in others:
            found.append((missing / total, self.costs[j]))
            missing -= self.scores[j]
        return found


def one_rest(rows: list[Row], budget: float) -> tuple[float, Sets]:
    """The one share that all rows may miss at which their cost is nearest to `budget`, and what each takes then."""
    steps = sorted((step for row in rows for step in row.steps()), reverse=True)
    cost = sum(row.costs[j] for row in rows for j in row.forced)
    nearest, rest = abs(cost - budget), math.inf
    for place, (share, more) in enumerate(steps):
        cost += more
        following = steps[place + 1][0] if place + 1 < len(steps) else -math.inf
        if following < share and abs(cost - budget) < nearest:
            nearest, rest = abs(cost - budget), (share + max(following, -share)) / 2
    return rest, [row.cover(rest) if rest < math.inf else set(row.forced) for row in rows]


def tile_pairs(length: int, block: int, row: int, column: int) -> int:
    """Pairs of a query block and a key block inside the causal triangle."""
    queries = range(row * block, min(length, (row + 1) * block))
    return sum(1 for i in queries for j in range(column * block, min(length, (column + 1) * block)) if j <= i)


# -------------------------------------------------------------------------------------------------------------- prefill


def block_rows(scores: np.ndarray, length: int, block: int) -> list[Row]:
    """The rows of block scores `(H, n, n)`, head by head: the first block and the diagonal are always read."""
    pairs = [[tile_pairs(length, block, i, j) for j in range(i + 1)] for i in range(scores.shape[1])]
    return [Row(own[i, : i + 1].tolist(), {0, i}, pairs[i]) for own in scores for i in range(len(own))]


def chosen_blocks(scores: np.ndarray, length: int, block: int, mass: float, share: float | None) -> tuple[float, Sets]:
    rows = block_rows(scores, length, block)
    if share is None:
        return 1 - mass, [row.cover(1 - mass) for row in rows]
    return one_rest(rows, share * len(scores) * length * (length + 1) / 2)


def oracle_block_scores(
    query: np.ndarray, key: np.ndarray, scale: float, softcap: float | None, block: int
) -> np.ndarray:
    """Oracle of block-sparse prefill (the upper bound of The Sparse Frontier's block methods): the true attention
    mass of each block, summed over its queries and keys."""
    weights = attention(query, key, scale, softcap)
    heads, length, _ = weights.shape
    number = -(-length // block)
    found = np.zeros((heads, number, number))
    for h in range(heads):
        for i in range(length):
            for j in range(i + 1):
                found[h, i // block, j // block] += weights[h, i, j]
    return found


def xattention_scores(query: np.ndarray, key: np.ndarray, scale: float, block: int, stride: int) -> np.ndarray:
    """XAttention (Xu et al., ICML 2025), section 2.1 and algorithm 1: antidiagonal sums, every `stride`-th."""
    heads, length, dim = query.shape
    padded = -(-length // block) * block
    groups, number, wide = padded // stride, padded // block, block // stride
    found = np.zeros((heads, number, number))
    for h in range(heads):
        queries, keys = np.zeros((padded, dim)), np.zeros((padded, dim))
        queries[:length], keys[:length] = query[h], key[h * len(key) // heads]
        for a in range(groups):
            if a * stride >= length:
                continue  # padding only
            scores = np.zeros(a + 1)
            for b in range(a + 1):
                for t in range(stride):
                    scores[b] += queries[a * stride + stride - 1 - t] @ keys[b * stride + t]
            for b, weight in enumerate(softmax(scores * scale / stride)):
                found[h, a // wide, b // wide] += weight
    return found


def a_shape(length: int, sinks: int, near: list[int]) -> np.ndarray:
    """A-shape, StreamingLLM's pattern in prefill (Xiao et al., ICLR 2024, section 3.2): the first blocks of 16 keys
    that hold `sinks` tokens, and for query block I the nearest `near[I]` ones, its own included. `(n, n)` bool."""
    number, first = -(-length // 16), -(-sinks // 16)
    mask = np.zeros((number, number), dtype=bool)
    for i in range(number):
        for j in range(i + 1):
            mask[i, j] = j < first or i - j < near[i]
    return mask


def a_shapes(length: int, sinks: int, share: float) -> tuple[float, list[np.ndarray]]:
    """With a sparsity: the same number of nearest blocks for all query blocks, and one more for the last few, such
    that pairs are nearest to the share. That distance in pairs, and all masks that have it."""
    number = -(-length // 16)
    pairs = np.array([[tile_pairs(length, 16, i, j) for j in range(number)] for i in range(number)])
    found: dict[float, list[np.ndarray]] = {}
    for least in range(1, number + 1):
        for more in range(number):
            mask = a_shape(length, sinks, [least + (i >= number - more) for i in range(number)])
            found.setdefault(abs(int(pairs[mask].sum()) - share * length * (length + 1) / 2), []).append(mask)
    return min(found), found[min(found)]


def entropy_distance(one: np.ndarray, other: np.ndarray) -> float:
    """Root of the Jensen-Shannon divergence, natural logarithm."""
    middle, total = (one + other) / 2, 0.0
    for part in (one, other):
        total += sum(p * math.log(p / m) for p, m in zip(part, middle, strict=True) if p > 0) / 2
    return math.sqrt(max(total, 0.0))


def fewest(masses: Sequence[float], gamma: float) -> tuple[int, float]:
    """How many of the largest masses cover gamma of their sum, and how near to gamma the shares around are."""
    total, taken, before = math.fsum(masses), 0.0, 0.0
    for number, mass in enumerate(sorted(masses, reverse=True), start=1):
        before, taken = taken, taken + mass
        if taken >= gamma * total:
            return number, min(abs(taken / total - gamma), abs(before / total - gamma))
    return len(masses), 0.0


@dataclass
class FlexHead:
    """FlexPrefill (Lai et al., ICLR 2025), algorithms 1 to 4: what decides for one head `(L, D)`.

    Attributes:
        vertical, slash: attention of the last block's queries by key and by distance, `(L,)`; columns, bands: the
            same by blocks of them, `(n,)`.
        cells: pooled attention of (query block, key block), by the number of rows.
        distance: of the pooled guess from the true attention of the last block.
    """

    block: int
    vertical: np.ndarray
    slash: np.ndarray
    columns: np.ndarray
    bands: np.ndarray
    cells: dict[tuple[int, int], float]
    distance: float

    @staticmethod
    def of(query: np.ndarray, key: np.ndarray, scale: float, softcap: float | None, block: int) -> FlexHead:
        length, number = len(query), -(-len(query) // block)
        vertical, slash, columns, bands = np.zeros(length), np.zeros(length), np.zeros(number), np.zeros(number)
        for i in range(length - block, length):
            for j, weight in enumerate(softmax(capped(scale * (key[: i + 1] @ query[i]), softcap))):
                vertical[j] += weight
                slash[i - j] += weight
                columns[j // block] += weight / block
                bands[(i - j) // block] += weight / block
        mean_key = np.stack([key[j * block : (j + 1) * block].mean(0) for j in range(number)])
        mean_query = np.stack([query[i * block : (i + 1) * block].mean(0) for i in range(number)])
        guess = softmax(capped(scale * (mean_key @ query[length - block :].mean(0)), softcap))
        cells = {}
        for i in range(number):
            for j, mass in enumerate(softmax(capped(scale * (mean_key[: i + 1] @ mean_query[i]), softcap)) / number):
                cells[i, j] = float(mass)
        return FlexHead(block, vertical, slash, columns, bands, cells, entropy_distance(guess, columns))

    def by_tokens(self, gamma: float, tau: float, least: int) -> tuple[np.ndarray, float]:
        """What is read when coverage is counted in tokens, as the public code counts; `least`: tokens of min_budget.

        Returns:
            `(n, n)` bool, and how near the head came to another outcome.
        """
        block, number = self.block, len(self.columns)
        low, margin = min(-(-least // block), number), abs(self.distance - tau) if tau else math.inf
        mask = np.eye(number, dtype=bool)
        mask[:, 0] = True
        many_columns = many_bands = low
        if self.distance < tau:
            many, near = fewest(list(self.cells.values()), gamma)
            order = sorted(self.cells, key=lambda cell: (-self.cells[cell], -cell[0], -cell[1]))
            for cell in order[:many]:
                mask[cell] = True
            following = self.cells[order[many]] if many < len(order) else -1.0
            margin = min(margin, near, 1 - following / self.cells[order[many - 1]])
        else:
            (tokens, near), (distances, other) = (
                fewest(self.vertical.tolist(), gamma),
                fewest(self.slash.tolist(), gamma),
            )
            if tokens % block in (0, block - 1):  # one token more or less is another block
                margin = min(margin, near)
            if distances % block in (0, block - 1):
                margin = min(margin, other)
            many_columns = min(max(tokens // block + 1, low), number)
            many_bands = min(max(distances // block + 1, low), number)
        for masses, many, later in ((self.columns, many_columns, True), (self.bands, many_bands, False)):
            order = sorted(range(number), key=lambda at: (-masses[at], -at if later else at))
            if 0 < many < number:
                margin = min(margin, 1 - masses[order[many]] / masses[order[many - 1]])
            for i in range(number):
                for j in range(i + 1):
                    mask[i, j] |= (j if later else i - j) in order[:many]
        return mask, margin

    def thresholds(self, tau: float) -> np.ndarray:
        """`(n, n)`: the gamma above which each tile is read, with no least budget; below 0 what always is."""
        number, found = len(self.columns), np.full((len(self.columns),) * 2, math.inf)
        if self.distance < tau:
            order, taken = sorted(self.cells, key=lambda cell: (-self.cells[cell], -cell[0], -cell[1])), 0.0
            for cell in order:
                found[cell] = taken / math.fsum(self.cells.values())
                taken += self.cells[cell]
        else:
            for masses, tokens, later in ((self.columns, self.vertical, True), (self.bands, self.slash, False)):
                falling = sorted(tokens.tolist(), reverse=True)
                order = sorted(range(number), key=lambda at: (-masses[at], -at if later else at))
                for place, at in enumerate(order):  # it takes place * block tokens, one less must not do
                    need = math.fsum(falling[: place * self.block - 1]) / math.fsum(falling) if place else 0.0
                    for i in range(number):
                        for j in range(i + 1):
                            if (j if later else i - j) == at:
                                found[i, j] = min(found[i, j], need)
        found[np.eye(number, dtype=bool)] = found[:, 0] = -1.0
        return found


# ------------------------------------------------------------------------------------------------------------- eviction


def capacity_of(share: float, tokens: int) -> int:
    return max(1, round(share * tokens))


def knorm(key: np.ndarray, capacity: int) -> Sets:
    """Devoto et al., EMNLP 2024, section 3: the tokens whose keys have the smallest L2 norm."""
    return [best([-math.sqrt(sum(x * x for x in k)) for k in own], capacity) for own in key.tolist()]


def streaming_llm(held: Sequence[int], capacity: int, sinks: int) -> set[int]:
    """Xiao et al., ICLR 2024, section 3.2: the first `sinks` tokens and the last ones, `capacity` in all."""
    if capacity >= len(held):
        return set(held)
    return set(held[:sinks]) | set(held[len(held) - (capacity - sinks) :])


def streaming_positions(length: int, capacity: int) -> list[int]:
    """The same section: distances are those inside the cache, the newest token keeps its place."""
    return list(range(length - min(capacity, length), length))


def tova_scores(newest: np.ndarray) -> list[float]:
    """Oren et al., EMNLP 2024 (TOVA), section 3: weights `(H, n)` of the newest query on
    what is held, mean over all query heads of the layer."""
    return [sum(newest[h, j] for h in range(len(newest))) / len(newest) for j in range(newest.shape[1])]


def h2o_scores(weights: np.ndarray, kv_heads: int) -> list[list[float]]:
    """Zhang et al., NeurIPS 2023 (H2O), section 4: weights `(H, T, n)`, summed over the T queries and the heads that
    share a KV head."""
    heads, queries, keys = weights.shape
    found = [[0.0] * keys for _ in range(kv_heads)]
    for h in range(heads):
        for i in range(queries):
            for j in range(keys):
                found[h * kv_heads // heads][j] += weights[h, i, j]
    return found


def h2o(scores: Sequence[float], capacity: int, recent: float) -> set[int]:
    """The same section: the last tokens stay, the rest of the capacity is for the heavy hitters."""
    number = len(scores)
    if capacity >= number:
        return set(range(number))
    return best(scores, capacity, range(number - math.ceil(recent * capacity), number))


def pyramid_share(layer: int, layers: int, beta: float, capacity: float, length: int) -> float:
    """Cai et al., 2024 (PyramidKV), section 4.2: an arithmetic sequence of budgets, the last layer's being a beta-th of
    the mean; where the first one would be more than the prompt, it is the prompt."""
    x = 1 - 1 / beta
    if (1 + x) * capacity > length:
        x = length / capacity - 1
    return 1 + x - 2 * x * layer / (layers - 1) if layers > 1 else 1.0


def snapkv_scores(
    query: np.ndarray, key: np.ndarray, scale: float, softcap: float | None, window: int, kernel: int
) -> list[list[float]]:
    """Li et al., NeurIPS 2024 (SnapKV), section 4: the last queries' attention, mean over the group, average-pooled."""
    heads, length, _ = query.shape
    seen = np.zeros((len(key), length))
    for h in range(heads):
        for i in range(max(0, length - window), length):
            kv = h * len(key) // heads
            seen[kv, : i + 1] += softmax(capped(scale * (key[kv, : i + 1] @ query[h, i]), softcap))
    reach = kernel // 2
    return [[sum(row[max(0, j - reach) : j + reach + 1]) / kernel for j in range(length)] for row in seen.tolist()]


def pyramidkv(scores: list[list[float]], capacity: int, sinks: int, local: int) -> Sets:
    """One layer of PyramidKV at its own capacity: what is selected by SnapKV's scores."""
    length = len(scores[0])
    forced = {*range(min(sinks, length)), *range(max(0, length - local), length)}
    return [best(row, min(capacity, length), forced) for row in scores]


# --------------------------------------------------------------------------------------------------------------- decode


def step_scores(query: np.ndarray, key: np.ndarray, scale: float, softcap: float | None) -> list[list[float]]:
    """What each query head gives each key before the softmax."""
    heads = len(query)
    return [capped(scale * (key[h * len(key) // heads] @ query[h]), softcap).tolist() for h in range(heads)]


def oracle_topk(
    query: np.ndarray, key: np.ndarray, budget: int, share: float | None = None, tokens: int | None = None
) -> Sets:
    """The upper bound of all that chooses a fixed number of keys: the largest true scores, and the own token."""
    visible = key.shape[1]
    number = 1 + budget if share is None else max(1, round(share * tokens))
    return [best(row, number, {visible - 1}) for row in step_scores(query, key, 1.0, None)]


def top_p(weights: list[np.ndarray], p: float, share: float | None, tokens: int) -> tuple[float, Sets]:
    """For each head the own token (the last one), then the largest weights until at most 1 - p is missing; with a share
    one such rest for all heads."""
    rows = [Row(w.tolist(), {len(w) - 1}, [1] * len(w)) for w in weights]
    if share is None:
        return 1 - p, [row.cover(1 - p) for row in rows]
    return one_rest(rows, share * len(rows) * tokens)


def oracle_topp(
    query: np.ndarray,
    key: np.ndarray,
    scale: float,
    softcap: float | None,
    p: float,
    share: float | None = None,
    tokens: int = 0,
) -> tuple[float, Sets]:
    """The upper bound of all that chooses by mass (Lin et al., NeurIPS 2025, section 3, its oracle top-p)."""
    return top_p([softmax(np.array(row)) for row in step_scores(query, key, scale, softcap)], p, share, tokens)


def quest(query: np.ndarray, key: np.ndarray, page: int, complete: int, share_pages: bool) -> Sets:
    """Quest (Tang et al., ICML 2024), section 3.3: tokens of the `complete` pages whose bounds allow the largest
    products, and of the page being written. With `share_pages`, scores are summed over the heads of a group."""
    (heads, dim), (kv_heads, visible, _) = query.shape, key.shape
    group, current = heads // kv_heads, (visible - 1) // page
    scores = [[0.0] * current for _ in range(heads)]
    for h in range(heads):
        for number in range(current):
            held = key[h // group, number * page : (number + 1) * page]
            for d in range(dim):
                scores[h][number] += max(query[h, d] * held[:, d].min(), query[h, d] * held[:, d].max())
    found = []
    for h in range(heads):
        mates = range(h // group * group, (h // group + 1) * group) if share_pages else [h]
        total = [sum(scores[mate][number] for mate in mates) for number in range(current)]
        pages = best(total, complete) | {current}
        found.append({j for j in range(visible) if j // page in pages})
    return found


def four_bit(key: np.ndarray, dtype: type) -> tuple[np.ndarray, float]:
    """Twilight (Lin et al., NeurIPS 2025), section 4: keys `(n, D)` in 16 steps from each one's least to its
    largest number; and how near a number came to another code."""
    found, near = np.zeros_like(key), math.inf
    for j, k in enumerate(key):
        low = float(dtype(k.min()))
        step = float(dtype((k.max() - k.min()) / 15))
        for d, x in enumerate(k):
            place = (x - low) / step if step else 0.0
            near = min(near, abs(place % 1 - 0.5))
            found[j, d] = low + min(15, round(place)) * step
    return found, near


def twilight(
    query: np.ndarray,
    estimated: np.ndarray,
    inside: Sets,
    scale: float,
    softcap: float | None,
    p: float,
    share: float | None = None,
    tokens: int = 0,
) -> tuple[float, Sets, list[np.ndarray]]:
    """Twilight, section 4: of the tokens that the method `inside` takes, the fewest with mass p by keys in 4 bits.

    Returns:
        What may be missing, the tokens, and each head's weights on those inside.
    """
    lists = [sorted(own) for own in inside]
    scores = step_scores(query, estimated, scale, softcap)
    weights = [softmax(np.array([row[j] for j in own])) for row, own in zip(scores, lists, strict=True)]
    rest, places = top_p(weights, p, share, tokens)
    return rest, [{own[at] for at in taken} for own, taken in zip(lists, places, strict=True)], weights


@dataclass
class Hashed:
    """How one query and the keys of its KV head fall into tables.

    Attributes:
        equal: `(n, T, bits)` bool, whether the bits agree; doubtful: the same shape, whether rounding could change it.
        p: `(n,)`, probability that one bit agrees.
    """

    equal: np.ndarray
    doubtful: np.ndarray
    p: np.ndarray

    def collides(self, bits: int, tables: int) -> tuple[np.ndarray, np.ndarray]:
        """Keys that fall together with the query in at least two tables, surely, and at most."""
        equal = self.equal[:, :tables, :bits]
        may = equal | self.doubtful[:, :tables, :bits]
        must = equal & ~self.doubtful[:, :tables, :bits]
        return must.all(2).sum(1) >= 2, may.all(2).sum(1) >= 2

    def chance(self, bits: int, tables: int) -> np.ndarray:
        """MagicPIG (Chen et al., ICLR 2025), section 4: probability of at least two collisions."""
        x = self.p**bits
        return 1 - (1 - x) ** tables - tables * x * (1 - x) ** (tables - 1)


def hashed(query: np.ndarray, key: np.ndarray, mean: np.ndarray, directions: np.ndarray, near: float) -> Hashed:
    """MagicPIG, section 4: SimHash of one query `(D,)` and centred keys `(n, D)`; directions `(T, bits, D)`."""
    tables, bits, _ = directions.shape
    moved = key - mean
    equal, doubtful = (np.zeros((len(key), tables, bits), dtype=bool) for _ in "ab")
    length = np.linalg.norm(query)
    for t in range(tables):
        for b in range(bits):
            own, others = directions[t, b] @ query, moved @ directions[t, b]
            equal[:, t, b] = (others > 0) == (own > 0)
            size = np.linalg.norm(directions[t, b])
            doubtful[:, t, b] = abs(others) < near * size * np.linalg.norm(key, axis=1)
            doubtful[:, t, b] |= abs(own) < near * size * length
    cosines = moved @ query / (np.linalg.norm(moved, axis=1) * length)
    return Hashed(equal, doubtful, 1 - np.arccos(np.clip(cosines, -1, 1)) / math.pi)


def magicpig_solved(heads: list[Hashed], always: set[int], budget: float) -> tuple[int, int]:
    """Bits and tables for all heads of a row at a sparsity: the most bits at which all tables select enough keys, then
    the number of tables whose count is nearest."""
    _, most_tables, most_bits = heads[0].equal.shape

    def count(bits: int, tables: int) -> int:
        return sum(len(always | set(np.flatnonzero(head.collides(bits, tables)[1]).tolist())) for head in heads)

    bits = max((b for b in range(1, most_bits + 1) if count(b, most_tables) >= budget), default=1)
    return bits, min(range(1, most_tables + 1), key=lambda tables: abs(count(bits, tables) - budget))
