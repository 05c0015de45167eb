"""The methods on SmolLM2: real queries and keys meet the promise, prompts of the paper's lengths its presets."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from lm_eval.api.instance import Instance
from torch import Tensor

from lm_eval_sparse import patches
from lm_eval_sparse.errors import UserError
from lm_eval_sparse.kernels.types import RaggedKV, causal_pairs
from lm_eval_sparse.methods import METHODS, EvictionMethod, PrefillMethod
from lm_eval_sparse.model.lm import SparseHFLM
from lm_eval_sparse.protocol import Prompt
from lm_eval_sparse.runtime.session import Runtime
from lm_eval_sparse.testing import Decoding, select

patches.install()

LENGTH = 4321
LAYERS = (0, 11, 29)


@pytest.fixture(scope="module")
def real_states() -> list[tuple[Tensor, Tensor]]:
    """Queries and keys of three layers of the embedded model on a text of 4321 tokens."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        lm = SparseHFLM(device="cpu")
        seen: dict[int, tuple[Tensor, Tensor]] = {}
        attend = Runtime.attend

        def noted(self: Runtime, module: Any, query: Tensor, key: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            if module.layer_idx in LAYERS:
                seen[module.layer_idx] = query[0], key[0]
            return attend(self, module, query, key, *args, **kwargs)

        patch.setattr(Runtime, "attend", noted)
        ids = torch.tensor([lm.tok_encode(tiny.words(1, 6000))[:LENGTH]])
        lm.forward(ids, cache=None, keep=1)
    return [seen[layer] for layer in LAYERS]


@pytest.mark.parametrize("sparsity", [0.8, 0.95])
@pytest.mark.parametrize("name", [name for name in METHODS if name != "dense"])
def test_promise_on_real_queries_and_keys(name: str, sparsity: float, real_states: list[tuple[Tensor, Tensor]]) -> None:
    cls = METHODS[name]
    method = cls(inner=METHODS["quest"]()) if cls.phase == "wrapper" else cls()
    for query, key in real_states:
        heads, length, dim = query.shape
        kv_heads = len(key)
        options: dict[str, Any] = {"scale": dim**-0.5, "softcap": None, "sparsity": sparsity}
        if isinstance(method, PrefillMethod):
            layout = select(method, query, key, **options)
            layout.check(heads)
            density = float(layout.executed_pairs().sum()) / (heads * causal_pairs(length))
        elif isinstance(method, EvictionMethod):
            selection = select(method, query, key, **options)
            selection.check(kv_heads, length)
            density = selection.total / (kv_heads * length)
        else:
            flat, starts = key.reshape(-1, dim), [head * length for head in range(kv_heads)]
            kv = RaggedKV.of(flat, flat, starts, [length] * kv_heads)
            steps = 40 if method.read_unit > 1 else 2  # pages are whole: over their places the mean is promised
            visible = (torch.arange(length - steps, length) + 1).expand(kv_heads, -1)
            context = Decoding(kv, torch.tensor([length]), kv_heads=kv_heads)
            grouped = query[:, -steps:].reshape(kv_heads, -1, steps, dim)
            pages = select(method, grouped, context, sparsity=sparsity)
            pages.check(kv)
            density = float(pages.keys_read(kv).float().mean(1).sum() / visible.sum())
        assert 1 - density == pytest.approx(sparsity, abs=0.01)


def request(kind: str, *args: Any) -> Instance:
    return Instance(request_type=kind, doc={}, arguments=args, idx=0, metadata=("t", 0, 1))


def test_a_preset_runs_at_its_lengths_and_at_no_others() -> None:
    """15,000 tokens are a prompt of 16K: the paper's Table 3, and the window that its task says."""
    model = tiny.family(
        "llama", num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1, max_position_embeddings=20000
    )  # fmt: skip
    lm = SparseHFLM(
        pretrained=model, tokenizer=tiny.tiny_tokenizer(), method="vertical_slash+snapkv+quest", preset="paper",
        sparsity=0.9, kv_sparsity=0.8, max_length=20000, dtype="float32",
    )  # fmt: skip
    prompt = lm.tok_decode((torch.arange(15000) * 7 % 300 + 20).tolist())
    while not 14746 <= len(lm.tok_encode(prompt)) <= 16384:
        prompt = prompt[: len(prompt) * 15500 // len(lm.tok_encode(prompt))]
    length = len(lm.tok_encode(prompt))
    asked = request("generate_until", Prompt(prompt, 512), {"until": [], "max_gen_toks": 4})
    (text,) = lm.generate_until([asked], True)
    solved = lm.report()["phases"]
    used = {knob: (value["min"], value["max"]) for knob, value in solved["prefill"]["knobs_solved"].items()}
    assert used == {"window": (512, 512), "verticals": (315, 315), "slashes": (315, 315), "sinks": (4, 4),
                    "near": (64, 64), "tile": (64, 64)}  # fmt: skip
    assert solved["eviction"]["knobs_solved"]["capacity"] == {"mean": 3276, "min": 3276, "max": 3276}
    assert solved["eviction"]["executed_sparsity"] == pytest.approx(1 - 3276 / length)
    read = solved["decode"]["knobs_solved"]["budget"]
    assert 1632 < read["min"] <= read["max"] <= 1632 + 16
    assert text.stats["sparsities"]["kv_sparsity"] == solved["eviction"]["executed_sparsity"]
    short = " ".join(["river"] * 100)
    with pytest.raises(UserError, match="no parameters of vertical_slash for a prompt of .* tokens .*14746-16384"):
        lm.loglikelihood([request("loglikelihood", short, " stone cloud")], True)
