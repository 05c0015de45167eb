"""`lm-eval-sparse new-method`: a file with a small method that works, and its tests, to be changed."""

from __future__ import annotations

import importlib.util
import keyword
import os
import re
import shlex
import sys
from pathlib import Path

from .. import paths
from ..errors import PROGRAM, UserError
from ..methods.plan import argument_names
from ..methods.registry import METHODS
from ..results.files import why

#: The phases that a scored method can be written for, the default first.
PHASES = ("eviction", "prefill", "decode")
_NAME = re.compile(r"[a-z][a-z0-9]*(_[a-z0-9]+)*")
_LONGEST_NAME = 40


def write(name: str, phase: str, folder: Path) -> list[Path]:
    """Write the method `name` and its tests into a folder; returns the two files. Nothing is overwritten.

    Raises:
        UserError: a name that cannot be one, a folder that is not there, files that are.
    """
    _check(name, phase)
    if not paths.is_dir(folder):
        raise UserError(f"--out {folder} is no folder; type: mkdir -p {folder}")
    files = {folder / file: text for file, text in texts(name, phase).items()}
    for path in files:
        if os.path.lexists(path):
            raise UserError(f"{path} exists already, and nothing is overwritten; take another name or another --out")
    made: list[Path] = []
    try:
        for path, text in files.items():
            with path.open("x", encoding="utf-8") as opened:
                made.append(path)
                opened.write(text)
    except OSError as error:
        for path in made:
            path.unlink(missing_ok=True)
        raise UserError(f"cannot write {path} ({why(error)}); give another folder with --out DIR") from None
    return list(files)


def texts(name: str, phase: str) -> dict[str, str]:
    """File name -> content."""
    own = {
        "@ORACLE@": _ORACLES[phase],  # first: it has marks in it
        "@KERNELS@": "from lm_eval_sparse.kernels.types import RaggedKV\n" if phase == "decode" else "",
        "@IMPORTS@": "Decoding, conformance, select" if phase == "decode" else "conformance, select",
        "@NAME@": name,
        "@CLASS@": class_of(name),
        "@PROGRAM@": PROGRAM,
    }

    def filled(text: str) -> str:
        for mark, value in own.items():
            text = text.replace(mark, value)
        return text

    return {f"{name}.py": filled(_METHODS[phase]), f"test_{name}.py": filled(_TESTS)}


def class_of(name: str) -> str:
    """What the class of a method is called."""
    return "".join(word.capitalize() for word in name.split("_"))


def next_steps(name: str, phase: str, files: list[Path]) -> str:
    """What the author of the new method may do with it."""
    method, tests = (os.path.relpath(path) for path in files)
    cls = class_of(name)
    place = f"{method if method.startswith('..') else f'./{method}'}:{cls}"
    local, typed = shlex.quote(place), shlex.quote(f"method={place},sparsity=0.8")
    return f"""\
{method} holds a method of the {phase} phase that works, {tests} its tests. What to do next:

1. Change `score`, the knobs and what the class says of itself; and the last test, which says what it should choose.
2. After every change:
     {PROGRAM} check-method {local}
     python -m pytest {shlex.quote(tests)}
3. Run it:
     lm_eval --model sparse-hf --model_args {typed} --tasks forced_frontier_niah_4k --limit 5
4. To give it to others under its name, put it into a package with an entry point:
     [project.entry-points."lm_eval_sparse.methods"]
     {name} = "your_package.{name}:{cls}\""""


def _check(name: str, phase: str) -> None:
    if phase not in PHASES:
        raise UserError(f"--phase {phase} given; phases are {', '.join(PHASES)}")
    if not _NAME.fullmatch(name) or keyword.iskeyword(name) or len(name) > _LONGEST_NAME:
        raise UserError(
            f"{name!r:.100} given, but a method's name is lower-case words of letters and digits joined by "
            f"underscores, such as mean_keys, at most {_LONGEST_NAME} characters and no word of Python"
        )
    if name in METHODS:
        raise UserError(
            f"{name!r} given, but there is a method of this name; names that are taken: {', '.join(METHODS.names())}"
        )
    cls = class_of(name)
    if re.search(rf"\b{cls}\b", _METHODS[phase] + _TESTS):
        raise UserError(
            f"{name!r} given, but its class would be {cls}, which methods are written with; take another name"
        )
    if name in sys.stdlib_module_names or importlib.util.find_spec(name) is not None:
        raise UserError(f"{name!r} given, but there is a module of this name, which {name}.py would hide; take another")
    if name in argument_names():
        raise UserError(f"{name!r} given, but this is the name of a model argument; take another name")


_HEAD = '''\
"""@NAME@: an example to change. What to compute is yours; what it selects, keeps and counts is done for you.

    @PROGRAM@ check-method @NAME@.py:@CLASS@

says whether it holds what every method promises.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

'''

_METHODS = {
    "eviction": _HEAD
    + '''\
from torch import Tensor

from lm_eval_sparse.methods import Call, ScoredEviction, number


@dataclass(frozen=True)
class @CLASS@(ScoredEviction):
    """The tokens of each KV head whose keys have the smallest norm, and the first and last of the prompt.

    Knobs:
        capacity: tokens that each KV head keeps on average.
        sinks, local: first and last tokens that are always kept; fewer where a sparsity leaves no room.
    """

    name: ClassVar[str] = "@NAME@"
    importance: ClassVar[str] = "norm of the key"  # by what it chooses, in a few words
    reference: ClassVar[str] = "unpublished"  # the paper
    forced = {"sinks": 4, "local": 32}  # always kept, with their defaults
    tiny: ClassVar = {"capacity": 48}  # knobs that make it sparse at 200 tokens, for tests

    capacity: int = 1024
    sinks: int | str = "auto"
    local: int | str = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        number("capacity", self.capacity, 1, float("inf"), whole=True, example=1024)
        for knob in self.forced:
            if getattr(self, knob) != "auto":
                number(knob, getattr(self, knob), 0, float("inf"), whole=True, example=self.forced[knob])

    def score(self, call: Call) -> Tensor:
        """`(H_kv, L)` for each token of each KV head: the largest stay."""
        return -call.key.float().norm(dim=-1)  # call.key is (H_kv, L, D); call.query (H, L, D)
''',
    "prefill": _HEAD
    + '''\
import torch.nn.functional as F
from torch import Tensor

from lm_eval_sparse.methods import Call, ScoredPrefill, number, one_of


@dataclass(frozen=True)
class @CLASS@(ScoredPrefill):
    """For each block of queries the key blocks whose mean keys are nearest to its mean query.

    Knobs:
        top_k: key blocks that a query block reads, the first and the one on the diagonal included.
        block_size: tokens of a block: 16, 32, 64 or 128.
    """

    name: ClassVar[str] = "@NAME@"
    importance: ClassVar[str] = "mean keys and queries"  # by what it chooses, in a few words
    reference: ClassVar[str] = "unpublished"  # the paper
    budget_knobs: ClassVar[tuple[str, ...]] = ("top_k",)  # what a sparsity decides
    tiny: ClassVar = {"top_k": 4}  # knobs that make it sparse at 200 tokens, for tests

    top_k: int = 64
    block_size: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        number("top_k", self.top_k, 2, float("inf"), whole=True, example=64)
        one_of("block_size", self.block_size, (16, 32, 64, 128))

    def score(self, call: Call) -> Tensor:
        """`(H, n, n)` for each (query head, query block, key block): the largest of each row are read."""
        heads, kv_heads = len(call.query), len(call.key)
        query, key = (self._means(part) for part in (call.query, call.key))
        key = key.repeat_interleave(heads // kv_heads, 0)  # query heads that share a KV head follow each other
        return query @ key.transpose(1, 2)

    def _means(self, states: Tensor) -> Tensor:
        """`(…, L, D)` to the mean of each block, `(…, n, D)` fp32; the last block may be partial."""
        length = states.shape[1]
        blocks = F.pad(states.float(), (0, 0, 0, -length % self.block_size)).unflatten(1, (-1, self.block_size))
        tokens = F.pad(states.new_ones(length), (0, -length % self.block_size)).reshape(-1, self.block_size).sum(1)
        return blocks.sum(2) / tokens[:, None]
''',
    "decode": _HEAD
    + '''\
import torch
from torch import Tensor

from lm_eval_sparse.kernels.types import Slot
from lm_eval_sparse.methods import Call, ScoredDecode, number, one_of


@dataclass(frozen=True)
class @CLASS@(ScoredDecode):
    """The pages whose mean keys have the largest products with the query, and the page being written.

    Knobs:
        budget: keys that a new token reads besides those of the current page.
        page_size: keys of a page: 8, 16, 32 or 64.
    """

    name: ClassVar[str] = "@NAME@"
    unit: ClassVar[str] = "pages"
    importance: ClassVar[str] = "mean key per query"  # by what it chooses, in a few words
    reference: ClassVar[str] = "unpublished"  # the paper
    tiny: ClassVar = {"budget": 48, "page_size": 8}  # knobs that make it sparse at 200 tokens, for tests

    budget: int = 1024
    page_size: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("page_size", self.page_size, (8, 16, 32, 64))
        number("budget", self.budget, 1, float("inf"), whole=True, example=1024)

    # What is kept of the keys, so that those which are not read need not be looked at.

    def slots(self) -> tuple[Slot, ...]:
        return (Slot("mean", "page", (-1,), derived=True),)  # a vector as long as a key; follows from the keys

    def prefilled(self, call: Call) -> None:
        self._take(call, torch.zeros_like(call.cache.kv.lengths), call.cache.kv.longest)

    def appended(self, call: Call, before: Tensor) -> None:
        self._take(call, before, call.query.shape[2])

    def _take(self, call: Call, before: Tensor, tokens: int) -> None:
        """Make the means of all pages anew that the next `tokens` tokens of each sequence fall into."""
        kv, state, size, device = call.cache.kv, call.state, self.page_size, before.device
        own = call.cache.working()  # rows may be idle: they do what the first of the others does, to its own pages
        start, first, begin, last = (p[own, None].long() for p in (kv.starts, state.first, before, kv.lengths - 1))
        page = torch.minimum(begin // size + torch.arange(tokens // size + 2, device=device), last // size)
        token = page[..., None] * size + torch.arange(size, device=device)
        there = token <= last[..., None]
        keys = kv.keys[start[..., None] + torch.minimum(token, last[..., None])] * there[..., None]
        mean = keys.float().sum(2) / there.sum(2, keepdim=True)
        state["mean"][first + page] = mean.to(kv.keys.dtype)

    def score(self, call: Call, pages: int) -> Tensor:
        """`(S, G, T, P)` for each (sequence, query head of its KV head, new token, page): the largest are read."""
        means = call.state["mean"]
        entry = call.state.first[:, None] + torch.arange(pages, device=means.device)
        mean = means[entry.clamp(max=len(means) - 1)]
        return torch.einsum("sgtd,spd->sgtp", call.query.float(), mean.float())

    def cost(self, visible: Tensor, read: Tensor, group: int, dim: int, element: int) -> tuple[Tensor, Tensor]:
        pages = (visible - 1) // self.page_size
        return pages * (2 * dim * group), pages * (dim * element)  # operations, and bytes of what is kept
''',
}

_TESTS = '''\
"""Tests of @NAME@: what every method promises, and that it chooses what it should."""

from __future__ import annotations

from pathlib import Path

import torch

@KERNELS@from lm_eval_sparse.methods import METHODS
from lm_eval_sparse.testing import @IMPORTS@

@CLASS@ = METHODS.add_file(f"{Path(__file__).with_name('@NAME@.py')}:@CLASS@")

test_it_holds_what_every_method_promises = conformance.tests(@CLASS@)


def test_it_chooses_what_it_should() -> None:
    """Compared with a slow and literal version: write the formula of your method here, in loops."""
    generator = torch.Generator().manual_seed(torch.seed() % 2**31)
@ORACLE@'''

_ORACLES = {
    "eviction": """\
    query, key = torch.randn(4, 203, 16, generator=generator), torch.randn(2, 203, 16, generator=generator)
    kept = select(@CLASS@(capacity=50, sinks=3, local=7), query, key)
    for head in range(2):
        always = [*range(3), *range(203 - 7, 203)]
        others = sorted(set(range(203)) - set(always), key=lambda token: float(key[head, token].norm()))
        assert kept.ids[head, :50].tolist() == sorted([*always, *others[:40]])
""",
    "prefill": """\
    query, key = torch.randn(4, 203, 16, generator=generator), torch.randn(2, 203, 16, generator=generator)
    chosen = select(@CLASS@(top_k=4), query, key)
    for head in range(4):
        means = [key[head // 2, at : at + 16].mean(0) for at in range(0, 203, 16)]
        for row, at in enumerate(range(0, 203, 16)):
            own = query[head, at : at + 16].mean(0)
            others = sorted(range(1, row), key=lambda block: float(own @ means[block]))
            expected = sorted({0, row, *others[max(0, len(others) - 2) :]})
            assert chosen.indices[head, row, : int(chosen.counts[head, row])].tolist() == expected
""",
    "decode": """\
    query, key = torch.randn(1, 4, 1, 16, generator=generator), torch.randn(203, 16, generator=generator)
    cache = Decoding(RaggedKV.of(key, key, [0], [203]), torch.tensor([203]))
    read = select(@CLASS@(budget=48, page_size=8), query, cache)
    for head in range(4):
        scores = [float(query[0, head, 0] @ key[page * 8 : page * 8 + 8].mean(0)) for page in range(25)]
        best = sorted(range(25), key=lambda page: scores[page])[-6:]
        assert read.ids[0, head, 0, :7].tolist() == sorted([*best, 25])
""",
}
