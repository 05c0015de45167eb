"""`peft=` and `delta=` that fit: the model evaluated is the one with the weights added, by independent arithmetic."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import tiny
from lm_eval.api.instance import Instance
from transformers import AutoModelForCausalLM

from lm_eval_sparse.model.lm import SparseHFLM

#: lm-eval cuts the embeddings to the tokenizer's size under an adapter; a model of that size keeps them.
SIZE = {"vocab_size": len(tiny.tiny_tokenizer())}
FLEX: dict[str, Any] = {"method": "flexprefill", "gamma": 0.5, "min_budget": 0, "block_size": 16, "backend": "gather"}


def answers(**args: Any) -> tuple[list[tuple[float, bool]], list[str], SparseHFLM]:
    lm = SparseHFLM(device="cpu", **args)
    pair, prompt = (tiny.words(1, 110), " river stone"), tiny.words(2, 120)
    scored = lm.loglikelihood([Instance("loglikelihood", {}, pair, 0)], disable_tqdm=True)
    kwargs = {"until": ["\n\n"], "max_gen_toks": 6}
    told = lm.generate_until([Instance("generate_until", {}, (prompt, kwargs), 0)], disable_tqdm=True)
    return [tuple(one) for one in scored], [str(text) for text in told], lm


def assert_alike(left: Any, right: Any) -> None:
    assert left[0][0][0] == pytest.approx(right[0][0][0], abs=1e-4)
    assert left[0][0][1] == right[0][0][1] and left[1] == right[1]


@pytest.mark.parametrize("task_type", ["CAUSAL_LM", None])
@pytest.mark.parametrize("method", [{}, FLEX])
def test_an_adapter_is_the_merged_model(tmp_path: Path, method: dict[str, Any], task_type: str | None) -> None:
    base = tiny.tiny_llama(tmp_path / "base", **SIZE)
    adapter = tiny.lora(base, tmp_path / "adapter", task_type=task_type)
    merged = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).merge_and_unload()
    tiny.save(merged, tmp_path / "merged")
    got = answers(pretrained=str(base), peft=str(adapter), **method)
    assert_alike(got, answers(pretrained=str(tmp_path / "merged"), **method))
    plain = answers(pretrained=str(base), **method)
    assert abs(plain[0][0][0] - got[0][0][0]) > 0.01  # the adapter is felt
    # peft's wrapper would hide from us what the model takes, and transformers would have to decode.
    assert got[2].decoding.get()[1] is None


def test_an_adapter_with_embeddings_saved_along(tmp_path: Path) -> None:
    base = tiny.tiny_llama(tmp_path / "base", **SIZE)
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), peft.LoraConfig(task_type="CAUSAL_LM"))
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    SparseHFLM(device="cpu", pretrained=str(base), peft=str(tmp_path / "adapter"))


def test_a_delta_is_added(tmp_path: Path) -> None:
    base, delta = tiny.tiny_llama(tmp_path / "base", seed=0), tiny.tiny_llama(tmp_path / "delta", seed=1)
    models = [AutoModelForCausalLM.from_pretrained(folder) for folder in (base, delta)]
    for ours, theirs in zip(*(model.parameters() for model in models), strict=True):
        ours.data.add_(theirs.data)
    tiny.save(models[0], tmp_path / "sum")
    got = answers(pretrained=str(base), delta=str(delta))
    assert_alike(got, answers(pretrained=str(tmp_path / "sum")))


def test_home_in_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = tiny.tiny_llama(tmp_path / "base", **SIZE)
    tiny.lora(base, tmp_path / "adapter")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert SparseHFLM(device="cpu", pretrained="~/base", peft="~/adapter").peft == str(tmp_path / "adapter")
