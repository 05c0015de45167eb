"""Records are put together as they may be compared: nothing falls into one point or is paired that must not be.

Long, since each way in which two runs may differ is a case.
"""

from __future__ import annotations

import csv
import io
import random
from typing import Any

import made_up
import numpy as np
import pytest

from lm_eval_sparse.analysis import curve, study, tidy
from lm_eval_sparse.errors import UserError
from lm_eval_sparse.results.records import records
from lm_eval_sparse.results.schema import Documents, Record

TASKS = ("niah", "toefl")


def rows(method: str = "quest", sparsity: float = 0.8, documents: int = 6, **more: Any) -> list[Record]:
    """Records of a made-up run; `more` replaces fields."""
    run = made_up.Run(more.pop("model", "org/small-0.5B"), method, sparsity, more.pop("length", "4k"), TASKS)
    content, lines = made_up.contents(run, documents, **{k: more.pop(k) for k in ("task_seed",) if k in more})
    by_document: dict[tuple[str, str, str], list[tuple[str, float]]] = {}
    for line in lines:
        for metric, value in line["metrics"].items():
            by_document.setdefault((line["task"], metric, "none"), []).append((line["doc_hash"], value))
    found = {
        key: Documents(ids=tuple(name for name, _ in pairs), scores=tuple(value for _, value in pairs))
        for key, pairs in by_document.items()
    }
    return [row.model_copy(update=more) for row in records(content, documents=found)]


DENSE = rows("dense", 0.0)


def labels(made: study.Study) -> set[str]:
    return {chain.label for cell in made.cells for chain in cell.chains}


def points(made: study.Study) -> int:
    return sum(len(chain.points) for cell in made.cells for chain in cell.chains)


@pytest.mark.parametrize(
    ("one", "other", "told"),
    [
        ({"knobs": {"quest": {"page_size": 16}}}, {"knobs": {"quest": {"page_size": 32}}}, "page_size=32"),
        ({"backend": "triton"}, {"backend": "gather"}, "backend=gather"),
        ({"preset": None}, {"preset": "paper"}, "preset=paper"),
        ({"code": {}}, {"code": {"quest": {"sha256": "ab"}}}, "code="),
        ({"runner": "sparse-hf"}, {"runner": "other"}, "model type=other"),
    ],
)
def test_runs_that_differ_in_one_thing_are_two_curves(one: dict[str, Any], other: dict[str, Any], told: str) -> None:
    made = study.build([*DENSE, *rows(**one), *rows(**other)])
    assert len(labels(made)) == 2 and points(made) == 2 * 2 * len(TASKS)
    assert any(told in label for label in labels(made)) and all(label.startswith("quest") for label in labels(made))
    lines = curve.table(curve.rows_of(made))
    assert len(lines) == 1 + 3 * len(TASKS)  # dense and two, of each task; they had been one line


def test_native_knobs_are_one_chain_in_the_order_of_what_was_measured() -> None:
    given = [
        rows(measured=measured, requested=None, knobs={"quest": {"page_size": 16, "budget": budget}},
             budget_knobs={"quest": ("budget",)})
        for budget, measured in random.sample([(128, 0.97), (512, 0.9), (1024, 0.75)], 3)
    ]  # fmt: skip
    made = study.build([*DENSE, *(row for some in given for row in some)])
    (chain,) = next(cell for cell in made.cells if cell.metric == "exact").chains
    assert [point.measured for point in chain.points] == [0.75, 0.9, 0.97] and chain.label == "quest"


def test_the_order_is_that_of_what_was_asked() -> None:
    given = [row for s in random.sample([0.5, 0.8, 0.9, 0.95], 4) for row in rows(sparsity=s, measured=random.random())]
    made = study.build([*DENSE, *given])
    assert all([p.requested for p in c.points] == [0.5, 0.8, 0.9, 0.95] for cell in made.cells for c in cell.chains)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"seed": 7}, "seed 0 and 7"),
        ({"task_version": "1"}, "version 1 and 2"),
        ({"task_hash": "other"}, "definition"),
        ({"chat_template": None}, "chat template"),
        ({"shots": 5}, "few-shot examples 0 and 5"),
        ({"seeds": {"random": 3}}, "seeds"),
        ({"gen_kwargs": {"temperature": 1}}, "gen_kwargs"),
        ({"system_instruction": "abc"}, "system instruction abc and none"),
        ({"model_args": {"max_length": 2048}}, "model arguments max_length=2048 and none"),
        ({"model_args": {"add_bos_token": True, "device": "cpu"}}, "model arguments add_bos_token=true and none"),
        ({"model_args": {"something": "new"}}, "model arguments none and something=new"),
    ],
)
def test_what_cannot_be_compared_is_refused_and_listed(change: dict[str, Any], told: str) -> None:
    mixed = [*DENSE, *rows(), *rows("dense", 0.0, **change), *rows(sparsity=0.9, **change)]
    with pytest.raises(UserError) as error:
        study.build(mixed)
    said = str(error.value)
    assert told in said and "forced_frontier_niah_4k of org/small-0.5B" in said and "--allow-mixed" in said
    made = study.build(mixed, allow_mixed=True)
    assert made.marks and all(cell.mark for cell in made.cells) and len(made.cells) == 8
    # Dense and sparse are paired inside one kind only.
    for cell in made.cells:
        assert cell.dense is not None and len(cell.chains) == 1 and len(cell.chains[0].points) == 1


def test_what_a_run_computed_with_in_what_place_is_no_other_question() -> None:
    idle = {
        "model_args": {
            "device": "cpu", "batch_size": 4, "stats": "full", "resume": False, "dtype": "bfloat16", "cache_dir": "x",
            "quest.page_size": "16", "page_size": 16, "sparsity": 0.9, "max_length": None,
        },
        "knobs": {"quest": {"page_size": 16}},
    }  # fmt: skip
    (made,) = {len(study.build([*DENSE, *rows(**idle)]).cells)}
    assert made == 2 * len(TASKS)
    typed = [*rows("dense", 0.0, model_args={"max_length": 4096}), *rows(model_args={"max_length": "4096"})]
    assert len(study.build(typed).cells) == made  # as a number, and as it was typed


@pytest.mark.parametrize("argument", ["load_in_4bit", "peft", "gguf_file", "quantization_config", "delta"])
def test_other_weights_are_another_model(argument: str) -> None:
    given = {"model_args": {argument: "x.bin"}}
    made = study.build([*DENSE, *rows(sparsity=0.5), *rows("dense", 0.0, **given), *rows(**given)])
    assert made.models == ("org/small-0.5B", f"org/small-0.5B ({argument}=x.bin)")
    for cell in made.cells:
        assert cell.dense is not None and len(cell.chains) == 1 and len(cell.chains[0].points) == 1
        assert all(
            (argument in point.record.model_args) == ("(" in cell.model)
            for point in (cell.dense, *cell.chains[0].points)
        )


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"seed": 7}, "models of forced_frontier_niah_4k differ: seed 0 (org/small-0.5B) and 7 (org/large-3B)"),
        ({"task_hash": "other"}, "models of forced_frontier_niah_4k differ: definition"),
        ({"shots": 5}, "differ: few-shot examples 0 (org/small-0.5B) and 5 (org/large-3B)"),
        ({"task_version": "1"}, "of forced_frontier_niah_4k differ: version 1 (org/large-3B) and 2 (org/small-0.5B)"),
        ({"seeds": {"fewshot": 7}}, "models of forced_frontier_niah_4k differ: seeds"),
        ({"gen_kwargs": {"temperature": 1}}, "models of forced_frontier_niah_4k differ: gen_kwargs"),
        ({"system_instruction": "abc"}, "models of forced_frontier_niah_4k differ: system instruction"),
    ],
)
def test_what_is_mixed_between_models_is_refused_as_well(change: dict[str, Any], told: str) -> None:
    other = {"model": "org/large-3B"}
    same = [*DENSE, *rows(), *rows("dense", 0.0, **other), *rows(**other, chat_template="another")]
    # A chat template is a model's own: between models it may differ, and here dense and sparse do within one.
    with pytest.raises(UserError, match="of org/large-3B has chat template"):
        study.build(same)
    mixed = [*DENSE, *rows(), *rows("dense", 0.0, **other, **change), *rows(**other, **change)]
    with pytest.raises(UserError) as error:
        study.build(mixed)
    assert told in str(error.value)
    made = study.build(mixed, allow_mixed=True)
    assert made.marks and all(cell.mark for cell in made.cells)
    templates = rows("dense", 0.0, **other, chat_template="another")
    assert study.build([*DENSE, *rows(), *templates]).marks == ()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"task_version": "1"}, "lengths of forced_frontier_niah differ: version"),
        ({"seed": 7}, "lengths of forced_frontier_niah differ: seed 0 (forced_frontier_niah_4k) and 7"),
        ({"shots": 3}, "lengths of forced_frontier_niah differ: few-shot examples"),
    ],
)
def test_what_is_mixed_between_lengths_is_refused_as_well(change: dict[str, Any], told: str) -> None:
    mixed = [*DENSE, *rows("dense", 0.0, length="16k", **change)]
    with pytest.raises(UserError) as error:
        study.build(mixed)
    assert told in str(error.value)
    assert all(cell.mark for cell in study.build(mixed, allow_mixed=True).cells)
    assert study.build([*DENSE, *rows("dense", 0.0, length="16k")]).marks == ()


def test_documents_of_all_tasks_are_of_one_seed() -> None:
    other = [row.model_copy(update={"seed": 7}) for row in DENSE if "toefl" in row.task]
    with pytest.raises(
        UserError, match=r"tasks differ: seed 0 \(forced_frontier_niah\) and 7 \(forced_frontier_toefl\)"
    ):
        study.build([*(row for row in DENSE if "niah" in row.task), *other])
    stateless = [row.model_copy(update={"seed": None, "task": "arc"}) for row in other]  # of no task of ours
    assert study.build([*(row for row in DENSE if "niah" in row.task), *stateless]).marks == ()


def test_turns_of_examples_are_part_of_the_prompt() -> None:
    with pytest.raises(UserError, match="turns of examples False and True"):
        study.build(
            [*rows("dense", 0.0, shots=5, fewshot_as_multiturn=True), *rows(shots=5, fewshot_as_multiturn=False)]
        )
    made = study.build([*rows("dense", 0.0, fewshot_as_multiturn=True), *rows(fewshot_as_multiturn=False)])
    assert made.marks == ()  # without examples there are none


@pytest.mark.parametrize(
    ("one", "other", "several"),
    [
        ({"model_hash": None, "model_parameters": 7 * 10**9}, {"model_hash": None, "model_parameters": 10**9}, True),
        ({"model_hash": None, "model_parameters": None}, {}, False),
        (
            {"model_args": {"pretrained": "/w/a", "peft": "x"}},
            {"model_args": {"pretrained": "/w/b", "peft": "x"}},
            True,
        ),
        ({"model_args": {"pretrained": "org/b"}}, {}, True),
        ({"model_args": {"dtype": "float16"}}, {}, True),
        ({"model_args": {"dtype": "auto"}}, {}, False),
        ({"model_args": {"revision": "old"}}, {}, True),
    ],
)
def test_what_tells_models_of_one_name_apart(one: dict[str, Any], other: dict[str, Any], several: bool) -> None:
    made = study.build([*rows("dense", 0.0, **one), *rows(**other)])
    assert len(made.models) == 1 + several and all(
        (cell.dense is None) == several for cell in made.cells if cell.chains
    )


@pytest.mark.parametrize("change", [{"code": {"mine": {"sha256": "ab"}}}, {}])
def test_what_was_measured_at_0_and_not_asked_for_is_no_baseline(change: dict[str, Any]) -> None:
    change |= {"method": "mine", "requested": None, "measured": 0.0}
    own = [row.model_copy(update=change) for row in rows()]
    made = study.build([*own, *rows()])
    assert all(cell.dense is None for cell in made.cells)
    made = study.build([*DENSE, *own, *rows()])
    assert all(len(cell.chains) == 2 for cell in made.cells) and not made.left_out


def test_a_baseline_with_scores_by_document_goes_before_one_without() -> None:
    without = [row.model_copy(update={"documents": None, "date": "2030-01-01"}) for row in DENSE]
    made = study.build([*without, *DENSE, *rows()])
    assert all(cell.dense is not None and cell.dense.scores is not None for cell in made.cells)


def test_a_dtype_that_was_typed_is_one_that_is_known() -> None:
    other = {"runner": "vllm", "model_dtype": None, "model_hash": None, "model_parameters": None}
    typed = {"pretrained": "org/small-0.5B", "dtype": "bfloat16", "tensor_parallel_size": 2}
    made = study.build([*rows("dense", 0.0, **other, model_args=typed), *rows()])
    assert made.models == ("org/small-0.5B",) and all(cell.dense is not None for cell in made.cells)


def test_seeds_of_other_tasks_and_of_examples_that_are_not_there_are_their_own() -> None:
    foreign = [row.model_copy(update={"seed": 42, "task": "my_task"}) for row in DENSE if "toefl" in row.task]
    assert study.build([*DENSE, *rows(), *foreign]).marks == ()
    assert study.build([*rows("dense", 0.0, seeds={"fewshot": 1}), *rows(seeds={"fewshot": 2})]).marks == ()
    with pytest.raises(UserError, match="seeds fewshot=1 and fewshot=2"):
        study.build([*rows("dense", 0.0, seeds={"fewshot": 1}, shots=2), *rows(seeds={"fewshot": 2}, shots=2)])


@pytest.mark.parametrize(
    ("name", "mixed"), [("sdpa", False), ("flash_attention_2", False), ("org/sage-attention", True)]
)
def test_attention_that_computes_something_else_is_no_baseline(name: str, mixed: bool) -> None:
    runs = [*rows("dense", 0.0, model_args={"attn_implementation": name}), *rows(model_args={})]
    if mixed:
        with pytest.raises(UserError, match="model arguments attn_implementation=org/sage-attention and none"):
            study.build(runs)
    else:
        assert all(cell.dense is not None for cell in study.build(runs).cells)


def test_phases_that_differ_are_two_runs_though_their_mean_is_one() -> None:
    def split(one: float, other: float) -> list[Record]:
        found = []
        for row in rows("quest", 0.5, date=None, command=None, score=0.5, documents=6):
            figures = {"eviction": row.by_phase["eviction"].model_copy(update={"requested": one}),
                       "decode": row.by_phase["decode"].model_copy(update={"requested": other})}  # fmt: skip
            found.append(row.model_copy(update={"by_phase": figures, "documents": None}))
        return found

    made = study.build([*DENSE, *split(0.9, 0.1), *split(0.5, 0.5), *split(0.1, 0.9)])
    assert all(len(cell.chains[0].points) == 3 for cell in made.cells)


def test_marks_that_look_alike_are_told_apart() -> None:
    kinds = [
        row for n in (1, 2)
        for row in (*rows("dense", 0.0, gen_kwargs={"x": f"{'x' * 200}{n}{'x' * 200}"}),
                    *rows(gen_kwargs={"x": f"{'x' * 200}{n}{'x' * 200}"}))
    ]  # fmt: skip
    made = study.build(kinds, allow_mixed=True)
    assert len(made.primary) == 4 and len({(cell.task, cell.mark) for cell in made.primary}) == 4


def test_versions_of_one_length_differ_between_models() -> None:
    other = {"model": "org/large-3B", "task_version": "7"}
    mixed = [*DENSE, *rows(), *rows("dense", 0.0, **other), *rows(**other)]
    with pytest.raises(UserError) as error:
        study.build(mixed)
    said = str(error.value)
    assert "models of forced_frontier_niah_4k differ: version 2 (org/small-0.5B) and 7 (org/large-3B)" in said
    assert "lengths of" not in said


def test_a_score_that_is_better_the_lower_and_the_higher_is_mixed() -> None:
    with pytest.raises(UserError, match="has direction higher is better and lower is better"):
        study.build([*DENSE, *rows(higher_is_better=False)])
    with pytest.raises(UserError, match="has length 4096 and 8192"):
        study.build([*DENSE, *(row.model_copy(update={"length": 8192}) for row in rows())])


def test_documents_are_paired_whatever_their_order_and_number() -> None:
    sparse = rows(documents=9)
    row = sparse[0]
    assert row.documents is not None
    order = np.random.default_rng().permutation(9)[:7]
    shuffled = Documents(
        ids=tuple(row.documents.ids[at] for at in order), scores=tuple(row.documents.scores[at] for at in order)
    )
    dense = rows("dense", 0.0, documents=9)
    made = study.build([*dense, row.model_copy(update={"documents": shuffled, "n": 7})])
    cell = next(cell for cell in made.cells if cell.task == row.task and cell.metric == row.metric)
    (point,) = cell.chains[0].points
    assert cell.dense is not None and cell.dense.scores is not None and point.scores is not None
    assert cell.ids == dense[0].documents.ids  # type: ignore[union-attr]
    for at in range(9):
        expected = row.documents.scores[at] if at in order else np.nan
        np.testing.assert_equal(point.scores[at], expected)
    assert list(cell.dense.scores) == list(dense[0].documents.scores)  # type: ignore[union-attr]


def test_the_same_run_twice_is_one_and_another_one_is_said() -> None:
    assert study.build([*DENSE, *DENSE, *rows(), *rows()]).left_out == ()
    newer = rows(date="2027-01-01T00:00:00+00:00", score=0.25)
    made = study.build([*DENSE, *rows(), *newer])
    assert points(made) == 2 * len(TASKS) and len(made.left_out) == 2 * len(TASKS)
    assert "was run 2 times; the one with most documents that dense has as well" in made.left_out[0]
    assert made.cells[0].chains[0].points[0].record.score == 0.25


def test_of_two_runs_the_one_on_the_documents_of_the_dense_one_is_used() -> None:
    longer = rows(documents=9, date="2027-01-01T00:00:00+00:00")
    away = [
        row.model_copy(
            update={
                "documents": Documents(
                    ids=tuple(f"else{name}" for name in row.documents.ids), scores=row.documents.scores
                )
            }
        )
        for row in longer
        if row.documents
    ]
    made = study.build([*DENSE, *rows(), *away])
    assert {point.record.n for cell in made.cells for chain in cell.chains for point in chain.points} == {6}


def test_a_second_baseline_is_said_with_its_backend() -> None:
    again = rows("dense", 0.0, backend="gather", date="2020-01-01T00:00:00+00:00", score=0.25)
    here = rows("dense", 0.0, backend="triton")
    made = study.build([*here, *again, *rows()])
    assert any("dense was run 2 times" in line and "backend gather" in line for line in made.left_out)


def test_no_two_curves_or_models_look_alike() -> None:
    values = (1, "1", f"{'x' * 300}1{'x' * 300}", f"{'x' * 300}2{'x' * 300}")
    alike = [
        *(rows(knobs={"quest": {"x": value}}) for value in values),
        *(rows("snapkv", phases=phase) for phase in ("decode", "kv")),
    ]
    made = study.build([*DENSE, *(row for several in alike for row in several)])
    for cell in made.cells:
        assert len(cell.chains) == len({chain.label for chain in cell.chains}) == len(alike)
        assert all(len(chain.points) == 1 for chain in cell.chains)
    hashes = [row for digest in ("abcdefgh1", "abcdefgh2") for row in rows("dense", 0.0, model_hash=digest)]
    assert len(study.build(hashes).models) == 2


@pytest.mark.parametrize(
    ("method", "oracle"),
    [("oracle_blocks", True), ("oracle_blocks+quest", True), ("quest+a.py:oracle_x", True), ("quest+snapkv", False)],
)
def test_a_method_with_an_oracle_in_it_is_one(method: str, oracle: bool) -> None:
    made = study.build([*DENSE, *rows(method="quest", phases="x")])
    assert not made.cells[0].chains[0].oracle
    made = study.build([*DENSE, *(row.model_copy(update={"method": method}) for row in rows())])
    assert {chain.oracle for cell in made.cells for chain in cell.chains} == {oracle}


def test_without_a_dense_run_it_is_said() -> None:
    made = study.build(rows())
    assert all(cell.dense is None for cell in made.cells)
    assert any("has no dense run: no loss can be said; run it with method=dense" in line for line in made.left_out)


def test_a_method_at_sparsity_0_is_the_baseline_where_there_is_no_other() -> None:
    covering = [row.model_copy(update={"method": "quest", "requested": 0.0}) for row in DENSE]
    made = study.build([*covering, *rows()])
    assert all(cell.dense is not None and len(cell.chains) == 1 for cell in made.cells)


def test_models_of_one_name_are_kept_apart_and_another_model_type_is_not() -> None:
    other = [*rows("dense", 0.0, model_dtype="float32"), *rows(model_dtype="float32")]
    made = study.build([*DENSE, *rows(), *other])
    assert set(made.models) == {"org/small-0.5B (bfloat16)", "org/small-0.5B (float32)"}
    assert all(cell.dense is not None for cell in made.cells)
    unsaid = [*rows("dense", 0.0, model_dtype=None, model_hash=None), *rows(model_dtype=None, model_hash=None)]
    named = {name.partition("(")[2] for name in study.build([*DENSE, *rows(), *other, *unsaid]).models}
    assert any("dtype unknown" in name for name in named) and not any("None" in name or "?" in name for name in named)
    hf = rows("dense", 0.0, runner="hf", model_hash=None)
    made = study.build([*hf, *rows()])
    assert made.models == ("org/small-0.5B",) and all(cell.dense is not None for cell in made.cells)
    made = study.build([*hf, *DENSE, *rows()])
    assert all(cell.dense is not None and cell.dense.record.runner == "sparse-hf" for cell in made.cells)


def test_one_metric_a_task_is_the_first_that_may_be_certified() -> None:
    made = study.build([*DENSE, *rows()])
    assert [(cell.short, cell.metric) for cell in made.primary] == [("niah", "exact"), ("toefl", "acc")]
    only = study.build([*DENSE, *rows()], metric="bits_per_char")
    assert [(cell.short, cell.bounded) for cell in only.primary] == [("niah", False), ("toefl", False)]
    with pytest.raises(UserError, match="--metric f1: no run here has it; they have acc, bits_per_char, exact"):
        study.build(DENSE, metric="f1")


def test_chance_is_said_or_given() -> None:
    unknown = [row.model_copy(update={"chance": None}) for row in DENSE]
    assert {cell.chance for cell in study.build(unknown).cells} == {None}
    for name in ("niah", "forced_frontier_niah", "forced_frontier_niah_4k"):
        made = study.build(DENSE, chance={name: 0.125})
        assert {cell.chance for cell in made.cells if cell.short == "niah"} == {0.125}
        assert 0.125 not in {cell.chance for cell in made.cells if cell.short != "niah"}
    hardly = [*DENSE, *(row.model_copy(update={"chance": 0.02}) for row in rows() if row.chance == 0)]
    assert {cell.chance for cell in study.build(hardly).cells if cell.metric == "exact"} == {0.02}
    apart = [*DENSE, *(row.model_copy(update={"chance": 0.2}) for row in rows() if row.chance == 0)]
    made = study.build(apart)
    assert {cell.chance for cell in made.cells if cell.metric == "exact"} == {None}
    assert any("its runs say that chance is 0 and 0.2" in line and "--chance niah=" in line for line in made.left_out)
    assert {c.chance for c in study.build(apart, chance={"niah": 0.2}).cells if c.metric == "exact"} == {0.2}
    said = study.build(DENSE, chance={"niah": 0.125}).left_out
    assert any("chance is taken to be 0.125, as it was given; its runs say 0" in line for line in said)
    for level in (-1.0, 1.5, float("nan")):
        with pytest.raises(UserError, match="a level from 0 to 1 is expected"):
            study.build(DENSE, chance={"niah": level})
    with pytest.raises(UserError, match="--chance nia: no such task"):
        study.build(DENSE, chance={"nia": 0.1})


def test_the_table_has_every_record_and_no_formula() -> None:
    evil = rows(model="org/small-0.5B", device="=cmd|' /C calc'!A0", commit="@x", task_version="+1")
    made = study.build(
        [
            *evil,
            *(row.model_copy(update={"task_version": "+1"}) for row in DENSE),
            *evil,
            *(row.model_copy(update={"score": 0.5}) for row in evil),
        ]
    )
    table = tidy.frame(made)
    assert len(table) == 12 and table["used"].sum() == 8
    text = list(csv.reader(io.StringIO(tidy.csv(table).decode())))
    cells = [cell for line in text[1:] for cell in line]
    assert "'=cmd|' /C calc'!A0" in cells and "'@x" in cells
    assert not any(cell.startswith(("=", "@", "+", "\t")) for cell in cells)
    import pandas

    again = pandas.read_parquet(io.BytesIO(tidy.parquet(table)))
    assert list(again["score"]) == list(table["score"]) and set(again["device"]) == set(table["device"])
    loss = table[(table["method"] == "quest") & (table["metric"] == "exact")].iloc[0]
    assert loss["loss"] == pytest.approx(loss["dense_score"] - loss["score"])
    bits = table[(table["method"] == "quest") & (table["metric"] == "bits_per_char")].iloc[0]
    assert bits["loss"] == pytest.approx(bits["score"] - bits["dense_score"])
    assert set(table["shared_documents"]) == {len(DENSE[0].documents.ids)}  # type: ignore[union-attr]


def losses(*records: Record) -> dict[str, tuple[float | None, int | None]]:
    """Loss and shared documents by method, of one metric, as the table has them."""
    table = tidy.frame(study.build(records))
    text = csv.DictReader(io.StringIO(tidy.csv(table).decode()))
    found = {}
    for row in text:
        loss, shared = row["loss"], row["shared_documents"]
        found[row["method"]] = float(loss) if loss else None, int(shared) if shared else None
    return found


def test_a_loss_is_one_over_documents_that_both_runs_have() -> None:
    whole = next(row for row in DENSE if row.metric == "exact")
    sparse = next(row for row in rows() if row.metric == "exact")
    ids = whole.documents.ids  # type: ignore[union-attr]
    n = len(ids)

    def scored(row: Record, names: tuple[str, ...], scores: list[float], **more: object) -> Record:
        documents = Documents(ids=names, scores=tuple(scores))
        return row.model_copy(
            update={"documents": documents, "score": sum(scores) / len(scores), "n": len(scores), **more}
        )

    # Dense is right in the second half only, and the run has the second half only, in another order.
    dense = scored(whole, ids, [0.0] * (n // 2) + [1.0] * (n - n // 2))
    half = tuple(reversed(ids[n // 2 :]))
    partly = scored(sparse, half, [0.75] * len(half))
    assert losses(dense, partly) == {"dense": (0.0, n), sparse.method: (0.25, len(half))}
    assert partly.score > dense.score, "over all that each has the run would seem to gain"
    # Less is better: signs turn.
    lower = [row.model_copy(update={"metric": "bits_per_char", "higher_is_better": False}) for row in (dense, partly)]
    assert losses(*lower)[sparse.method] == (-0.25, len(half))
    # No document in common, and documents that are not known: no loss, though scores are.
    others = scored(sparse, tuple(f"x{name}" for name in half), [0.75] * len(half))
    assert losses(dense, others)[sparse.method] == (None, 0)
    bare = partly.model_copy(update={"documents": None})
    assert losses(dense, bare)[sparse.method] == (None, None)
    assert losses(dense.model_copy(update={"documents": None}), partly)[sparse.method] == (None, None)
    assert losses(partly)[sparse.method] == (None, None), "no dense run"
