"""The conformance kit finds what it looks for: for each check, methods that do not hold it, and good ones that do.

Long, since each method that is broken in a way of its own is a class.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from lm_eval_sparse.errors import UserError
from lm_eval_sparse.kernels.types import Blocks, Keep, Reads, Slot
from lm_eval_sparse.methods import (
    METHODS,
    Call,
    Count,
    Density,
    EvictionMethod,
    Method,
    ScoredDecode,
    ScoredEviction,
    ScoredPrefill,
)
from lm_eval_sparse.methods.prefill.block_sparse import BlockSparse
from lm_eval_sparse.methods.wrappers import Wrapper
from lm_eval_sparse.testing import conformance
from lm_eval_sparse.testing.conformance import CHECKS, Failed, Subject, check


class Named:
    """What a row of the taxonomy asks for, here the same for all."""

    importance: ClassVar[str] = "test"
    reference: ClassVar[str] = "test"


@dataclass(frozen=True)
class Norms(Named, ScoredEviction):
    """Keys with the smallest norm: holds everything."""

    name: ClassVar[str] = "test_norms"
    tiny: ClassVar = {"capacity": 48}
    capacity: int = 1024
    every: int | None = None

    def score(self, call: Call) -> Tensor:
        return -self.held(call).float().norm(dim=-1)

    def held(self, call: Call) -> Tensor:
        return call.key if call.cache is None else call.cache.padded(call.key)


@dataclass(frozen=True)
class Tokens(Named, ScoredDecode):
    """Pages by the norm of their first key: holds everything."""

    name: ClassVar[str] = "test_tokens"
    unit: ClassVar[str] = "pages"
    tiny: ClassVar = {"budget": 48, "page_size": 8}
    budget: int = 1024
    page_size: int = 16

    def score(self, call: Call, pages: int) -> Tensor:
        first = (torch.arange(pages) * self.page_size).clamp(max=call.cache.kv.longest - 1)
        keys = call.cache.padded(call.key)[:, first].float()
        return torch.einsum("sgtd,spd->sgtp", call.query.float(), keys)


@dataclass(frozen=True)
class Around(Named, Wrapper):
    """Gives the method inside the budget it gets."""

    name: ClassVar[str] = "test_around"
    wraps: ClassVar[tuple[str, ...]] = ("decode", "eviction")
    allocation: ClassVar[str] = "as inside"

    def select(self, call: Call) -> Any:
        return self.inner.select(call)


GOOD = (Norms, Tokens)


@pytest.mark.parametrize(("method", "name"), [(cls, name) for cls in GOOD for name in CHECKS])
def test_good_methods_pass(method: type[Method], name: str) -> None:
    if name in conformance.applicable(Subject.of(method)):
        assert check(method, name)
    assert method.name not in METHODS


@pytest.mark.parametrize("name", ["taxonomy", "promise", "causality", "memory", "counted", "full-budget"])
def test_a_wrapper_is_checked_around_a_method(name: str) -> None:
    METHODS.add(Around)
    assert Subject.of(Around).phase == "decode" and Subject.of(Around).name.startswith("test_around:")
    assert check("test_around:quest", name)


# --- methods that do not hold what they should ------------------------------------------------------------------------

BROKEN: list[tuple[str, str, type[Method]]] = []


def broken(name: str, words: str) -> Any:
    """Note that a class fails this check with these words."""

    def noted(cls: type[Method]) -> type[Method]:
        BROKEN.append((name, words, cls))
        return cls

    return noted


def keep(lists: list[list[int]], total: int | None = None) -> Keep:
    ids = torch.zeros(len(lists), max(map(len, lists)), dtype=torch.int64)
    for row, own in zip(ids, lists, strict=True):
        row[: len(own)] = torch.tensor(own)
    counts = torch.tensor(list(map(len, lists)))
    return Keep(ids, counts, int(counts.sum()) if total is None else total)


@broken("taxonomy", "`tiny` is empty")
@dataclass(frozen=True)
class NotTiny(Norms):
    tiny: ClassVar = {}


@broken("taxonomy", "`tiny` has size, which is none of its knobs")
@dataclass(frozen=True)
class Strange(Norms):
    tiny: ClassVar = {"size": 3}


@broken("taxonomy", "reference is 'a [|] b'; give words, without")
@dataclass(frozen=True)
class Barred(Norms):
    reference: ClassVar[str] = "a | b"


@broken("taxonomy", "is no frozen dataclass")
class Bare(Norms):
    more: int = 3


@broken("taxonomy", "`budget_knobs` is empty")
@dataclass(frozen=True)
class Unbudgeted(Named, EvictionMethod):
    name: ClassVar[str] = "test_unbudgeted"
    unit: ClassVar[str] = "tokens"
    kv: ClassVar[str] = "evicted"
    allocation: ClassVar[str] = "uniform"
    tiny: ClassVar = {"half": 2}
    half: int = 2

    def select(self, call: Call) -> Keep:
        return keep([list(range(call.length // 2))] * len(call.key))


@broken("odd-lengths", "its `tiny` knobs do not make it sparse")
@dataclass(frozen=True)
class Large(Norms):
    tiny: ClassVar = {"capacity": 480}


@broken("odd-lengths", "do not add up to its total")
@dataclass(frozen=True)
class Rounded(Norms):
    """Whose total is that of whole blocks."""

    def select(self, call: Call) -> Keep:
        kept = super().select(call)
        if call.length % 16 == 0:
            return kept
        return replace(kept, total=kept.total - 1)


@broken("odd-lengths", "a token does not read itself")
@dataclass(frozen=True)
class Complete(Tokens):
    """Reads complete pages only."""

    def select(self, call: Call) -> Reads:
        found = super().select(call)
        return replace(found, counts=(found.counts - 1).clamp(min=1))


@broken("gqa", "KV heads that change places")
@dataclass(frozen=True)
class Interleaved(Named, ScoredPrefill):
    """Puts query heads beside the keys of others."""

    name: ClassVar[str] = "test_interleaved"
    budget_knobs: ClassVar[tuple[str, ...]] = ("top_k",)
    tiny: ClassVar = {"top_k": 4}
    top_k: int = 64
    block_size: int = 16

    def score(self, call: Call) -> Tensor:
        query, key = (part[:, :: self.block_size].float() for part in (call.query, call.key))
        return query @ key.repeat(len(query) // len(key), 1, 1).transpose(1, 2)


@broken("gqa", "factors|select failed|expected|size")
@dataclass(frozen=True)
class Even(Norms):
    """Takes the number of KV heads for even."""

    def score(self, call: Call) -> Tensor:
        halves = super().score(call).unflatten(0, (2, -1))
        return halves.flatten(0, 1)


@broken("dtype", "only .* of what is selected")
@dataclass(frozen=True)
class Half(Norms):
    """Computes scores in the dtype of the keys."""

    def score(self, call: Call) -> Tensor:
        return -(self.held(call).norm(dim=-1) + 64).float()


@broken("determinism", "selects something else the second time")
@dataclass(frozen=True)
class Dice(Norms):
    """Scores by torch's global random numbers."""

    def score(self, call: Call) -> Tensor:
        return torch.rand(call.key.shape[:2])


@broken("determinism", "draws from torch's global random numbers")
@dataclass(frozen=True)
class Seeding(Norms):
    """Seeds them, for everybody."""

    def score(self, call: Call) -> Tensor:
        torch.manual_seed(3)
        return torch.rand(call.key.shape[:2])


@broken("determinism", "selects something else the second time")
@dataclass(frozen=True)
class Counting(Norms):
    """Remembers how often it was asked."""

    asked: ClassVar[list[int]] = []

    def score(self, call: Call) -> Tensor:
        self.asked.append(1)
        return super().score(call) * (-1) ** len(self.asked)


@broken("promise", "sparsity 0.5 at 4097 tokens measures")
@dataclass(frozen=True)
class Own(Norms):
    """Keeps what it likes."""

    def select(self, call: Call) -> Keep:
        return super().select(replace(call, budget=Count(600)))


@broken("promise", "sparsity 0.9 at 4097 tokens measures")
@dataclass(frozen=True)
class Floored(Tokens):
    """Reads a fifth at least."""

    def select(self, call: Call) -> Reads:
        budget = call.budget
        if isinstance(budget, Density):
            budget = Density(max(0.2, budget.share))
        return super().select(replace(call, budget=budget))


@broken("causality", "reads something else when those behind it come with it")
@dataclass(frozen=True)
class Together(Tokens):
    """Chooses by all new tokens for each."""

    def score(self, call: Call, pages: int) -> Tensor:
        return super().score(call, pages).mean(2, keepdim=True).expand(-1, -1, call.query.shape[2], -1)


@broken("causality", "layout holds a key block|after its query block|lies after")
@dataclass(frozen=True)
class Future(BlockSparse):
    """Reads blocks that come later."""

    name: ClassVar[str] = "test_future"

    def select(self, call: Call) -> Blocks:
        found = super().select(call)
        return replace(found, indices=(found.indices + 1).clamp(max=found.blocks_k - 1))


@broken("memory", "bytes are held after each prompt")
@dataclass(frozen=True)
class Hoarding(Norms):
    """Keeps every prompt's keys."""

    kept: ClassVar[list[Tensor]] = []

    def score(self, call: Call) -> Tensor:
        self.kept.append(call.key.clone())
        return super().score(call)


@broken("memory", "bytes are held after each prompt")
@dataclass(frozen=True)
class Elsewhere(Tokens):
    """Keeps what should be in slots, of the last prompt only."""

    kept: ClassVar[dict[int, Tensor]] = {}

    def prefilled(self, call: Call) -> None:
        self.kept[call.layer.index] = call.key.clone()


@broken("memory", "holds .* MB at once")
@dataclass(frozen=True)
class Whole(Norms):
    """Makes all scores of all heads at once."""

    def score(self, call: Call) -> Tensor:
        key = call.key.repeat_interleave(len(call.query) // len(call.key), 0)
        scores = (call.query.float() @ key.float().transpose(1, 2)).softmax(-1)
        return scores.mean(1).unflatten(0, (len(call.key), -1)).mean(1)


@broken("full-budget", "selected and executed, a budget of everything")
@dataclass(frozen=True)
class Dropping(Norms):
    """Always drops a token."""

    def select(self, call: Call) -> Keep:
        tokens = min(self.capacity, call.length - 1)
        return super().select(replace(call, budget=Count(tokens)))


@broken("batch", "beside rows of other lengths")
@dataclass(frozen=True)
class Neighbourly(Tokens):
    """Scores of a sequence depend on those of another."""

    def score(self, call: Call, pages: int) -> Tensor:
        own = super().score(call, pages)
        return own + 10 * own.nan_to_num(0).flip(0)


@broken("batch", "a prompt (measures|scores|gets)|asked once more")
@dataclass(frozen=True)
class Tiring(Norms):
    """Keeps one token less each time."""

    asked: ClassVar[list[int]] = []

    def select(self, call: Call) -> Keep:
        self.asked.append(1)
        return super().select(replace(call, budget=Count(max(8, 60 - len(self.asked)))))


@dataclass(frozen=True)
class Flattering(Blocks):
    """Says that half as many pairs are executed as are listed."""

    def _pairs(self) -> Tensor:
        return super()._pairs() // 2


@broken("counted", "a run measures .* was selected")
@dataclass(frozen=True)
class Lying(BlockSparse):
    name: ClassVar[str] = "test_lying"

    def select(self, call: Call) -> Blocks:
        return Flattering(**vars(super().select(call)))


@broken("odd-lengths", "counts .* pairs where .* are listed")
@dataclass(frozen=True)
class LyingToo(Lying):
    pass


@broken("every", "are gone right after an eviction")
@dataclass(frozen=True)
class Lazy(Norms):
    """Drops nothing more once the prompt is over."""

    def select(self, call: Call) -> Keep:
        if call.cache is None:
            return super().select(call)
        longest = call.cache.kv.longest
        return keep([list(range(longest))] * len(call.cache.kv.starts))


@broken("every", "evicted 0 times")
@dataclass(frozen=True)
class Never(Norms):
    """Has the knob, and does not use it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "every", None)


@pytest.mark.parametrize(("name", "words", "method"), BROKEN, ids=lambda value: getattr(value, "__name__", None))
def test_a_method_that_does_not_hold_it_fails(name: str, words: str, method: type[Method]) -> None:
    found = {result.check: result for result in conformance.run(method, [name])}[name]
    assert not found.passed
    assert re.search(words, found.says), found.says
    assert method.name not in METHODS
    for kept in ("kept", "asked"):
        if hasattr(method, kept):
            getattr(method, kept).clear()


def test_every_check_has_methods_that_fail_it() -> None:
    assert {name for name, *_ in BROKEN} == set(CHECKS)


def test_a_budget_is_averaged_over_layers() -> None:
    """A wrapper may give layers budgets of their own, and has to give back what it takes."""

    @dataclass(frozen=True)
    class Deep(Around):
        name: ClassVar[str] = "test_deep"

        def select(self, call: Call) -> Any:
            step = 0.02 * (call.layer.index - (call.layer.count - 1) / 2)
            return self.inner.select(replace(call, budget=Density(call.budget.share + step + self.more)))

        @property
        def more(self) -> float:
            return 0.0

    class Greedy(Deep):
        name = "test_deep"
        more = 0.02

    METHODS.add(Deep)
    assert check("test_deep:snapkv", "promise")
    METHODS.discard("test_deep")
    METHODS.add(Greedy)
    with pytest.raises(Failed, match="expected it within 0.01"):
        check("test_deep:snapkv", "promise")


# --- how it is used ---------------------------------------------------------------------------------------------------

test_norms = conformance.tests(Norms)


def test_tests_are_one_for_each_check() -> None:
    (mark,) = test_norms.pytestmark
    assert list(mark.args[1]) == list(CHECKS)
    (mark,) = conformance.tests("quest").pytestmark
    assert "every" not in mark.args[1] and len(mark.args[1]) == len(CHECKS) - 1


def test_what_cannot_be_checked() -> None:
    for method, words in (("dense", "selects nothing"), ("qeust", "did you mean 'quest'"), ("quest:", "is missing")):
        with pytest.raises(UserError, match=words):
            Subject.of(method)
    with pytest.raises(UserError, match="check 'gpa' is unknown; did you mean 'gqa'"):
        list(conformance.run("quest", ["gpa"]))
    with pytest.raises(UserError, match="methods with a knob `every`, which quest lacks"):
        list(conformance.run("quest", ["every"]))


def test_a_method_of_the_same_name_is_there_again_afterwards() -> None:
    @dataclass(frozen=True)
    class Other(Norms):
        pass

    METHODS.add(Other)
    check(Norms, "counted")
    assert METHODS["test_norms"] is Other


def test_what_goes_wrong_inside_a_method_fails_its_check() -> None:
    @dataclass(frozen=True)
    class Failing(Norms):
        def score(self, call: Call) -> Tensor:
            raise KeyError("gone")

    (found,) = conformance.run(Failing, ["promise"])
    assert not found.passed and found.says == "KeyError: 'gone'"
    with pytest.raises(KeyError):
        check(Failing, "promise")


def test_memory_is_counted_while_it_is_held() -> None:
    from lm_eval_sparse.testing.memory import Held

    given, tracker = torch.randn(1000), Held()
    tracker.give(given)
    kept: list[Tensor] = []
    with tracker:
        one = given + 1
        two = one.repeat(10)
        view = two[:5]
        del two, one
        assert (tracker.now, tracker.peak) == (40_000, 44_000)
        given.mul_(2)
        kept.append(view.clone())
        del view
        assert (tracker.now, tracker.peak) == (20, 44_000)
        tracker.mark()
        assert tracker.peak == 20
    kept.clear()
    assert tracker.now == 0


def test_a_state_is_declared() -> None:
    """What a method has in its slots is not held against it."""

    @dataclass(frozen=True)
    class Kept(Tokens):
        name: ClassVar[str] = "test_kept"

        def slots(self) -> tuple[Slot, ...]:
            return Slot("first", "page", (-1,)), Slot("norm", "token"), Slot("sum", "sequence", (3,))

    assert check(Kept, "memory").endswith("a state of 8.0 bytes a token of a KV head")
