"""What is recommended: the cheapest certified configuration, or a refusal with its reason."""

from __future__ import annotations

import subprocess

import numpy as np
import pytest

pytest.importorskip("mapie")
from few_studies import built, of, record, right
from read_back import parsed

from lm_eval_sparse.analysis import guarantee, recommend, study
from lm_eval_sparse.analysis.certify import Options
from lm_eval_sparse.analysis.choice import choose
from lm_eval_sparse.errors import UserError
from lm_eval_sparse.results.schema import Shape


def density(point):
    return 1 - point.measured


def test_the_cheapest_certified_and_its_runner_up():
    study = built(of({"quest": {0.5: 0, 0.9: 0, 0.95: 30}, "snapkv": {0.5: 0, 0.8: 0, 0.95: 25}}))
    choice = choose(study, Options(), density, task="niah")
    assert (choice.best.label, choice.best.sparsity) == ("quest", 0.9)
    assert (choice.runner_up.label, choice.runner_up.sparsity) == ("snapkv", 0.8)
    assert choice.refusal is None and choice.family == 2 and len(choice.certified) == 4
    assert any("quest of org/model at 0.95" in line and "loses more" in line for line in choice.measure)
    prices = {"dense": 3.0, "quest": 2.0, "snapkv": 0.5}
    expensive = choose(study, Options(), lambda point: prices[point.record.method], task="niah")
    assert expensive.best.label == "snapkv"


def test_a_model_that_fails_the_task_is_a_refusal():
    rows = [record("niah", "dense", None, right(100, 98)), record("niah", "quest", 0.9, right(100, 98))]
    choice = choose(built(rows), Options(), density, task="niah")
    assert choice.best is None and choice.runner_up is None and choice.certified == ()
    assert "dense cannot do this task: 0.02 ± 0.01 against chance 0" in choice.refusal


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (of({"quest": {0.5: 0}}, 20), "20 documents are too few"),
        ([record("niah", "quest", 0.5, right(100))], "no dense baseline"),
        ([record("niah", "dense", None, None), record("niah", "quest", 0.5, None)], "no bands, no certificate"),
        ([record("niah", "dense", None, right(100))], "dense runs only"),
        (of({"quest": {0.5: 0}}, chance=None), "--chance niah=.25"),
        (of({"quest": {0.5: 50}}), "loses more than 0.05"),
        (of({"oracle_topk": {0.5: 0}}), "no method was run"),
    ],
)
def test_refusals_have_reasons(rows, said):
    choice = choose(built(rows), Options(), density, task="niah")
    assert choice.best is None and said in choice.refusal


def test_unknown_costs_are_not_guessed():
    study = built(of({"quest": {0.5: 0}}))
    choice = choose(study, Options(), lambda point: None, task="niah")
    assert choice.best is None and "not known" in choice.refusal and "quest at 0.5" in choice.refusal
    assert len(choice.certified) == 1


def test_dense_is_recommended_where_nothing_is_cheaper():
    choice = choose(built(of({"quest": {0.5: 0}})), Options(), lambda point: 1.0, task="niah")
    assert choice.best is None and "take dense" in choice.refusal


def test_all_candidates_are_one_family():
    """60 documents without a loss have p=.046: certified alone, not among five of which four lose all."""
    alone = choose(built(of({"quest": {0.5: 0}}, 60)), Options(), density, task="niah")
    assert alone.best is not None
    others = {name: {0.5: 50} for name in ("snapkv", "tova", "knorm", "h2o")}
    many = choose(built(of({"quest": {0.5: 0}, **others}, 60)), Options(), density, task="niah")
    assert many.family == 5 and many.best is None and "77 documents would do" in many.refusal
    assert guarantee.least_documents(0.05, 0.1, 5) == 77


def test_every_task_of_a_group_must_be_kept():
    both = built(of({"quest": {0.5: 0, 0.9: 0}}), of({"quest": {0.5: 0, 0.9: 40}}, task="story_retrieval"))
    assert choose(both, Options(), density, task="niah").best.sparsity == 0.9
    choice = choose(both, Options(), density, group="multiple_qa")
    assert choice.best.sparsity == 0.5 and len(choice.best.points) == 2 and choice.family == 1


def test_every_length_unless_one_is_given():
    both = built(of({"quest": {0.5: 0, 0.9: 0}}), of({"quest": {0.5: 0, 0.9: 40}}, length=16384))
    assert choose(both, Options(), density, task="niah").best.sparsity == 0.5
    assert choose(both, Options(), density, task="niah", length=4096).best.sparsity == 0.9
    with pytest.raises(UserError, match="--length 32768: these results have 4096, 16384"):
        choose(both, Options(), density, task="niah", length=32768)


def test_a_smaller_model_is_said_to_be_worse():
    large = of({"quest": {0.9: 0}}, model="org/large")
    small = of({"quest": {0.9: 0}}, model="org/small", dense_wrong=40)
    for row in small[1:]:
        assert row.score == 1
    choice = choose(built(large, small), Options(), lambda p: 1.0 if "small" in p.record.model else 9.0, task="niah")
    assert choice.best is None, "dense costs as much"
    cost = lambda p: (1 if "small" in p.record.model else 9) * (1 - p.measured)  # noqa: E731
    choice = choose(built(large, small), Options(), cost, task="niah")
    assert choice.best.model == "org/small" and choice.runner_up.model == "org/large"
    assert any("org/small scores 0.600 there, and org/large 1.000" in note for note in choice.notes)


def test_what_is_asked_for_must_be_there():
    study = built(of({"quest": {0.5: 0}}))
    with pytest.raises(UserError, match="did you mean 'niah'"):
        choose(study, Options(), density, task="nia")
    with pytest.raises(UserError, match="choose single_qa"):
        choose(study, Options(), density, group="qa")
    with pytest.raises(UserError, match="none of its tasks"):
        choose(study, Options(), density, group="single_qa")
    with pytest.raises(UserError, match="one of them"):
        choose(study, Options(), density)


def test_the_chosen_configuration_is_rarely_false():
    """Eight methods at the tolerance in truth: any recommendation is false. At most the level, of fresh draws."""
    rng, draws, false = np.random.default_rng(), 60, 0
    for _ in range(draws):
        rows = [record("niah", "dense", None, np.ones(60))]
        rows += [
            record("niah", f"method{m}", 0.5, (rng.random(60) >= 0.05).astype(float)) for m in range(8)
        ]  # fmt: skip
        false += choose(built(rows), Options(), density, task="niah").best is not None
    assert false <= 16, "level .1 of 60 draws is 6; more than 16 come once in some 10,000"


def test_scores_side_by_side_are_of_the_same_documents():
    """100 easy documents more in the dense run are no loss of the sparse one."""
    scores = np.concatenate([right(100, 50), np.ones(100)])
    part = np.concatenate([right(100, 50), np.full(100, np.nan)])
    rows = [record("niah", "dense", None, scores), record("niah", "quest", 0.9, part)]
    best = choose(built(rows), Options(), density, task="niah").best
    assert (best.score, best.dense_score) == (0.5, 0.5)


def test_a_group_says_which_of_its_tasks_were_not_run():
    one = choose(built(of({"quest": {0.5: 0}})), Options(), density, group="multiple_qa")
    assert (
        one.best is not None and "multiple_qa holds story_retrieval as well, of which there are no runs" in one.notes[0]
    )
    both = built(of({"quest": {0.5: 0}}), of({"quest": {0.5: 0}}, task="story_retrieval"))
    assert not any("as well" in note for note in choose(both, Options(), density, group="multiple_qa").notes)


def timed(*devices):
    """Dense at 1 s a prompt and quest at half of it, on the devices."""
    found = []
    for row, device in zip(of({"quest": {0.5: 0}}), devices, strict=True):
        seconds = 1.0 if row.method == "dense" else 0.5
        spent = {"speed": {"prefill": 4000 / seconds}, "seconds_by_phase": {"prefill": 100 * seconds, "decode": 1.0}}
        found.append(row.model_copy(update={"device": device, "prompt_tokens": 4000.0, **spent}))
    return found


def test_times_of_two_devices_are_not_compared():
    same, found = recommend.recommend(built(timed("H200", "H200")), Options(), task="niah", by="time")
    assert found and same.startswith("Take quest") and "the only configuration that is certified" in same
    for devices in (("H200", "A100"), ("H200", None)):
        said, found = recommend.recommend(built(timed(*devices)), Options(), task="niah", by="time")
        assert not found and "times of different devices cannot be compared" in said and "--model_args" not in said


def test_marks_of_what_is_mixed_are_printed_with_a_recommendation():
    rows = [*of({"quest": {0.5: 0}}), *of({"quest": {0.5: 0}}, seed=7)]
    mixed = study.build(rows, allow_mixed=True)
    said, _ = recommend.recommend(mixed, Options(), task="niah")
    assert said.startswith(
        "Note: frontier_niah_4k of org/model has seed 7 and none: what differs is never put together."
    )
    # A method that was not run on one of the two is no candidate, and it is said on which.
    some = study.build([*rows, *of({"snapkv": {0.5: 0}})[1:]], allow_mixed=True)
    choice = choose(some, Options(), density, task="niah")
    assert {one.label for one in choice.certified} == {"quest"}
    assert any(note.startswith("snapkv of org/model was not run on frontier_niah_4k") for note in choice.notes)


@pytest.mark.parametrize(
    "given",
    [
        {"method": "quest", "sparsity": 0.9, "max_length": 4096},
        {"method": "quest", "sparsity": 0.9, "dtype": "a'b\"c $(touch x) `y`"},
        {"method": "quest", "sparsity": 0.9, "dtype": "two\nlines\x1b[31m", "revision": "0123"},
        {"method": "quest", "sparsity": 0.9, "chat_template_args": {"a": [1, 2], "b": "x,y=z"}},
        {"method": "quest", "sparsity": 0.9, "revision": "a,method=other"},
    ],
)
def test_the_line_to_paste_is_read_by_a_shell_and_by_lm_eval_as_the_runs_were_made(given):
    rows = of({"quest": {0.9: 0}}, model_args={"pretrained": "org/model", **given})
    said, found = recommend.recommend(built(rows), Options(), task="niah")
    rows = [row.model_copy(update={"seconds_by_phase": {}}) for row in rows]
    assert not found and "not known" in said  # what these cost is not recorded
    said, found = by_memory(rows)
    line = said.splitlines()[-1]
    assert found and line.startswith("--model_args ") and line.isprintable()
    words = subprocess.run(["bash", "-c", f"printf '%s\\0' {line}"], capture_output=True, check=True).stdout.decode()
    assert parsed([*words.split("\0")[:-1], "--tasks", "x"]).model_args == {"pretrained": "org/model", **given}


def by_memory(rows):
    """A recommendation by what is held, of rows that say it."""
    held = []
    for row in rows:
        share = 1.0 if row.method == "dense" else 0.5
        figures = row.by_phase["decode"].model_copy(update={"kv_memory_fraction": share})
        held.append(
            row.model_copy(
                update={
                    "by_phase": {"decode": figures}, "model_dtype": "bfloat16", "prompt_tokens": 4000.0,
                    "model_shape": Shape(layers=2, attention_layers=2, hidden=8, query_heads=2, kv_heads=1, head_dim=4,
                                         value_dim=4, mlp=16, vocab=99),
                }
            )
        )  # fmt: skip
    return recommend.recommend(built(held), Options(), task="niah", by="memory")


@pytest.mark.parametrize(
    "given",
    [
        {}, {"sparsity": 0.9}, {"method": "quest"}, {"method": "snapkv", "sparsity": 0.9},
        {"method": "quest", "sparsity": 0.5}, {"method": "quest", "sparsity": 0.9, "pretrained": "evil/model"},
    ],
)  # fmt: skip
def test_a_line_that_the_runs_do_not_say_is_not_made_up(given):
    rows = of({"quest": {0.9: 0}}, model_args={"pretrained": "org/model", **given})
    said, found = by_memory(rows)
    assert found and "There is no line to paste" in said and not said.splitlines()[-1].startswith("--model_args")


def test_code_of_others_is_not_in_the_line():
    given = {"method": "/home/me/x.py:Mine", "sparsity": 0.9, "trust_remote_code": True, "pretrained": "org/model"}
    said, found = by_memory(of({"mine": {0.9: 0}}, model_args=given, code={"mine": {"sha256": "ab"}}))
    assert found and "trust_remote_code=True; add it if you trust" in said and "/home/me" not in said
    assert said.splitlines()[-1] == "--model_args pretrained=org/model,method=path/to/x.py:Mine,sparsity=0.9"
    assert "give its path, and --allow-code" in said


def test_runs_of_a_group_with_other_arguments_have_lines_of_their_own():
    arguments = {"pretrained": "org/model", "method": "quest", "sparsity": 0.9}
    one = of({"quest": {0.9: 0}}, model_args={**arguments, "max_length": 4096})
    other = of({"quest": {0.9: 0}}, task="story_retrieval", model_args={**arguments, "max_length": 8192})
    held = []
    for row in (*one, *other):
        share = {"kv_memory_fraction": 1.0 if row.method == "dense" else 0.5}
        held.append(row.model_copy(update={"by_phase": {"decode": row.by_phase["decode"].model_copy(update=share)}}))
    sizes = {"layers": 2, "attention_layers": 2, "hidden": 8, "query_heads": 2, "kv_heads": 1, "mlp": 16, "vocab": 99}
    shape = Shape(**sizes, head_dim=4, value_dim=4)
    held = [r.model_copy(update={"model_dtype": "bfloat16", "prompt_tokens": 4e3, "model_shape": shape}) for r in held]
    said, found = recommend.recommend(built(held), Options(), group="multiple_qa", by="memory")
    assert found and "max_length=4096" in said and "max_length=8192" in said
    assert "On frontier_story_retrieval_4k it was run with:" in said


def test_names_of_foreign_files_are_one_line_of_a_recommendation():
    evil = "org/x\n--model_args pretrained=evil\x1b[31m"
    rows = of({"quest": {0.9: 0, 0.95: 30}, "snapkv": {0.5: 40}}, model=evil)
    said, _ = recommend.recommend(built(rows), Options(), task="niah", by="memory")
    assert not any(line.startswith("--model_args") for line in said.splitlines()) and "\x1b" not in said


def said_by(rows, **asked):
    return recommend.recommend(built(*rows), Options(), by="memory", **asked)[0]


def test_a_refusal_says_nothing_twice_and_what_to_measure():
    runs = {f"m{at:02}": {0.5: 0 if at == 7 else 2, 0.9: 30} for at in range(12)}
    text = said_by([of(runs, 60)], task="niah")
    refusal, heading, *more = text.splitlines()
    assert refusal.startswith("Nothing is recommended: nothing is certified within 0.05 of dense on frontier_niah_4k")
    assert "level 0.1 is shared by 12 candidates, 0.0083 each at first: choose some with --model or --method" in refusal
    assert heading == "To certify more:" and len(more) == 10 and refusal.count("of org/model at 0.5") == 2
    told = [f"m{at:02}" for at in range(12)]
    assert all(text.count(f"{name} of org/model") == 1 for name in told)
    assert all("documents would do" in line or ": run " in line for line in more)


def test_a_level_that_is_shared_does_not_explain_what_is_lost():
    lost = said_by([of({"quest": {0.5: 50}, "snapkv": {0.5: 60}})], task="niah")
    assert "shared by" not in lost and "--model or --method" not in lost
    assert (
        lost.count("it loses more than 0.05; no number of documents would do for such a loss: run a lower sparsity")
        == 2
    )
    chance = [record("niah", "dense", None, right(100, 98))]
    chance += [record("niah", name, 0.5, right(100, 98)) for name in ("quest", "snapkv", "tova")]
    assert "shared by" not in said_by([chance], task="niah")


def test_what_is_left_to_measure_beside_a_recommendation():
    rows = of({"quest": {0.5: 0, 0.9: 50}, "snapkv": {0.5: 3}})
    choice = choose(built(rows), Options(), density, task="niah")
    assert choice.best.label == "quest"
    text = recommend.text(choice, Options(), "memory", 256)
    assert "To certify more (level 0.1 is shared by 2 candidates, 0.05 each at first):" in text
    assert "no number of documents would do for such a loss: run a sparsity between 0.5 and 0.9" in text
    assert "snapkv of org/model at 0.5: loss 0.030" in text and "documents would do if the loss stays as seen" in text


def test_all_lengths_that_are_refused_are_named():
    failing = [
        record("niah", method, None if method == "dense" else 0.5, right(100, 98), length=length)
        for length in (4096, 16384)
        for method in ("dense", "quest")
    ]
    (said, *_) = said_by([failing], task="niah").splitlines()
    assert "org/model on frontier_niah_4k: dense cannot do this task" in said
    assert said.endswith("(and likewise on frontier_niah_16k).")
    few = [*of({"quest": {0.5: 0}}, 20), *of({"quest": {0.5: 0}}, 20, length=16384)]
    assert "20 documents are too few" in said_by([few], task="niah")
    assert "likewise on frontier_niah_16k" in said_by([few], task="niah")


def test_where_the_cost_of_dense_is_not_known_nothing_is_cheaper():
    study = built(of({"quest": {0.5: 0}}))
    choice = choose(study, Options(), lambda point: None if point.record.method == "dense" else 1.0, task="niah")
    assert choice.best is None and "what dense attention costs is not known" in choice.refusal
    assert "quest at 0.5 of org/model" in choice.refusal


def test_a_level_of_chance_that_was_given_over_another_one_is_said():
    rows = of({"quest": {0.5: 0}}, chance=0.25)
    said, _ = by_memory(rows)
    assert "chance is taken" not in said
    made = study.build(rows, chance={"niah": 0.0})
    said, _ = recommend.recommend(made, Options(), task="niah", by="memory")
    assert said.startswith("Note: ") and "chance is taken to be 0, as it was given; its runs say 0.25." in said


def test_dense_runs_of_another_model_type_cost_what_the_model_costs():
    """lm-eval's `hf` records no sizes; they are those of the sparse run."""
    rows = of({"quest": {0.5: 0}})
    shape = Shape(
        layers=2, attention_layers=2, hidden=8, query_heads=2, kv_heads=1, head_dim=4, value_dim=4, mlp=16, vocab=9
    )
    held = {"decode": rows[1].by_phase["decode"].model_copy(update={"kv_memory_fraction": 0.5})}
    known = {"by_phase": held, "model_shape": shape, "prompt_tokens": 4000.0, "model_dtype": "bfloat16"}
    hf = rows[0].model_copy(update={"runner": "hf", "by_phase": {}, "model_dtype": "bfloat16"})
    said, found = recommend.recommend(
        built([hf, rows[1].model_copy(update=known)]), Options(), task="niah", by="memory"
    )
    assert found and "bytes of keys and values (dense 1.28e+05)" in said  # 4000 · 2 layers · (4 + 4) · 2 bytes
