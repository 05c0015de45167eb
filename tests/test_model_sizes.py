"""What results say of a model's sizes and of the length of its prompts, which costs follow from."""

from __future__ import annotations

import json
import random
from types import SimpleNamespace

import pytest
import tiny
from small_lms import PAIRS, PROMPTS, generate, request, score, sparse

from lm_eval_sparse.analysis import cost
from lm_eval_sparse.model.kept_counts import packed, unpacked
from lm_eval_sparse.results.schema import Shape
from lm_eval_sparse.runtime.accounting import Ledger, RowCounts

#: layers, attention layers, hidden, query heads, KV heads, head dim, value dim, mlp, vocab, window, experts
EXPECTED = {
    "llama": (2, 2, 64, 4, 2, 16, 16, 96, 384, None, 0),
    "phi3": (2, 2, 64, 4, 2, 16, 16, 96, 384, None, 0),
    "gemma3": (3, 1, 64, 4, 2, 16, 16, 96, 384, 24, 0),
    # Experts: one of two is chosen; in the hybrid a shared one runs as well, and three layers are no attention.
    "gpt_oss": (2, 1, 64, 4, 2, 16, 16, 96, 384, 24, 2),
    "qwen3_next": (4, 1, 64, 4, 2, 16, 16, 32 + 32, 384, None, 2),
    "deepseek_v3": (2, 2, 64, 4, 4, 16, 16, 96, 384, None, 0),
    # No gated MLP, which is what the formulas are of.
    "gpt2": (2, 2, 64, 4, 4, 16, 16, None, 384, None, None),
}


@pytest.mark.parametrize("family", EXPECTED)
def test_sizes_of_models(family: str) -> None:
    lm = sparse(tiny.family(family))
    found = lm.report()["model"]
    assert tuple(Shape(**found).model_dump().values()) == EXPECTED[family]
    assert list(found) == list(Shape.model_fields)


def test_latent_attention_with_experts_after_the_first_layer() -> None:
    """Values of another dimension than keys; the MLP's width is the mean over layers."""
    options = {"first_k_dense_replace": 1, "n_shared_experts": 1, "v_head_dim": 24, "moe_intermediate_size": 40}
    lm = sparse(tiny.family("deepseek_v3", **options))
    found = lm.report()["model"]
    assert (found["head_dim"], found["value_dim"]) == (16, 24)
    assert (found["mlp"], found["experts"]) == ((96 + 2 * 40 + 40) / 2, 4)


def test_weights_are_those_of_the_model_itself() -> None:
    """A step reads every matrix but the embedding: what the formula gives for sizes that were read is what there is."""
    for family in ("llama", "gemma3", "mistral"):
        model = tiny.family(family, tie_word_embeddings=False)
        matrices = sum(p.numel() for name, p in model.named_parameters() if p.dim() == 2 and "embed_tokens" not in name)
        shape = Shape(**sparse(model).report()["model"])
        assert shape.attention_layers == {"mistral": 0}.get(family, shape.attention_layers)
        if shape.attention_layers:
            record = SimpleNamespace(
                model="m", model_shape=shape, model_dtype="float32", task="t", phases="", prompt_tokens=100.0,
                by_phase={}, speed={}, seconds_by_phase={},
            )  # fmt: skip
            assert cost.of(record).decode.weights == matrices


def test_modelling_code_that_raises_ends_no_run() -> None:
    lm = sparse(tiny.family("llama"))

    def raises() -> None:
        raise NotImplementedError

    lm.model.get_output_embeddings = raises
    assert set(lm.report()["model"].values()) == {None} and set(lm.report()["model"]) == set(Shape.model_fields)


def test_lengths_add_up_and_survive_the_log() -> None:
    """Over processes, and where a run goes on; answers from before lengths were kept have none."""
    rows = random.Random().choices(range(1, 10_000), k=7)
    whole, parts = Ledger(), Ledger()
    for tokens in (*rows, 0):
        one = Ledger()
        one.add(RowCounts(tokens=tokens))
        log = json.loads(json.dumps(packed(one)))
        assert unpacked(log, Ledger(), diagnosed=False).lengths == one.lengths
        parts.merge(one)
        whole.add(RowCounts(tokens=tokens))
    log.pop("tokens", None)
    assert unpacked(log, Ledger(), diagnosed=False).prompts() == {"number": 0, "tokens": None}
    tokens = {"mean": sum(rows) / 7, "min": min(rows), "max": max(rows)}
    assert whole.prompts() == parts.prompts() == {"number": 7, "tokens": tokens} and whole.rows == 8


def test_tokens_of_prompts() -> None:
    """Each prompt once, by task; of rolling windows nothing says where a prompt ends."""
    lm = sparse(tiny.family("llama"), method="quest", budget=16, page_size=8)
    score(lm, PAIRS[:8], task="scored")
    generate(lm, PROMPTS)
    lm.loglikelihood_rolling([request("loglikelihood_rolling", PROMPTS[0], task="rolling")], disable_tqdm=True)
    tasks = lm.report()["tasks"]
    lengths = [len(lm.tok_encode(prompt)) for prompt in PROMPTS]
    expected = {"mean": sum(lengths[:2]) / 2, "min": min(lengths[:2]), "max": max(lengths[:2])}
    assert tasks["scored"]["prompts"] == {"number": 2, "tokens": expected}
    expected = {"mean": sum(lengths) / len(lengths), "min": min(lengths), "max": max(lengths)}
    assert tasks["t"]["prompts"] == {"number": len(lengths), "tokens": expected}
    assert tasks["rolling"]["prompts"] == {"number": 0, "tokens": None}
