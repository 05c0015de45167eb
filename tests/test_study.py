"""Records are put together as they may be compared: nothing falls into one point or is paired that must not be."""

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
    assert "was run 2 times; the one with most documents, the newest, is used" in made.left_out[0]
    assert made.cells[0].chains[0].points[0].record.score == 0.25


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
