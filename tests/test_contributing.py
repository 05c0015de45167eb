"""The examples of CONTRIBUTING.md are methods that work: each is imported as a file of its own, and evaluated."""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from fresh_venv import ROOT
from lm_eval.api.instance import Instance

from lm_eval_sparse.errors import UserError
from lm_eval_sparse.methods import METHODS, Method
from lm_eval_sparse.model.lm import SparseHFLM

PAGE = (ROOT / "CONTRIBUTING.md").read_text()
BLOCKS = re.findall(r"^( *)```python\n(.*?)^\1```$", PAGE, re.MULTILINE | re.DOTALL)
EXAMPLES = {re.search(r"^class (\w+)", text, re.MULTILINE).group(1): text for _, text in BLOCKS}

#: How near the measured sparsity must come with some 600 tokens: blocks and pages are coarse there.
NEAR = {"prefill": 0.05, "eviction": 0.002, "decode": 0.02}


@contextmanager
def known(text: str, folder: Path) -> Iterator[type[Method]]:
    """The one method that `text` defines, as a module of its own, in the registry."""
    path = folder / "a_method.py"
    path.write_text(text)
    spec = importlib.util.spec_from_file_location("a_method", path)
    sys.modules[spec.name] = module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        (cls,) = (
            found
            for found in vars(module).values()
            if isinstance(found, type) and issubclass(found, Method) and found.__module__ == spec.name
        )
        assert cls.name not in METHODS
        METHODS.add(cls)
        try:
            yield cls
        finally:
            METHODS.discard(cls.name)
        assert cls.name not in METHODS
    finally:
        del sys.modules[spec.name]


def request(kind: str, *args: Any) -> Instance:
    return Instance(kind, {"doc": 0}, args, 0, ("task", 0, 1))


def typed(cls: type[Method]) -> tuple[str, str, dict[str, Any]]:
    """What `method=` has to be, its phase, and knobs that make it sparse; a wrapper goes around a method of ours."""
    wraps = getattr(cls, "wraps", None)
    if wraps is None:
        return cls.name, cls.phase, dict(cls.tiny)
    inside = next(found for found in METHODS.values() if found.phase in wraps and found is not cls)
    return f"{cls.name}:{inside.name}", inside.phase, {**inside.tiny, **cls.tiny}


def measured(cls: type[Method], words: int, **options: Any) -> tuple[dict[str, Any], list[Any], list[str]]:
    """What is reported of the method's phase, scores and answers, on a tiny model and prompts of `words` words."""
    name, phase, _ = typed(cls)
    lm = SparseHFLM(
        pretrained=tiny.family("llama"), tokenizer=tiny.tiny_tokenizer(), method=name, backend="gather", **options
    )
    prompts = [tiny.words(seed, words + 7 * seed) for seed in range(3)]
    pairs = [(prompt, " " + tiny.words(9, 12)) for prompt in prompts]
    scores = lm.loglikelihood([request("loglikelihood", *pair) for pair in pairs], disable_tqdm=True)
    asked = {"until": [], "max_gen_toks": 12}
    answers = lm.generate_until([request("generate_until", prompt, asked) for prompt in prompts], disable_tqdm=True)
    return lm.report()["phases"][phase], scores, answers


def works(text: str, folder: Path) -> None:
    """Raise whatever is wrong with an example."""
    with known(text, folder) as cls:
        # The row of the tests: sparse at 200 tokens.
        _, phase, knobs = typed(cls)
        figures, _, _ = measured(cls, 200, **knobs)
        assert figures["calls"]["sparse"] and not figures["calls"]["fallback"]
        assert figures["executed_sparsity"] > 0.1
        # A requested sparsity is met, and the method's own tokens are chosen: dense attention scores otherwise.
        decided = {name for found in METHODS.values() if found.phase == phase for name in found.budget_knobs}
        shape = {name: value for name, value in knobs.items() if name not in decided}
        figures, scores, answers = measured(cls, 600, sparsity=0.6, **shape)
        assert figures["calls"]["sparse"] and not figures["calls"]["fallback"]
        assert figures["executed_sparsity"] == pytest.approx(0.6, abs=NEAR[phase])
        dense, dense_scores, _ = measured(cls, 600, sparsity=0)
        assert not dense["calls"]["sparse"] and scores != dense_scores
        # The same prompts side by side.
        together, scores_together, answers_together = measured(cls, 600, sparsity=0.6, batch_size=3, **shape)
        assert (scores_together, answers_together) == (scores, answers)
        assert together["executed_sparsity"] == pytest.approx(figures["executed_sparsity"], abs=1e-12)


def test_there_are_examples_of_every_kind() -> None:
    """Guards the test itself."""
    assert PAGE.count("```python") == len(BLOCKS) == len(EXAMPLES)
    bases = {re.search(rf"class {name}\((\w+)\)", text).group(1) for name, text in EXAMPLES.items()}
    assert {"ScoredPrefill", "ScoredEviction", "ScoredDecode", "PrefillMethod", "Wrapper"} <= bases
    assert all(" from ." not in text and "\nfrom ." not in text for text in EXAMPLES.values())


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_works(name: str, tmp_path: Path) -> None:
    works(EXAMPLES[name], tmp_path)


#: Example, what is broken in it, how, and how that shows.
BROKEN = {
    "an import": ("SmallKeys", "import Call,", "import Calls,", ImportError),
    "a typing error": ("SmallKeys", "call.key.float()", "call.keys.float()", UserError),
    "no score": ("SmallKeys", "def score", "def scores", ValueError),
    "keys of the future": ("SinkWindow", "(behind >= 0) & (", "(", UserError),
    "another budget": ("SinkWindow", "row_budgets(length, 16, share, 2)", "row_budgets(length, 16, 0.6, 2)",
                       AssertionError),
    "not sparse": ("Antidiagonal", '{"threshold": 0.5,', '{"threshold": 1,', AssertionError),
    "no state": ("MeanKeys", 'return (Slot("mean", "page", (-1,), derived=True),)', "return ()", Exception),
}  # fmt: skip


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_example_fails(what: str, tmp_path: Path) -> None:
    name, right, wrong, error = BROKEN[what]
    assert EXAMPLES[name].count(right) >= 1
    before = set(METHODS)
    with pytest.raises(error):
        works(EXAMPLES[name].replace(right, wrong), tmp_path)
    assert set(METHODS) == before


@torch.no_grad()
def test_what_the_examples_choose(tmp_path: Path) -> None:
    """Scores as they are meant, worked out by loops."""
    from lm_eval_sparse.testing import call_of, select

    generator = torch.Generator().manual_seed(torch.seed() % 2**31)
    query, key = torch.randn(4, 203, 16, generator=generator), torch.randn(2, 203, 16, generator=generator)
    with known(EXAMPLES["SmallKeys"], tmp_path) as cls:
        kept = select(cls(capacity=50), query, key)
        for head in range(2):
            order = sorted(range(203), key=lambda token: float(key[head, token].norm()))
            assert kept.ids[head, :50].tolist() == sorted(order[:50])
    with known(EXAMPLES["Antidiagonal"], tmp_path) as cls:
        method, call = call_of(cls(block_size=16), query, key, scale=0.25)
        found = method.score(call)
        for head in range(4):
            groups = torch.zeros(26, 26)
            for row in range(26):
                for column in range(26):
                    for step in range(8):
                        q, k = row * 8 + 7 - step, column * 8 + step
                        if q < 203 and k < 203:
                            groups[row, column] += query[head, q] @ key[head // 2, k] * 0.25 / 8
            mass = groups.masked_fill(torch.ones(26, 26).triu(1).bool(), -torch.inf).softmax(-1)
            expected = mass.reshape(13, 2, 13, 2).sum((1, 3))
            torch.testing.assert_close(found[head], expected, atol=1e-5, rtol=1e-4)
