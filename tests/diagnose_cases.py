"""Methods for tests of `diagnose=N`, and a brute-force recomputation in fp64 of what it has to say.

The recomputation goes from what each layer was given and what was chosen for it. It keeps lists of token numbers and
knows nothing of caches or kernels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from lm_eval_sparse.kernels.types import Blocks, Keep, Reads
from lm_eval_sparse.kernels.types.reads import Extra
from lm_eval_sparse.methods import Allocation, Call, EvictionMethod, PrefillMethod, ScoredEviction, Uniform
from lm_eval_sparse.methods.base import DecodeMethod
from lm_eval_sparse.runtime import diagnose, periodic, session, steps
from lm_eval_sparse.runtime.session import Runtime

FIGURES = ("mass_kept", "output_error", "oracle_overlap")


class Named:
    """What a row of the taxonomy asks for, here the same for all."""

    unit: ClassVar[str] = "tokens"
    kv: ClassVar[str] = "test"
    importance: ClassVar[str] = "test"
    reference: ClassVar[str] = "test"
    allocation: ClassVar[str] = "uniform"


@dataclass(frozen=True)
class Drawn(Named, DecodeMethod):
    """Every third key and the token itself, of which some are hidden and all others weighted, and a virtual key."""

    name: ClassVar[str] = "test_drawn"
    page_size: int = 1

    def select(self, call: Call) -> Reads:
        kv, (sequences, group, tokens, _) = call.cache.kv, call.query.shape
        visible = kv.visible(tokens)
        longest = int(visible.max())
        ids = torch.zeros(sequences, group, tokens, longest, dtype=torch.int32)
        counts = torch.zeros(sequences, group, tokens, dtype=torch.int32)
        bias = torch.zeros(ids.shape)
        for s in range(sequences):
            for g in range(group):
                for t in range(tokens):
                    last = int(visible[s, t]) - 1
                    own = sorted({*range((s + g) % 3, last, 3), last})
                    ids[s, g, t, : len(own)], counts[s, g, t] = torch.tensor(own), len(own)
                    bias[s, g, t, : len(own)] = torch.tensor(
                        [-torch.inf if n % 4 == 1 and n + 1 < len(own) else 0.25 * n / last for n in range(len(own))]
                    )
        values = kv.values[kv.starts][:, None].clone()
        return Reads(ids, counts, 1, bias, Extra(values, bias=torch.ones(sequences, 1, tokens, 1)))


@dataclass(frozen=True)
class Merged(Named, EvictionMethod):
    """Every second token, whose values are halved, and the last one; other ones in each KV head."""

    name: ClassVar[str] = "test_merged"

    def select(self, call: Call) -> Keep:
        lists = [sorted({*range(h % 2, call.length, 2), call.length - 1}) for h in range(len(call.key))]
        ids = torch.zeros(len(lists), max(map(len, lists)), dtype=torch.int64)
        for row, own in zip(ids, lists, strict=True):
            row[: len(own)] = torch.tensor(own)
        counts = torch.tensor(list(map(len, lists)))
        values = call.value.gather(1, ids[..., None].expand(-1, -1, call.value.shape[-1])) / 2
        return Keep(ids, counts, int(counts.sum()), values)


@dataclass(frozen=True)
class Triangle(Named, PrefillMethod):
    """All key blocks."""

    name: ClassVar[str] = "test_triangle"

    def select(self, call: Call) -> Blocks:
        block = torch.arange(-(-call.length // 16))
        mask = (block <= block[:, None]).expand(len(call.query), -1, -1)
        return Blocks.from_mask(mask, call.length, 16, 16)


@dataclass(frozen=True)
class Everything(Named, EvictionMethod):
    """All tokens."""

    name: ClassVar[str] = "test_everything"

    def select(self, call: Call) -> Keep:
        heads = len(call.key)
        ids = torch.arange(call.length).expand(heads, -1).clone()
        return Keep(ids, torch.full((heads,), call.length), heads * call.length)


@dataclass(frozen=True)
class Latest(Named, ScoredEviction):
    """The first tokens and the last ones, again after every few tokens."""

    name: ClassVar[str] = "test_latest"
    allocation: ClassVar[Allocation] = Uniform()
    every: int | None = 3
    capacity: int = 20
    sinks: int = 2

    def score(self, call: Call) -> Tensor:
        length = call.length if call.cache is None else call.cache.kv.longest
        return torch.arange(length).float().expand(call.layer.kv_heads, -1).clone()


# --- the recomputation ------------------------------------------------------------------------------------------------


class Recorder:
    """What every layer is given, what is chosen for it, and what it gives, in the order in which that happens.

    `events`: ("attend", layer, phase, token of the first query, query, key, value, output, selections, softcap) with
    states of one row `(H or H_kv, …)`, and ("compact", layer, keep).
    """

    def __init__(self, patch: pytest.MonkeyPatch):
        self.events: list[tuple] = []
        self.options: dict[int, tuple[float, float | None]] = {}
        self.lenders: dict[int, int] = {}
        inside: list[list[Any]] = []
        attend, chosen = Runtime.attend, session.chosen

        def attended(runtime: Runtime, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **o: Any):
            inside.append([])
            out = attend(runtime, module, query, key, value, mask, **o)
            found, index = inside.pop(), module.layer_idx
            if runtime.probe is not None or runtime.layers[index] is not None:
                return out
            new = query.shape[2]
            if runtime.decoder is not None:
                first, phase = int(runtime.decoder.tokens_held[0]) - 1, "decode"
            else:
                first = key.shape[2] - new if runtime.cache is None else runtime.cache.logical() - new
                phase = runtime.phase
            self.options[index], self.lenders = (o["scale"], o["softcap"]), runtime.lenders
            states = [part[0].double().clone() for part in (query, key[:, :, -new:], value[:, :, -new:], out)]
            self.events.append(("attend", index, phase, first, *states, found))
            return out

        def noted(method: Any, call: Call, kind: type, debug: bool) -> Any:
            found = chosen(method, call, kind, debug)
            inside[-1].append(found)
            return found

        def noted_between(method: Any, call: Call, kind: type, debug: bool) -> Any:
            found = chosen(method, call, kind, debug)
            self.events.append(("compact", call.layer.index, found))
            return found

        patch.setattr(Runtime, "attend", attended)
        for module, function in ((session, noted), (steps, noted), (periodic, noted_between)):
            patch.setattr(module, "chosen", function)


class Layer:
    """Sums of one layer of one sample, and the tokens that it has had."""

    def __init__(self, scale: float, softcap: float | None, lender: Layer | None):
        self.scale, self.softcap, self.lender = scale, softcap, lender
        self.sums: dict[str, dict[int, list[tuple[float, float | None, float, float]]]] = {}
        self.keys = self.values = None
        self.prompt = 0
        self.held: list[list[int]] = []
        self.first: tuple[list[list[int]], bool, dict[tuple[int, int], Tensor]] = ([], False, {})
        self.lossy = False
        self.replaced: dict[tuple[int, int], Tensor] = {}

    def weights(self, query: Tensor, key: Tensor) -> Tensor:
        scores = key @ query * self.scale
        if self.softcap is not None:
            scores = self.softcap * torch.tanh(scores / self.softcap)
        return scores.softmax(0)

    def judge(self, phase: str, head: int, query: Tensor, token: int, read: list[int], out: Tensor) -> None:
        own = head // (self.heads // len(self.keys))
        weights = self.weights(query, self.keys[own][: token + 1])
        dense = weights @ self.values[own][: token + 1]
        chosen = set(read)  # of equal weights (a padding token's query is 0) these may as well be taken
        best = sorted(range(len(weights)), key=lambda key: (-float(weights[key]), key not in chosen))[: len(read)]
        both = len(chosen.intersection(best)) / len(read) if read else None
        one = float(weights[read].sum()), both, float((out - dense).square().sum()), float(dense.square().sum())
        self.sums.setdefault(phase, {}).setdefault(head, []).append(one)

    def take(self, event: tuple, queries: int) -> None:
        """An attention call."""
        _, _, phase, first, query, key, value, out, selections = event
        self.heads, new, _ = query.shape
        group = self.heads // len(key)
        if first == 0:
            self.keys, self.values = key, value
        elif phase == "decode":
            if first == self.prompt:
                held, self.lossy, self.replaced = self.first
                self.held = [list(own) for own in held]
            self.keys, self.values = (
                torch.cat([old[:, :first], own], 1) for old, own in ((self.keys, key), (self.values, value))
            )
        if phase == "prefill":
            for found in selections:
                if isinstance(found, Blocks):
                    mask, number = layout_mask(found), min(queries, new)
                    for n in range(1, number + 1):
                        token = n * new // number - 1
                        for head in range(self.heads):
                            read = [k for k in range(token + 1) if mask[head, token, k]]
                            self.judge("prefill", head, query[head, token], token, read, out[head, token])
            self.prompt = first + new
            kept = next((found for found in selections if isinstance(found, Keep)), None)
            held = [list(range(self.prompt)) for _ in key]
            values = {}
            if kept is not None:
                held = [ids[:count] for ids, count in zip(kept.ids.tolist(), kept.counts.tolist(), strict=True)]
                if kept.values is not None:
                    pairs = [(h, n, i) for h, own in enumerate(held) for n, i in enumerate(own)]
                    values = {(h, i): kept.values[h, n].double() for h, n, i in pairs}
            self.first = held, kept is not None, values
            return
        if self.lender is None:
            for own in self.held:
                own.extend(range(first, first + new))
        else:
            self.held, self.lossy = self.lender.held, self.lender.lossy
        reads = next((found for found in selections if isinstance(found, Reads)), None)
        for head in range(self.heads):
            sequence, member = divmod(head, group)
            for t in range(new):
                token, now = first + t, query[head, t]
                held = [token_of for token_of in self.held[sequence] if token_of <= token]
                whole = out[head, t]
                if reads is not None:
                    at = member if reads.ids.shape[1] > 1 else 0
                    read = []
                    for n in range(int(reads.counts[sequence, at, t])):
                        page = int(reads.ids[sequence, at, t, n])
                        if reads.bias is None or reads.bias[sequence, at, t, n] > -torch.inf:
                            read += held[page * reads.unit : (page + 1) * reads.unit]
                    self.judge("decode", head, now, token, read, out[head, t])
                    values = [self.replaced.get((sequence, i), self.values[sequence, i]) for i in held]
                    whole = self.weights(now, self.keys[sequence][held]) @ torch.stack(values)
                if self.lossy:
                    self.judge("eviction", head, now, token, held, whole)

    def compact(self, kept: Keep) -> None:
        self.held = [
            [own[place] for place in ids[:count]]
            for own, ids, count in zip(self.held, kept.ids.tolist(), kept.counts.tolist(), strict=True)
        ]
        self.lossy = True


def layout_mask(layout: Blocks) -> Tensor:
    """`(H, L, L)` bool: all pairs of tiles and columns, those of the future included."""
    mask = torch.zeros(layout.heads, layout.length, layout.length, dtype=torch.bool)
    for head in range(layout.heads):
        for row in range(layout.blocks_q):
            queries = slice(row * layout.block_q, (row + 1) * layout.block_q)
            for block in layout.indices[head, row, : layout.counts[head, row]].tolist():
                mask[head, queries, block * layout.block_k : (block + 1) * layout.block_k] = True
            if layout.columns is not None:
                own = layout.columns[head, row if layout.columns.shape[1] > 1 else 0]
                mask[head, queries, own[: layout.column_counts[head, row]].long()] = True
    return mask


def expected(recorder: Recorder, queries: int = diagnose.QUERIES) -> dict[str, dict[int, dict[str, list[Any]]]]:
    """Phase -> layer -> figure -> a value per head, averaged over samples. A prompt begins with a pass from token 0."""
    samples: list[dict[int, Layer]] = []
    for event in recorder.events:
        kind, index = event[:2]
        if kind == "attend" and event[3] == 0 and (not samples or index in samples[-1]):
            samples.append({})
        if kind == "compact":
            samples[-1][index].compact(event[2])
        else:
            lender = samples[-1].get(recorder.lenders.get(index, -1))
            samples[-1].setdefault(index, Layer(*recorder.options[index], lender)).take(event, queries)
    found: dict[str, dict[int, dict[str, list[Any]]]] = {}
    for sample in samples:
        for index, layer in sample.items():
            for phase, heads in layer.sums.items():
                own = found.setdefault(phase, {}).setdefault(index, {name: [] for name in FIGURES})
                rows = [list(zip(*heads[head], strict=True)) for head in range(layer.heads)]
                known = [[one for one in row[1] if one is not None] for row in rows]
                own["mass_kept"].append([sum(row[0]) / len(row[0]) for row in rows])
                own["output_error"].append([(sum(row[2]) / sum(row[3])) ** 0.5 for row in rows])
                own["oracle_overlap"].append([sum(one) / len(one) for one in known])
    return {
        phase: {
            index: {
                "samples": len(figures["mass_kept"]),
                **{name: torch.tensor(values).mean(0).tolist() for name, values in figures.items()},
            }
            for index, figures in layers.items()
        }
        for phase, layers in found.items()
    }


# --- runs -------------------------------------------------------------------------------------------------------------

BANDS = {"window": 16, "sinks": 3, "near": 5, "tile": 16, "verticals": 20, "slashes": 12}
SNAP = {"capacity": 24, "window": 8, "kernel": 5, "sinks": 2, "local": 4}


def dotted(method: str, knobs: dict[str, Any]) -> dict[str, Any]:
    return {f"{method}.{name}": value for name, value in knobs.items()}


#: Name -> family and model arguments.
RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "tiles": ("qwen3", {"method": "block_sparse", "top_k": 3}),
    "columns": ("llama", {"method": "vertical_slash", **BANDS}),
    "softcap, a window": ("gemma2", {"method": "flexprefill_vs+quest", "alpha": 0.5, "min_budget": 8, "budget": 16,
                                     "page_size": 8, "window": 16, "near": 5, "tile": 16}),
    "evicted, other numbers in each head": ("llama", {"method": "ada_snapkv", **SNAP}),
    "pages of each query head": ("phi3", {"method": "quest", "budget": 16, "page_size": 8, "share_pages": False}),
    "all": ("llama", {"method": "vertical_slash+ada_snapkv+quest", **dotted("vertical_slash", BANDS),
                      **dotted("ada_snapkv", SNAP), "budget": 8, "page_size": 8}),
    "again": ("mistral_full", {"method": "test_latest"}),
    "again, and pages": ("llama", {"method": "test_latest+quest", "budget": 8, "page_size": 8}),
    "biases and a virtual key": ("llama", {"method": "test_drawn"}),
    "values replaced": ("llama", {"method": "test_merged"}),
    "values replaced, and pages": ("llama", {"method": "test_merged+quest", "budget": 8, "page_size": 8}),
}  # fmt: skip
