"""The tasks inside lm-eval: names, groups, whole evaluations with stand-ins and with a tiny model of type `hf`."""

from __future__ import annotations

import json

import lm_eval
import pytest
from frontier_common import TASKS, StandIn, tokenizer
from lm_eval.tasks import TaskManager

from lm_eval_sparse import frontier, patches, protocol
from lm_eval_sparse.errors import UserError
from lm_eval_sparse.protocol import MeasuredText, set_active_lm

LENGTHS = {"4k": 4096, "8k": 8192, "16k": 16384, "32k": 32768, "64k": 65536, "128k": 128000}
NAMES = list(frontier.RECIPES)
#: The paper's groups of tasks (its second version): single and multiple questions, high scope, high dispersion.
KINDS = {
    "qa": {"squad", "quality", "toefl"},
    "retrieval": {"niah", "story_retrieval"},
    "high-scope": {"cwe", "story_filtering"},
    "high-dispersion": {"vt", "story_multihop"},
}
METRICS = {
    **dict.fromkeys(("niah", "story_retrieval"), "acc"),
    **dict.fromkeys(("vt", "cwe", "story_filtering"), "iou"),
    **dict.fromkeys(("quality", "toefl", "story_multihop"), "exact_match"),
    "squad": "f1",
}
LEAVES = {f"frontier_{name}_{length}" for name in NAMES for length in LENGTHS}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LM_EVAL_SPARSE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(protocol, "_active", None)


def manager(**metadata) -> TaskManager:
    return TaskManager(include_path=str(TASKS), include_defaults=False, metadata=metadata)


def evaluate(lm, tasks, *, metadata=None, **kwargs):
    if isinstance(lm, StandIn):
        set_active_lm(lm)
    options = {"limit": 2, "bootstrap_iters": 0, "device": "cpu", **kwargs}
    return lm_eval.simple_evaluate(model=lm, tasks=tasks, task_manager=manager(**(metadata or {})), **options)


# --------------------------------------------------------------------------------------------------------------- names


def test_names():
    names = manager()
    assert set(names.all_subtasks) == LEAVES | {f"forced_{leaf}" for leaf in LEAVES}
    assert set(names.all_groups) == {"frontier", "forced_frontier"}
    assert set(names.match_tasks(["frontier_*"])) == LEAVES
    assert set(names.match_tasks(["frontier_*_4k"])) == {leaf for leaf in LEAVES if leaf.endswith("_4k")}
    assert set(names.match_tasks(["forced_frontier_*"])) == {f"forced_{leaf}" for leaf in LEAVES}
    assert all("_" not in tag for tag in names.all_tags)
    listed = names.list_all_tasks()
    assert all(leaf in listed for leaf in LEAVES) and "generate_until" in listed and "loglikelihood" in listed


def test_every_leaf_is_what_its_name_says():
    for name, task in manager().load(sorted(LEAVES | {f"forced_{leaf}" for leaf in LEAVES}))["tasks"].items():
        kind, _, length = name.removeprefix("forced_").removeprefix("frontier_").rpartition("_")
        assert (task.recipe.name, task.length) == (kind, LENGTHS[length])
        assert task.forced == name.startswith("forced_") == (task.OUTPUT_TYPE == "loglikelihood")
        assert task.config.num_fewshot == 0 and len(task.eval_docs) == 100


def test_groups_and_tags_hold_their_leaves():
    names = manager()
    for prefix in ("", "forced_"):
        every = {prefix + leaf for leaf in LEAVES}
        assert set(names.load([f"{prefix}frontier"])["tasks"]) == every
        tag = f"{prefix}frontier".replace("_", "-")
        for length in LENGTHS:
            assert set(names.load([f"{tag}-{length}"])["tasks"]) == {x for x in every if x.endswith(f"_{length}")}
        for name in NAMES:
            named = names.load([f"{tag}-{name.replace('_', '-')}"])["tasks"]
            assert set(named) == {f"{prefix}frontier_{name}_{length}" for length in LENGTHS}
        for kind, members in KINDS.items():
            expected = {f"{prefix}frontier_{name}_{length}" for name in members for length in LENGTHS}
            assert set(names.load([f"{tag}-{kind}"])["tasks"]) == expected


def test_a_glob_and_the_group_do_not_collide():
    names = manager()
    assert set(names.load(names.match_tasks(["frontier_*"]))["tasks"]) == LEAVES


def test_unknown_recipes_and_shots_are_refused():
    with pytest.raises(UserError, match="did you mean 'niah'"):
        frontier.recipe("niha")
    with pytest.raises(UserError, match="num_fewshot=3"):
        manager().load([{"task": "frontier_niah_4k", "num_fewshot": 3, **_config("frontier_niah_4k")}])


def _config(name):
    return {"class": manager().load([name])["tasks"][name].__class__}


# --------------------------------------------------------------------------------------------------------- evaluations


def gold(request):
    return f"<explanation>Looked.</explanation><answer>\n{request.doc['target']}\n</answer>"


def test_generated_gold_scores_one_without_a_sparsity_row():
    results = evaluate(StandIn(answer=gold), ["frontier_niah_4k"])
    row = results["results"]["frontier_niah_4k"]
    assert row["acc,none"] == 1.0 and row["sample_len"] == 2
    assert not [key for key in row if key.startswith("sparsity")]
    assert results["versions"]["frontier_niah_4k"] == 2
    assert results["n-samples"]["frontier_niah_4k"] == {"original": 100, "effective": 2}
    assert results["configs"]["frontier_niah_4k"]["metadata"]["prompt_tokens"] == 4096


def test_measured_sparsity_is_logged_per_sample_and_averaged():
    figures = iter([0.25, 0.75])
    lm = StandIn(answer=lambda request: MeasuredText(gold(request), {"sparsity": next(figures)}))
    results = evaluate(lm, ["frontier_niah_4k"])
    assert results["results"]["frontier_niah_4k"]["sparsity,none"] == 0.5
    assert [sample["sparsity"] for sample in results["samples"]["frontier_niah_4k"]] == [0.25, 0.75]
    assert results["higher_is_better"]["frontier_niah_4k"]["sparsity"] is True
    json.dumps(results, default=str)


def test_the_twin_with_an_oracle_and_at_random():
    for hit in (True, False):
        lm = StandIn(answer=lambda request, hit=hit: (0.0, True) if hit else (-35 * 8.0, False))
        row = evaluate(lm, ["forced_frontier_niah_4k"])["results"]["forced_frontier_niah_4k"]
        assert row["exact,none"] == float(hit)
        assert (row["bits_per_char,none"] == 0.0) if hit else (row["bits_per_char,none"] > 8)
        assert [(r.doc_id, r.idx) for r in lm.seen] == [(d, s) for d in range(2) for s in range(4)]


def test_gen_kwargs_reach_the_requests_and_the_lengths():
    lm = StandIn(max_length=4100, answer=lambda _: "")
    evaluate(lm, ["frontier_niah_4k"], gen_kwargs="max_gen_toks=10")
    assert [(request.args[1]["max_gen_toks"], lm.tokens(request.args[0])) for request in lm.seen] == [(10, 4090)] * 2


def test_samples_select_documents():
    lm = StandIn(answer=gold)
    results = evaluate(lm, ["frontier_niah_4k"], limit=None, samples={"frontier_niah_4k": [9, 2]})
    logged = results["samples"]["frontier_niah_4k"]
    assert [(sample["doc_id"], sample["doc"]["index"]) for sample in logged] == [(9, 9), (2, 2)]
    assert results["results"]["frontier_niah_4k"]["acc,none"] == 1.0


def test_predict_only():
    for name, answer in (("frontier_niah_4k", gold), ("forced_frontier_niah_4k", lambda _: (-1.0, True))):
        results = evaluate(StandIn(answer=answer), [name], predict_only=True)
        assert results["results"][name]["bypass,none"] == 999
        assert len(results["samples"][name]) == 2 and not [k for k in results["results"][name] if k.startswith("acc")]


def test_cached_requests_never_come_from_another_prompt(tmp_path, monkeypatch):
    monkeypatch.setattr("lm_eval.caching.cache.PATH", str(tmp_path / "requests"))
    few = {"samples": 4}  # with cached requests lm-eval makes all documents of a leaf

    def prompts(lm, name="frontier_niah_4k", metadata=few, **kwargs):
        lm.seen.clear()
        evaluate(lm, [name], metadata=metadata, cache_requests=True, **kwargs)
        return [request.args for request in lm.seen]

    lm = StandIn(answer=gold)
    first = prompts(lm)
    assert len(first) == 2 and prompts(lm) == first
    assert [p.window for p, _ in prompts(lm)] == [512] * 2  # under `preset=paper`
    assert len(list((tmp_path / "requests").iterdir())) == 1
    with monkeypatch.context() as patch:
        patch.setattr(frontier.niah.Niah, "paper_window", 300)
        assert [p.window for p, _ in prompts(lm)] == [300] * 2
    assert [lm.tokens(p) for p, _ in prompts(lm, limit=3)] == [4096] * 3
    assert prompts(lm, gen_kwargs="max_gen_toks=5")[0][1]["max_gen_toks"] == 5
    assert prompts(lm, metadata={"samples": 4, "seed": 3}) != first
    assert [p for p, _ in prompts(lm, limit=None, samples={"frontier_niah_4k": [1]})] == [first[1][0]]
    shorter = StandIn(max_length=4200, answer=gold)
    asked = prompts(shorter)
    assert [shorter.tokens(p) + options["max_gen_toks"] for p, options in asked] == [4200] * 2
    assert [p for p, _ in asked] != [p for p, _ in first]
    assert len(prompts(StandIn(answer=lambda _: (0.0, True)), "forced_frontier_niah_4k")) == 8


def test_leaves_a_model_cannot_take_are_listed_not_scored():
    lm = StandIn(max_length=9000, answer=gold)
    results = evaluate(lm, ["frontier"])
    without_data = {leaf for leaf in LEAVES if leaf.split("_")[1] in KINDS["qa"]}
    expected = {leaf for leaf in LEAVES if leaf.endswith(("_4k", "_8k"))} - without_data
    ran = {name for name, row in results["results"].items() if any("," in key for key in row)} - {"frontier"}
    assert ran == expected
    for name in ran:
        metric = METRICS[name.removeprefix("frontier_").rpartition("_")[0]]
        assert results["results"][name][f"{metric},none"] == 1.0
    averages = {key: value for key, value in results["groups"]["frontier"].items() if key.endswith(",none")}
    averages = {key: value for key, value in averages.items() if "stderr" not in key}
    assert averages == {"acc,none": 1.0, "iou,none": 1.0, "exact_match,none": 1.0}  # not 2/6: no zeros for the absent
    for name in LEAVES - ran:
        why = "into a folder" if name in without_data else "the model takes 9000"
        assert why in results["configs"][name]["metadata"]["skipped"]
        assert results["n-samples"][name] == {"original": 100, "effective": 0}
        assert not [key for key in results["results"][name] if "," in key]
    tiny = [request for request in lm.seen if request.task_name not in ran]
    assert len(tiny) == len(LEAVES - ran) and all(len(request.args[0]) < 100 for request in tiny)
    table, _, below = lm_eval.utils.make_table(results).partition("Not run: ")
    assert "frontier_niah_8k" in table and "frontier_niah_16k" not in table
    assert "needs 14746 to 16384 prompt tokens" in below and all(name in below for name in LEAVES - ran)
    json.dumps(results, default=str)


def test_a_model_too_short_for_all_of_them_still_ends_well():
    results = evaluate(StandIn(max_length=1000, answer=lambda _: (0.0, True)), ["forced_frontier"])
    assert not [key for row in results["results"].values() for key in row if "," in key]
    assert all(results["configs"][f"forced_{leaf}"]["metadata"]["skipped"] for leaf in LEAVES)
    lm_eval.utils.make_table(results)


def test_every_rank_reports_the_same_metrics():
    """lm-eval gathers rank 0's metric keys from all ranks: a rank without them would be a KeyError."""
    for max_length, expected in ((100_000, {"acc"}), (1000, set())):
        lm = StandIn(max_length=max_length, answer=gold)
        set_active_lm(lm)
        for rank in range(2):
            task = manager().load(["frontier_niah_4k"])["tasks"]["frontier_niah_4k"]
            task.build_all_requests(limit=2, rank=rank, world_size=2)
            (doc,) = [doc for _, doc in task.doc_iterator(rank=rank, limit=2, world_size=2)]
            assert set(task.process_results(doc, [lm.answer(task.instances[0])])) == expected


# ---------------------------------------------------------------------------------------------------- model type `hf`


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("model")
    tok = tokenizer("digits")
    config = LlamaConfig(
        vocab_size=len(tok), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=8000, bos_token_id=tok.bos_token_id,
        eos_token_id=tok.eos_token_id, pad_token_id=tok.pad_token_id,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tok.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("chat", [False, True])
def test_hf_from_the_model_arguments_alone(tiny, chat):
    results = evaluate(
        "hf", ["frontier_niah_4k", "forced_frontier_niah_4k", "frontier_niah_8k"], model_args={"pretrained": tiny},
        metadata={"pretrained": tiny}, limit=1, apply_chat_template=chat, gen_kwargs="max_gen_toks=4",
    )  # fmt: skip
    rows = results["results"]
    assert rows["frontier_niah_4k"]["acc,none"] == 0.0
    assert rows["forced_frontier_niah_4k"]["exact,none"] == 0.0
    assert rows["forced_frontier_niah_4k"]["bits_per_char,none"] > 3  # log2(36) is 5.2
    assert "acc,none" in rows["frontier_niah_8k"]  # 7996 tokens
    assert results["configs"]["frontier_niah_8k"]["metadata"]["prompt_tokens"] == 7996
    assert not [key for row in rows.values() for key in row if key.startswith("sparsity")]
    prompt = results["samples"]["frontier_niah_4k"][0]["arguments"][0][0]
    assert prompt.startswith("<|im_start|>user") == chat
    assert len(tokenizer("digits").encode(prompt)) == 4096


@pytest.mark.parametrize("task", ["vt", "cwe", "story_retrieval", "story_multihop", "story_filtering"])
def test_twins_give_the_same_scores_on_hf_and_on_ours(tiny, task):
    """`hf` reads the prompt once per request, ours once per document and tokenizes it in parts."""
    leaf, rows = f"forced_frontier_{task}_4k", []
    for model in ("hf", "sparse-hf"):
        arguments = {"pretrained": tiny, "dtype": "float32"}
        results = evaluate(model, [leaf], model_args=arguments, metadata=arguments, limit=1)
        (sample,) = results["samples"][leaf]
        rows.append([float(response[0][0]) for response in sample["resps"]])
        assert results["n-samples"][leaf]["effective"] == 1
    assert rows[0] == pytest.approx(rows[1], rel=1e-4) and len(rows[0]) > 0


def test_hf_too_short_is_skipped_without_a_template_too(tiny):
    results = evaluate(
        "hf", ["frontier_niah_4k", "forced_frontier_niah_4k"], model_args={"pretrained": tiny, "max_length": 2048},
        metadata={"pretrained": tiny, "max_length": 2048}, limit=1,
    )  # fmt: skip
    for name in ("frontier_niah_4k", "forced_frontier_niah_4k"):
        assert "the model takes 2048" in results["configs"][name]["metadata"]["skipped"]


def test_a_model_object_needs_the_tokenizer_named(tiny):
    lm = StandIn(answer=gold)
    with pytest.raises(UserError, match="tokenizer"):
        lm_eval.simple_evaluate(model=lm, tasks=["frontier_niah_4k"], task_manager=manager(), limit=1)
    results = lm_eval.simple_evaluate(
        model=lm, tasks=["frontier_niah_4k"], task_manager=manager(tokenizer=tiny), limit=1, bootstrap_iters=0
    )
    assert results["results"]["frontier_niah_4k"]["acc,none"] == 1.0


def test_a_twin_that_is_insensitive_in_a_phase_stays_out_of_means():
    """In every run, so that means of dense and sparse runs are over the same twins."""
    patches.install()
    lm = StandIn(max_length=4700, answer=lambda request: (-float(len(request.args[1])), False))
    results = evaluate(lm, ["forced_frontier"], limit=1, metadata={"samples": 1})
    own = {name: row["average_precision,none"] for name, row in results["results"].items()
           if "average_precision,none" in row and name != "forced_frontier"}  # fmt: skip
    assert {name.removeprefix("forced_frontier_") for name in own} == {"vt_4k", "cwe_4k", "story_filtering_4k"}
    kept = [value for name, value in own.items() if "cwe" not in name]
    assert results["groups"]["forced_frontier"]["average_precision,none"] == pytest.approx(sum(kept) / 2)
    assert own["forced_frontier_cwe_4k"] not in kept
    assert results["configs"]["forced_frontier_cwe_4k"]["metadata"]["insensitive"] == ["prefill"]
    table = lm_eval.utils.make_table(results)
    assert "Not in the means of forced_frontier: forced_frontier_cwe_4k (insensitive in prefill)\n" in table
    assert table.count("Not in the means") == 1


def test_groups_of_groups_name_what_their_means_leave_out(tmp_path):
    patches.install()
    rows = "aggregate_metric_list: [{metric: average_precision, aggregation: mean, weight_by_size: false}]\n"
    leaves = "[forced_frontier_vt_4k, forced_frontier_cwe_4k]"
    (tmp_path / "inner.yaml").write_text(f"group: inner\ntask: {leaves}\n{rows}")
    (tmp_path / "outer.yaml").write_text(f"group: outer\ntask: [inner]\n{rows}")
    (tmp_path / "alone.yaml").write_text(f"group: alone\ntask: [forced_frontier_cwe_8k]\n{rows}")
    lm = StandIn(answer=lambda request: (-float(len(request.args[1])), False))
    set_active_lm(lm)
    names = TaskManager(include_path=[str(TASKS), str(tmp_path)], include_defaults=False, metadata={"samples": 1})
    results = lm_eval.simple_evaluate(
        model=lm, tasks=["outer", "alone"], task_manager=names, limit=1, bootstrap_iters=0, device="cpu"
    )
    own = {name: row.get("average_precision,none") for name, row in results["results"].items()}
    assert own["outer"] == own["inner"] == own["forced_frontier_vt_4k"] != own["forced_frontier_cwe_4k"]
    assert own["alone"] == own["forced_frontier_cwe_8k"]  # what a group is all of has its mean
    table = lm_eval.utils.make_table(results)
    assert sorted(line.partition(":")[0] for line in table.splitlines() if line.startswith("Not in")) == [
        "Not in the means of inner", "Not in the means of outer"
    ]  # fmt: skip
