"""The section on certificates: what it certifies, in which family, and what it says where it does not."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("mapie")
from few_studies import built, of, record, right
from mapie.risk_control import control_fwer

from lm_eval_sparse.analysis import certificates, certify, guarantee

OPTIONS = certify.Options()


def only(study, options=OPTIONS):
    (row,) = certify.certify(study, options)
    return {c.name: c for c in row.certificates}


def test_one_task_is_the_fixed_sequence_over_requested_sparsity():
    study = built(of({"quest": {0.9: 1, 0.5: 0, 0.95: 30, 0.8: 0}}))
    found = only(study)["niah"]
    p = [guarantee.hoeffding_bentkus(lost, 100, 0.05) for lost in (0, 0, 1, 30)]
    assert found.sparsity == 0.9 and found.certified == len(control_fwer(np.array(p), 0.1, "fixed_sequence"))
    np.testing.assert_allclose(found.tested.p, p)
    assert "at 0.95: loss 0.300 ± 0.046 on 100 documents" in found.reason and "loses more than 0.05" in found.reason


def test_a_level_behind_one_that_fails_is_not_certified():
    """Not even where it lost nothing: the order is fixed."""
    found = only(built(of({"quest": {0.5: 0, 0.8: 20, 0.9: 0}})))["niah"]
    assert found.sparsity == 0.5


def test_tasks_of_a_row_are_one_family_and_rows_are_not():
    """60 documents without a loss: p=.046. One task passes at .1, two do not at .05 and pass on at .1 together."""
    one = of({"quest": {0.5: 0}}, 60)
    assert only(built(one))["niah"].certified == 1
    three = [one, of({"quest": {0.5: 0}}, 60, "vt"), of({"quest": {0.5: 0}}, 60, "cwe")]
    found = only(built(*three))
    assert not any(found[name].certified for name in ("niah", "vt", "cwe")), "p=.046 > .1/3"
    assert found["niah"].family == 3 and "60 documents" in found["niah"].reason
    assert "67 documents would do" in found["niah"].reason
    assert found["worst task"].certified == 1, "all must pass: no correction is due"
    both = built(one, of({"quest": {0.5: 0}}, 60, length=16384))
    assert [row.certificates[0].certified for row in certify.certify(both, OPTIONS)] == [1, 1]


def test_a_group_is_the_mean_of_its_tasks():
    study = built(of({"quest": {0.5: 0, 0.9: 8}}, 120), of({"quest": {0.5: 0, 0.9: 0}}, 90, "story_retrieval"))
    found = only(study)
    group = found["multiple_qa"]
    # 90 documents of each: the first ones, of which 8 are lost.
    assert group.tested.n.tolist() == [180, 180] and group.tested.loss[1] == pytest.approx(8 / 180)
    assert group.tested.p[1] == pytest.approx(guarantee.hoeffding_bentkus(8, 180, 0.05))
    assert group.sparsity == 0.5 and found["worst task"].sparsity == 0.5
    assert found["story_retrieval"].sparsity == 0.9 and found["niah"].sparsity == 0.5


def test_what_was_not_run_on_every_task_ends_group_and_worst():
    study = built(of({"quest": {0.5: 0, 0.9: 0}}), of({"quest": {0.5: 0}}, task="story_retrieval"))
    found = only(study)
    assert found["niah"].sparsity == 0.9
    assert found["multiple_qa"].sparsity == found["worst task"].sparsity == 0.5
    assert "0.9: not run" in found["worst task"].reason


def test_documents_missing_in_either_run_do_not_count():
    dense = record("niah", "dense", None, [np.nan] * 10 + [1.0] * 90)
    sparse = record("niah", "quest", 0.5, [0.0] * 10 + [1.0] * 60 + [np.nan] * 30)
    found = only(built([dense, sparse]))["niah"]
    assert found.tested.n[0] == 60 and found.tested.loss[0] == 0 and found.certified == 1


def refusal(study, options=OPTIONS):
    found = only(study, options)["niah"]
    section = certificates.section(study, options)
    assert found.refused and found.sparsity is None and not any(" keeps " in said for said in section.sentences)
    assert any(found.reason in said for said in section.sentences)
    return found.reason


def test_a_model_that_fails_the_task_has_no_certificate():
    """It loses nothing, since there is nothing to lose."""
    dense = record("niah", "dense", None, right(100, 97))
    said = refusal(built([dense, record("niah", "quest", 0.9, right(100, 97))]))
    assert "dense cannot do this task: 0.03 ± 0.02 against chance 0" in said


@pytest.mark.parametrize(("dense", "chance", "tolerance"), [(12, 0.0, 0.06), (14, 0.05, 0.05), (35, 0.25, 0.05)])
def test_a_tolerance_of_half_of_what_dense_can_do_certifies_nothing(dense, chance, tolerance):
    """Dense is far above chance by its errors; within the tolerance a run may have lost half of that, or all."""
    scores = right(1000, 1000 - dense * 10)
    study = built([record("niah", name, s, scores, chance=chance) for name, s in (("dense", None), ("quest", 0.9))])
    said = only(study, certify.Options(tolerance=tolerance))["niah"].reason
    assert f"dense is too near to chance for a loss of {tolerance:g}" in said and "give a smaller --tolerance" in said
    finer = certify.Options(tolerance=tolerance * 0.8, margin=0.05)
    assert only(study, finer)["niah"].certified == 1


def test_a_worst_task_needs_all_its_tasks_done_by_dense():
    floor = [record("vt", method, sparsity, right(100, 90)) for method, sparsity in (("dense", None), ("quest", 0.5))]
    found = only(built(of({"quest": {0.5: 0}}), floor, of({"quest": {0.5: 0}}, task="cwe")))
    assert found["worst task"].certified == 0 and found["worst task"].refused
    assert only(built(of({"quest": {0.5: 0}}), of({"quest": {0.5: 0}}, task="cwe")))["worst task"].certified == 1


def partly(n, start):
    """Documents from `start` on, all wrong; the ones before were not run."""
    return np.concatenate([np.full(start, np.nan), np.zeros(n - start)])


def test_dense_must_do_the_documents_that_the_loss_is_one_of():
    """It does 240 of 300, and none of those that the run has: the run loses nothing there, since nothing is there."""
    dense = np.concatenate([np.ones(240), np.zeros(60)])
    study = built([record("niah", "dense", None, dense), record("niah", "quest", 0.9, partly(300, 240))])
    found = only(study)["niah"]
    assert found.certified == 0 and found.refused
    assert found.reason.startswith("of the 60 documents that the run at 0.9 has as well, dense cannot do this task")
    # Of a part that dense can do it is certified as ever.
    part = np.concatenate([np.ones(100), np.full(200, np.nan)])
    assert (
        only(built([record("niah", "dense", None, dense), record("niah", "quest", 0.9, part)]))["niah"].certified == 1
    )


def test_a_short_run_at_the_end_takes_nothing_from_those_before_it():
    dense, smoke = right(300, 60)[::-1], np.concatenate([np.zeros(5), np.full(295, np.nan)])
    rows = [record("niah", "dense", None, dense[::-1]), record("niah", "quest", 0.5, dense[::-1])]
    found = only(built([*rows, record("niah", "quest", 0.95, smoke)]))["niah"]
    assert found.certified == 1 and found.sparsity == 0.5 and found.tested.p[1] == 1


def test_a_worst_task_and_a_group_are_of_all_tasks_that_the_model_has():
    """quest was not run on cwe and quality, which have dense runs; and where a knob differs, that is not the method."""
    done = [*of({"quest": {0.5: 0}}, task="squad"), *of({"quest": {0.5: 0}}, task="niah")]
    dense = [record(task, "dense", None, right(100)) for task in ("cwe", "quality")]
    found = only(built(done, dense))
    assert found["worst task"].refused and "not run on cwe, quality" in found["worst task"].reason
    assert found["single_qa"].refused and "not run on quality" in found["single_qa"].reason
    assert only(built(done))["worst task"].certified == 1
    other = [record("cwe", "quest", 0.5, np.zeros(100), knobs={"quest": {"x": 2}})]
    both = certify.certify(built(done, dense[:1], other), OPTIONS)
    assert not any(c.certified for row in both for c in row.certificates if c.kind == "worst")
    longer = [record("niah", name, s, right(100), length=16384) for name, s in (("dense", None), ("quest", 0.5))]
    rows = certify.certify(built(done, longer), OPTIONS)  # a length is compared with what it has itself
    assert [c.certified for row in rows for c in row.certificates if c.kind == "worst"] == [1]


@pytest.mark.parametrize(
    "toefl",
    [
        [record("toefl", "dense", None, None), record("toefl", "quest", 0.5, right(100))],
        [record("toefl", "dense", None, right(100)), record("toefl", "quest", 0.5, None)],
        [record("toefl", "dense", None, right(20)), record("toefl", "quest", 0.5, right(20))],
        [record("toefl", "quest", 0.5, right(100))],
    ],
)
def test_a_group_and_a_worst_task_leave_no_task_out(toefl):
    others = [*of({"quest": {0.5: 0}}, task="squad"), *of({"quest": {0.5: 0}}, task="quality")]
    found = only(built(others, toefl))
    for name in ("single_qa", "worst task"):
        assert found[name].refused and not found[name].certified and found[name].reason.startswith("toefl: ")
        assert set(found[name].tasks) == {"squad", "quality", "toefl"}
    whole = only(built(others, of({"quest": {0.5: 0}}, task="toefl")))
    assert whole["single_qa"].certified == whole["worst task"].certified == 1
    # What is never certified is in neither.
    bits = of({"quest": {0.5: 0}}, task="toefl", metric="bits_per_char", chance=None)
    assert only(built(others, bits))["worst task"].certified == 1


def test_a_group_is_not_certified_by_the_documents_that_it_reads():
    """The first 60 of 400 documents lose nothing, the others everything that dense has."""
    dense = np.concatenate([np.zeros(60), np.ones(340)])
    lost = [record("story_retrieval", "dense", None, dense), record("story_retrieval", "quest", 0.5, np.zeros(400))]
    found = only(built(of({"quest": {0.5: 0}}, 60), lost))["multiple_qa"]
    assert found.certified == 0 and found.tested.p[0] == 1


def test_refusals_say_why():
    short = of({"quest": {0.5: 0}}, 30)
    assert "30 documents are too few" in refusal(built(short)) and "could certify 0.074" in refusal(built(short))
    assert "no dense baseline" in refusal(built([record("niah", "quest", 0.5, right(100))]))
    unscored = [record("niah", "dense", None, None), record("niah", "quest", 0.5, None)]
    assert "no bands, no certificate" in refusal(built(unscored))
    bits = of({"quest": {0.5: 0}}, metric="bits_per_char", chance=None)
    assert "never certified" in refusal(built(bits))
    unknown = of({"quest": {0.5: 0}}, chance=None)
    assert "--chance niah=.25" in refusal(built(unknown))


def test_a_task_that_dense_cannot_do_stays_in_the_family_and_hands_on():
    """The family is not chosen by scores; what loses nothing passes its level on."""
    floor = [record("vt", method, sparsity, right(100, 99)) for method, sparsity in (("dense", None), ("quest", 0.5))]
    found = only(built(of({"quest": {0.5: 0}}), floor))
    assert found["niah"].family == 2 and found["niah"].certified == 1
    assert found["vt"].refused and found["vt"].sparsity is None
    # Every task is kept, and one there was nothing to keep of.
    assert found["worst task"].refused and found["worst task"].reason.startswith("vt: dense cannot do this task")


def test_native_knobs_are_ordered_by_measured_sparsity():
    rows = [record("niah", "dense", None, right(100))]
    for k, measured, wrong in ((3, 0.7, 0), (1, 0.93, 20), (2, 0.81, 1)):
        rows.append(
            record("niah", "quest", None, right(100, wrong), measured=measured, knobs={"quest": {"budget": k}},
                   budget_knobs={"quest": ("budget",)})
        )  # fmt: skip
    assert only(built(rows))["niah"].sparsity == 0.81


def test_options_reach_the_result():
    study = built(of({"quest": {0.5: 3}}))
    assert only(study)["niah"].certified == 0
    assert only(study, certify.Options(tolerance=0.1))["niah"].certified == 1
    assert only(study, certify.Options(test="paired-t", level=0.2))["niah"].certified == 1
    caption = certificates.section(study, certify.Options(test="paired-t")).tables[0].caption
    assert "without a finite-sample guarantee" in caption


def test_the_section():
    lengths = [
        of({"quest": {0.5: 0, 0.9: wrong}, "oracle_topk": {0.5: 0}}, task=task, length=length)
        for task, wrong in (("niah", 0), ("vt", 30))
        for length in (4096, 16384)
    ]
    section = certificates.section(built(*lengths))
    wide, long = section.tables
    assert wide.header == ("model", "method", "length", "niah", "vt", "worst task")
    assert ("org/model", "quest", 4096, 0.9, 0.5, 0.5) in wide.rows
    assert len(long.rows) == 12 and "Holm over their sequences" in wide.caption
    assert (
        "quest (org/model, 4,096 tokens) keeps within 0.05 of dense niah up to sparsity 0.9, vt up to sparsity 0.5 "
        "(level 0.1, Holm over 2 tasks, 100 documents)."
    ) in section.sentences
    (figure,) = section.figures
    assert figure.name == "certificates_length" and len(figure.panels) == 1, "oracles are not drawn"
    mean, *dots = figure.panels[0].series
    assert mean.name == "mean" and [one.name for one in dots] == ["niah", "vt"]
    assert {one.colour for one in dots} == {""}, "each task has the colour and mark of its own name"
    assert mean.y == pytest.approx((0.7, 0.7)) and mean.low == pytest.approx((0.7 - np.std([0.9, 0.5], ddof=1),) * 2)


def test_an_empty_study_has_an_empty_section():
    section = certificates.section(built([record("niah", "dense", None, right(50))]))
    assert section.sentences == () and section.tables == ()


def test_a_t_test_is_called_an_approximation_wherever_it_speaks():
    """And the bound is not; nor is a fall of the mean called a loss that gains do not pay for."""
    runs = [of({"quest": {0.5: 0, 0.9: wrong}}, task=task, length=length)
            for task, wrong in (("niah", 1), ("vt", 40)) for length in (4096, 16384)]  # fmt: skip
    runs.append(of({"quest": {0.5: 60}}, task="cwe"))
    said = {}
    for test in guarantee.TESTS:
        section = certificates.section(built(*runs), certify.Options(test=test))
        captions = [one.caption for one in (*section.tables, *section.figures)]
        titles = [section.title, section.tables[0].title, *(figure.title for figure in section.figures)]
        said[test] = titles, captions, section.sentences
        heads = [*section.tables[1].header, *(panel.y_label for figure in section.figures for panel in figure.panels)]
        assert any("certified" in head for head in heads) == (test == "hoeffding-bentkus")
    words = certificates.APPROXIMATE
    for test in ("paired-t", "welch"):
        titles, captions, sentences = said[test]
        assert len(titles) == 3 and len(captions) == 3
        for text in (*titles, *captions, *sentences):
            assert words in text, text
            assert "with a guarantee" not in text and "certified" not in text.lower()
        assert all("fall of the mean" in text for text in captions)
        assert not any("gains do not pay" in text for text in captions)
        assert any(" keeps within" in text for text in sentences) and any(
            "accepts nothing for" in text for text in sentences
        )
    titles, captions, sentences = said["hoeffding-bentkus"]
    assert not any(words in text or "t-test" in text for text in (*titles, *captions, *sentences))
    assert titles[0] == "Largest sparsity with a guarantee" and "gains do not pay for losses" in captions[0]
    assert any("nothing is certified for cwe" in text for text in sentences)


def test_captions_say_why_a_worst_task_may_pass_where_tasks_do_not():
    three = [of({"quest": {0.5: 0}}, 60, task) for task in ("niah", "vt", "cwe")]
    wide, long = certificates.section(built(*three)).tables
    (row,) = wide.rows
    assert row[3:] == (None, None, None, 0.5), "the case that the caption explains"
    assert "A worst task can pass where single tasks are empty" in wide.caption
    assert "It is refused where dense cannot do one of its tasks" in wide.caption
    assert "refused where one of their tasks is" in long.caption and "as well" not in long.caption
