"""The window of last queries: tasks say it under `preset=paper`, results show it, and no prompt runs with less than
what was typed."""

from __future__ import annotations

import copy
import json
import pickle
import random
from dataclasses import replace
from typing import Any

import dill
import lm_eval
import pytest
import tiny
from frontier_common import TASKS, tokenizer
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager

from lm_eval_sparse import patches
from lm_eval_sparse.errors import UserError
from lm_eval_sparse.frontier.niah import Niah
from lm_eval_sparse.methods import METHODS, presets
from lm_eval_sparse.model.decoding import Decoding
from lm_eval_sparse.model.lm import SparseHFLM
from lm_eval_sparse.model.scoring import Scorer
from lm_eval_sparse.protocol import Prompt, SharedPrompt, window_of

patches.install()

WINDOWED = [name for name, cls in METHODS.items() if "window" in cls.knobs()]


@pytest.fixture
def source() -> random.Random:
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")
    return random.Random(seed)


def sparse(**options: Any) -> SparseHFLM:
    options = {"backend": "gather", "max_length": 2000, "dtype": "float32", **options}
    return SparseHFLM(pretrained=tiny.family("llama"), tokenizer=tiny.tiny_tokenizer(), **options)


def ask(lm: SparseHFLM, kind: str, prompts: list[str]) -> list[Any]:
    rest = {"loglikelihood": (" river stone",), "generate_until": ({"until": [], "max_gen_toks": 2},)}.get(kind, ())
    requests = [
        Instance(request_type=kind, doc={}, arguments=(prompt, *rest), idx=0, metadata=("t", 0, 1))
        for prompt in prompts
    ]
    return getattr(lm, kind)(requests, True)


# --- said by the task, taken by the model, shown by the results -----------------------------------------------------


@pytest.mark.parametrize("prompt", [Prompt("river", 512), Prompt("river"), SharedPrompt("river", 3, 512)])
def test_a_prompt_is_a_string_that_keeps_its_window(prompt: Prompt) -> None:
    copies = [copy.deepcopy(prompt), dill.loads(dill.dumps(prompt))]
    copies += [pickle.loads(pickle.dumps(prompt, protocol)) for protocol in range(pickle.HIGHEST_PROTOCOL + 1)]
    for made in copies:
        assert type(made) is type(prompt) and made == "river" and vars(made) == vars(prompt)
    assert json.dumps(prompt) == '"river"' and {prompt: 1} == {"river": 1}
    assert window_of("river") is None


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> None:
    """The paper's table as if it began at 4096 tokens."""
    for name, cell in (("vertical_slash", (90, 90)), ("flexprefill_vs", (0.5, 90)), ("snapkv", (400,))):
        own = METHODS[name].paper
        monkeypatch.setattr(METHODS[name], "paper", replace(own, rows={4096: (cell,) * len(own.budgets)}))


def test_two_tasks_of_a_run_have_their_own_windows(table, tmp_path, monkeypatch, source) -> None:
    """Generated and teacher-forced, batched, from cached requests and from a response cache."""
    from transformers import LlamaConfig, LlamaForCausalLM

    monkeypatch.setenv("LM_EVAL_SPARSE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("lm_eval.caching.cache.PATH", str(tmp_path / "requests"))
    tok = tokenizer("digits")
    config = LlamaConfig(
        vocab_size=len(tok), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=6000, eos_token_id=tok.eos_token_id,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    by_task = source.choice(("vertical_slash", "flexprefill_vs"))
    tasks = {"include_path": str(TASKS), "include_defaults": False, "metadata": {"samples": 1}}
    expected = {"frontier_niah_4k": 512, "frontier_vt_4k": 256, "forced_frontier_niah_4k": 512}

    def run() -> dict[str, Any]:
        lm = SparseHFLM(
            pretrained=model, tokenizer=tok, method=f"{by_task}+snapkv", sparsity=0.9, preset="paper",
            backend="gather", max_length=6000, batch_size=2,
        )  # fmt: skip
        results = lm_eval.simple_evaluate(
            model=lm, tasks=list(expected), task_manager=TaskManager(**tasks), bootstrap_iters=0,
            gen_kwargs="max_gen_toks=2", use_cache=str(tmp_path / "answers"), cache_requests=True,
            apply_chat_template=True,
        )  # fmt: skip
        return results["config"]["sparse"]

    first = run()
    assert first["window_from"] == {by_task: "task"}
    budget = {"vertical_slash": ["verticals", "slashes"], "flexprefill_vs": ["alpha", "min_budget"]}[by_task]
    assert first["budget_knobs"] == {by_task: budget, "snapkv": ["capacity"]}
    monkeypatch.setattr(Decoding, "_prefill", None)
    monkeypatch.setattr(Scorer, "score_context", None)
    for found in (first, run()):  # the second is answered by the cache
        for task, window in expected.items():
            shown = found["tasks"][task]["prefill"]["knobs_solved"]["window"]
            assert (shown["min"], shown["max"]) == (window, window), task
        assert found["phases"]["prefill"]["knobs_solved"]["window"]["min"] == 256
    assert first["tasks"]["frontier_niah_4k"]["eviction"]["knobs_solved"]["window"]["max"] == 256
    monkeypatch.setattr(Niah, "paper_window", 300)
    with pytest.raises(UserError, match="frontier_niah_4k that .* made with window=512, and the task says 300 now"):
        run()


@pytest.mark.parametrize("way", ["scored", "scored by tokens", "generated", "by transformers", "rolling"])
def test_every_way_of_running_a_prompt_takes_its_window(way: str, table, monkeypatch) -> None:
    monkeypatch.setattr(presets, "FILL", 0.01)
    lm = sparse(method="vertical_slash", sparsity=0.9, preset="paper")
    text = tiny.words(3, 150)
    for window in (40, None):  # by turns: what one prompt says is not the next one's
        prompt = Prompt(text, window)
        if way == "rolling":
            (found,) = ask(lm, "loglikelihood_rolling", [prompt])
        elif way == "scored by tokens":
            (found,) = lm._loglikelihood_tokens([((prompt, " river"), lm.tok_encode(text), lm.tok_encode(" river"))])
        elif way == "by transformers":
            arguments = (prompt, {"until": [], "max_gen_toks": 2, "num_beams": 2})
            request = Instance(request_type="generate_until", doc={}, arguments=arguments, idx=0, metadata=("t", 0, 1))
            (found,) = lm.generate_until([request], True)
        else:
            (found,) = ask(lm, "loglikelihood" if way == "scored" else "generate_until", [prompt])
        length = len(lm.tok_encode(text))
        # Without a task that says one it is 256, of which the prompt has no more than its length.
        assert found.stats["prefill"]["window"] in ({window} if window else {256, length, length + 1}), way


# --- a window that the prompt does not have -------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["loglikelihood", "generate_until", "loglikelihood_rolling"])
@pytest.mark.parametrize("name", WINDOWED)
def test_a_window_that_no_prompt_has_is_refused_before_any_compute(name: str, kind: str, monkeypatch) -> None:
    lm = sparse(method=name, sparsity=0.5, window=1000)
    prompts = [tiny.words(1, 40), tiny.words(2, 90)]
    few, many = (len(lm.tok_encode(prompt)) for prompt in prompts)
    monkeypatch.setattr(lm.model, "forward", lambda *args, **kwargs: pytest.fail("the model was run"))
    said = (
        rf"^window=1000 was typed, and no prompt has so many tokens \(the shortest {few}, the longest {many}\): leave "
    )
    with pytest.raises(UserError, match=said + f"window out for 256, or type window={many} or less"):
        ask(lm, kind, prompts)


@pytest.mark.parametrize("name", WINDOWED)
def test_a_prompt_shorter_than_the_typed_window_is_dense_and_counted(name: str) -> None:
    """Beside longer ones. A window that is not typed is cut to the prompt, which the results show."""
    prompts = [tiny.words(1, 40), tiny.words(2, 90)]
    lm = sparse(method=name, sparsity=0.5, **{f"{name}.window": 64})
    few, many = (len(lm.tok_encode(prompt)) for prompt in prompts)
    assert few < 64 <= many
    short, long = ask(lm, "loglikelihood", prompts)
    phase = METHODS[name].phase
    assert (short.stats[phase]["calls"], long.stats[phase]["calls"]) == ({"fallback": 2}, {"sparse": 2})
    report = lm.report()["phases"][phase]
    (reason,) = report["fallback_reasons"]
    assert reason == f"prompt of {few} tokens is shorter than {name}.window=64"
    assert report["knobs_solved"]["window"] == {"mean": 64, "min": 64, "max": 64}
    ask(lm, "loglikelihood", prompts[:1])  # when others ran there is nothing to refuse
    lm = sparse(method=name, sparsity=0.5)
    short, long = ask(lm, "generate_until", prompts)
    assert short.stats[phase]["calls"] == long.stats[phase]["calls"] == {"sparse": 2}
    used = lm.report()["phases"][phase]["knobs_solved"]["window"]
    assert (used["min"], used["max"]) == (few, many)


def test_other_ranks_may_have_longer_prompts(monkeypatch) -> None:
    import torch

    lm = sparse(method="snapkv", sparsity=0.5, window=64)
    monkeypatch.setattr(lm, "_world_size", 2)
    monkeypatch.setattr(lm, "all_gather", lambda mine: torch.cat([mine, torch.tensor([[-20, 70]])]))
    lm.lengths.check([30, 40])
    lm.lengths.check([])
    monkeypatch.setattr(lm, "all_gather", lambda mine: torch.cat([mine, torch.tensor([[-20, 50]])]))
    with pytest.raises(UserError, match="the shortest 20, the longest 50"):
        lm.lengths.check([30, 40])


@pytest.mark.parametrize("kind", ["loglikelihood", "generate_until"])
def test_a_promise_is_not_broken_for_a_typed_window(kind: str, monkeypatch) -> None:
    """From 4096 tokens on a shorter prompt is an error, not dense, although another prompt has the window."""
    model = tiny.family("llama", num_hidden_layers=1, max_position_embeddings=9000)
    lm = SparseHFLM(
        pretrained=model, tokenizer=tiny.tiny_tokenizer(), method="vertical_slash+ada_snapkv", sparsity=0.5,
        max_length=9000, **{"ada_snapkv.window": 5000},
    )  # fmt: skip
    prompts = [tiny.words(6, 8000), tiny.words(7, 4250)]
    many, few = (len(lm.tok_encode(prompt)) for prompt in prompts)
    assert 4096 <= few < 5000 <= many
    monkeypatch.setattr(lm.model, "forward", lambda *args, **kwargs: pytest.fail("the model was run"))
    with pytest.raises(
        UserError, match=f"^prompt of {few} tokens .*ada_snapkv.window=5000.*type ada_snapkv.window={few} "
    ):
        ask(lm, kind, prompts)
