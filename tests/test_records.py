"""Result files of any lm-eval task become validated records; what cannot be is said in one line."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import made_up
import numpy as np
import pytest

from lm_eval_sparse.analysis import tidy
from lm_eval_sparse.errors import UserError
from lm_eval_sparse.results import schema
from lm_eval_sparse.results.load import read
from lm_eval_sparse.results.records import records
from lm_eval_sparse.results.schema import Record

RUN = made_up.Run("org/small-0.5B", "quest", 0.8, "4k", ("niah", "toefl"))


def one(folder: Path, run: made_up.Run = RUN, **more: Any) -> Path:
    """A run on disk; returns its result file."""
    made_up.write(folder, iter([run]), **more)
    return next(folder.rglob("results_*.json"))


def documents(path: Path) -> Path:
    return path.with_name(path.name.replace("results_", "documents_")).with_suffix(".jsonl")


def test_a_record_holds_all_that_was_measured(tmp_path: Path) -> None:
    content, lines = made_up.contents(RUN, 30)
    rows = read([one(tmp_path, documents=30)])
    assert [(row.task, row.metric) for row in rows] == [
        ("forced_frontier_niah_4k", "exact"), ("forced_frontier_niah_4k", "bits_per_char"),
        ("forced_frontier_toefl_4k", "acc"), ("forced_frontier_toefl_4k", "bits_per_char"),
    ]  # fmt: skip
    row = rows[2]
    phase = content["config"]["sparse"]["tasks"][row.task]["decode"]
    assert (row.model, row.model_revision, row.model_dtype, row.runner) == (RUN.model, "main", "bfloat16", "sparse-hf")
    assert row.model_parameters == 494_032_768 and row.model_shape is not None and row.model_shape.kv_heads == 2
    assert (row.method, row.phases, row.requested, row.measured) == ("quest", "decode", 0.8, phase["executed_sparsity"])
    assert row.by_phase["decode"].bytes_read_fraction == phase["bytes_read_fraction"]
    assert row.by_phase["decode"].solved["budget"].max == 410.0 and row.by_phase["prefill"].method == "dense"
    assert (row.length, row.prompt_tokens, row.seed, row.task_version, row.shots) == (4096, 4085.5, 0, "2", 0)
    assert (row.chance, row.higher_is_better, row.n) == (0.25, True, 30) and row.bounded and not rows[3].bounded
    assert row.seeds == {"random": 0, "numpy": 1234, "torch": 1234, "fewshot": 1234}
    assert (row.device, row.commit, row.versions["torch"]) == ("NVIDIA H200", "abcdef0", "2.13.0")
    ran = content["config"]["sparse"]["run"]
    assert row.speed == ran["tokens_per_second"] and row.peak_memory_bytes == 10**9
    assert row.seconds_by_phase == ran["seconds"] and row.seconds > row.seconds_by_phase["total"]
    assert row.command is not None and "method=quest" in row.command and "sparsity=0.8" in row.command
    scores = [line["metrics"]["acc"] for line in lines if line["task"] == row.task]
    assert row.documents is not None and list(row.documents.scores) == scores and len(set(row.documents.ids)) == 30


def test_records_survive_their_file(tmp_path: Path) -> None:
    rows = read([one(tmp_path / "runs", documents=5)])
    (tmp_path / "records").mkdir()
    (tmp_path / "records" / "records.jsonl").write_bytes(tidy.lines(rows))
    assert [row.model_dump() for row in read([tmp_path / "records"])] == [row.model_dump() for row in rows]
    assert read([tmp_path / "records"])[0].source.endswith("records.jsonl, line 1")


def lm_eval_content(**row: Any) -> dict[str, Any]:
    """Results of one of lm-eval's own tasks under its own model type, with a group and two filters."""
    return {
        "results": {
            "gsm8k": {
                "alias": "gsm8k", "sample_len": 4,
                "exact_match,strict-match": 0.25, "exact_match_stderr,strict-match": 0.25,
                "exact_match,flexible-extract": 0.5, "exact_match_stderr,flexible-extract": 0.28, **row,
            },
            "arc": {"alias": "arc", "sample_len": 2, "acc,none": 0.5, "acc_stderr,none": "N/A"},
            "both": {"alias": "both", "sample_len": 6, "acc,none": 0.5},
        },
        "groups": {"both": {"acc,none": 0.5}},
        "configs": {
            "gsm8k": {"task": "gsm8k", "output_type": "generate_until", "metadata": {"version": 3.0}},
            "arc": {"task": "arc", "output_type": "multiple_choice", "doc_to_choice": ["A", "B", "C", "D"]},
        },
        "versions": {"gsm8k": 3.0, "arc": "Yaml"},
        "higher_is_better": {"gsm8k": {"exact_match": True}, "arc": {"acc": True}},
        "config": {"model": "hf", "model_args": "pretrained=org/m", "model_sha": ""},
        "model_name": "org/m",
    }  # fmt: skip


def test_any_task_of_any_model_type_loads(tmp_path: Path) -> None:
    path = tmp_path / "results_2026-11-30T12-00-00.000000.json"
    path.write_text(json.dumps(lm_eval_content()))
    lines = [
        {
            "doc_id": place, "doc": {}, "filter": rule, "metrics": ["exact_match"], "doc_hash": f"{place % 3}" * 64,
            "exact_match": float(place < right),
        }
        for rule, right in (("strict-match", 1), ("flexible-extract", 2))
        for place in range(4)
    ]  # fmt: skip
    samples = tmp_path / "samples_gsm8k_2026-11-30T12-00-00.000000.jsonl"
    samples.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    rows = {(row.task, row.metric): row for row in read([path])}
    strict, flexible, arc = (
        rows["gsm8k", "exact_match,strict-match"], rows["gsm8k", "exact_match,flexible-extract"], rows["arc", "acc"],
    )  # fmt: skip
    assert len(rows) == 3  # a group is no task
    assert strict.documents is not None and strict.documents.scores == (1.0, 0.0, 0.0, 0.0)
    assert flexible.documents is not None and flexible.documents.scores == (1.0, 1.0, 0.0, 0.0)
    assert (
        len(set(strict.documents.ids)) == 4 and strict.documents.ids == flexible.documents.ids
    )  # one doc stands twice
    # What guessing scores where an answer is written is for nobody to guess: bbh and mmlu_pro score exact_match too.
    assert (strict.chance, flexible.chance) == (None, None)
    assert (arc.chance, strict.task_version, arc.stderr, arc.documents) == (0.25, "3.0", None, None)
    assert (strict.method, strict.measured, strict.runner, strict.model_hash) == ("dense", 0.0, "hf", None)


@pytest.mark.parametrize(
    ("change", "differs"),
    [
        ({"metadata": {"version": 1.0, "question_first": True}}, True),
        ({"metadata": {"version": 1.0, "note": "x"}}, False),
        ({"training_split": "dev"}, False),  # nothing is taken of it
        ({"num_fewshot": 2, "training_split": "dev"}, True),
        ({"num_fewshot": 2, "fewshot_config": {"sampler": "first_n"}}, True),
        ({"doc_to_text": "<function f at 0x7f00aa>"}, False),  # as that of the base but for the address
        ({"doc_to_text": "<function g at 0x7f00bb>"}, True),
        ({"test_split": "validation"}, True),
    ],
)
def test_what_decides_what_is_asked_is_in_the_hash_of_a_task(change: dict[str, Any], differs: bool) -> None:
    shots = {"num_fewshot": 2, "training_split": "train"} if "num_fewshot" in change else {}
    base = {"task": "gsm8k", "doc_to_text": "<function f at 0x7f00bb>", "metadata": {"version": 1.0}} | shots

    def hashed(config: dict[str, Any]) -> str | None:
        content = lm_eval_content()
        content["configs"]["gsm8k"] |= config
        return next(row.task_hash for row in records(content, "x") if row.task == "gsm8k")

    assert (hashed(base) != hashed(base | change)) == differs


def test_documents_that_are_not_those_of_the_score_are_left_out(tmp_path: Path) -> None:
    path = one(tmp_path, documents=8)
    lines = documents(path).read_text().splitlines()
    said: list[str] = []

    def reread(content: str) -> list[Record]:
        documents(path).write_text(content)
        said.clear()
        return read([path], said)

    assert all(row.documents is None for row in reread("\n".join(lines[1:] + lines[:0]))[:2])
    assert "7 documents are beside it and 8 were scored" in said[0]
    changed = json.loads(lines[0])
    changed["metrics"]["exact"] += 0.5
    rows = reread("\n".join([json.dumps(changed), *lines[1:]]))
    assert rows[0].documents is None and rows[1].documents is not None  # of the other metric they are
    assert any("and not the mean of the documents beside it" in line for line in said)
    for doc_id in (float("inf"), float("nan"), 10**400):
        rows = reread("\n".join([json.dumps(json.loads(lines[0]) | {"doc_id": doc_id}), *lines[1:]]))
        assert all(row.documents is None or doc_id == 10**400 for row in rows)
    changed["metrics"]["exact"] = 10**400
    assert all(row.documents is None for row in reread("\n".join([json.dumps(changed), *lines[1:]]))[:1])
    rows = reread("\n".join(lines)[:-9])
    assert all(row.documents is None for row in rows) and "line 16 is none of a file of documents" in said[0]
    documents(path).unlink()
    assert [row.documents for row in read([path])] == [None] * 4


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"schema_version": 2}, "a record of schema 2, and this version reads up to 1; upgrade lm-eval-sparse"),
        ({"schema_version": 2, "new": 1}, "a record of schema 2, and this version reads up to 1"),
        ({"new": 1}, "new: Extra inputs are not permitted"),
        ({"measured": 1.5}, "measured: Input should be less than or equal to 1 (1.5)"),
        ({"measured": -0.1}, "measured: Input should be greater than or equal to 0"),
        ({"n": 0}, "n: Input should be greater than or equal to 1"),
        ({"score": 1.5, "documents": None}, "exact is 1.5, a number from 0 to 1 is expected"),
        ({"score": 0.123}, "documents are not those of the score: their number or mean differs"),
        ({"n": 2}, "documents are not those of the score: their number or mean differs"),
        ({"task": "wiki", "metric": "perplexity", "score": 1e300, "documents": None}, "score is 1e+300"),
        ({"method": "dense"}, "a dense run with a sparsity of 0.7"),
        ({"schema_version": 0}, "schema_version: Input should be greater than or equal to 1"),
        ({"chance": -0.1}, "chance: Input should be greater than or equal to 0"),
        ({"chance": 5}, "chance: Input should be less than or equal to 1"),
        ({"documents": {"ids": [], "scores": []}}, "documents.ids: Tuple should have at least 1 item"),
        ({"score": None}, "score: Input should be a valid number"),
        ({"stderr": -1}, "stderr: Input should be greater than or equal to 0"),
        ({"model": ""}, "model: String should have at least 1 character"),
        ({"documents": {"ids": ["a", "a"], "scores": [0, 1]}}, "documents: a document stands here twice"),
        ({"documents": {"ids": ["a"], "scores": []}}, "documents: 1 documents with 0 scores"),
    ],
)
def test_a_record_that_cannot_be_is_one_line(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    row = json.loads(read([one(tmp_path, documents=3)])[0].model_dump_json())
    with pytest.raises(UserError) as error:
        schema.parse(json.dumps(row | change), "r.jsonl, line 7")
    assert str(error.value).startswith(f"r.jsonl, line 7: {said}") and "\n" not in str(error.value)


@pytest.mark.parametrize("line", ["", "[]", "{", '"a"', "\x00", "[" * 5000, "null"])
def test_what_is_no_record(line: str) -> None:
    with pytest.raises(UserError, match=r"^x: .*(is no record|Field required|valid dictionary)"):
        schema.parse(line, "x")


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("exact,none", 1.5, "exact is 1.5, a number from 0 to 1 is expected"),
        ("sample_len", 0, "has no documents (sample_len and n-samples are missing or 0)"),
        ("exact_stderr,none", -1.0, "a finite number of at least 0 is expected"),
    ],
)
def test_impossible_scores_are_left_out_and_said(tmp_path: Path, name: str, value: Any, said: str) -> None:
    path = one(tmp_path, documents=3)
    content = json.loads(path.read_text())
    content["results"]["forced_frontier_niah_4k"][name] = value
    path.write_text(json.dumps(content))
    lines: list[str] = []
    rows = read([path], lines)
    assert any(said in line for line in lines) and all("\n" not in line for line in lines)
    if "stderr" not in name:
        assert "exact" not in {row.metric for row in rows}


def test_a_figure_that_cannot_be_is_a_line_and_no_traceback() -> None:
    content, _ = made_up.contents(RUN, 3)
    rng = np.random.default_rng()
    task = content["config"]["sparse"]["tasks"]["forced_frontier_niah_4k"]["decode"]
    for name in rng.permutation(["bytes_read_fraction", "kv_memory_fraction", "executed_sparsity"]):
        broken = copy.deepcopy(content)
        broken["config"]["sparse"]["tasks"]["forced_frontier_niah_4k"]["decode"][name] = -abs(task[name]) - 1
        said: list[str] = []
        # The other task stands; with no other there is nothing to read.
        assert {row.task for row in records(broken, "r", said)} == {"forced_frontier_toefl_4k"}
        (line,) = said
        assert re.fullmatch(
            rf"r: config\.sparse\.tasks\.forced_frontier_niah_4k\.decode\.{name} is -.* is expected", line
        )
        del broken["results"]["forced_frontier_toefl_4k"]
        with pytest.raises(UserError, match=rf"^r: config.*{name} is -.* is expected$"):
            list(records(broken, "r"))


def test_a_task_of_which_a_figure_cannot_be_does_not_hide_the_others(tmp_path: Path) -> None:
    path = one(tmp_path, documents=30)
    content = json.loads(path.read_text())
    whole = {(row.task, row.metric): row.score for row in read([path])}
    for way, value in (
        (("config", "sparse", "tasks", "forced_frontier_niah_4k", "prefill", "executed_sparsity"), 1.5),
        (("config", "sparse", "tasks", "forced_frontier_niah_4k", "decode", "calls"), {"sparse": -1}),
        (("results", "forced_frontier_niah_4k", "sample_len"), -30),
        (("results", "forced_frontier_niah_4k"), 7),
        (("n-shot", "forced_frontier_niah_4k"), "a"),
    ):
        broken = copy.deepcopy(content)
        part = broken
        for key in way[:-1]:
            part = part[key]
        part[way[-1]] = value
        path.write_text(json.dumps(broken))
        said: list[str] = []
        rows = read([path], said)
        kept = {key: score for key, score in whole.items() if "toefl" in key[0] or way[0] == "n-shot"}
        assert {(row.task, row.metric): row.score for row in rows} == kept
        if way[0] != "n-shot":  # what nobody needs is not known, and no word
            assert any("forced_frontier_niah_4k" in line and "expected" in line for line in said), said


@pytest.mark.parametrize("content", ["", "\n \n"])
def test_an_empty_file_of_documents_is_said(tmp_path: Path, content: str) -> None:
    path = one(tmp_path)
    documents(path).write_text(content)
    left_out: list[str] = []
    rows = read([path], left_out)
    assert rows and all(row.documents is None for row in rows)
    assert left_out == [f"{documents(path)} is empty: its run stands without scores by document; run it again for them"]


@pytest.mark.parametrize("content", ["", "{", '{"doc_id": 0}\n'])
def test_a_bad_file_of_samples_takes_no_score_away(tmp_path: Path, content: str) -> None:
    path = tmp_path / "results_2026-11-30T12-00-00.000000.json"
    path.write_text(json.dumps(lm_eval_content()))
    samples = tmp_path / "samples_gsm8k_2026-11-30T12-00-00.000000.jsonl"
    samples.write_text(content)
    left_out: list[str] = []
    rows = read([path], left_out)
    assert rows and all(row.documents is None for row in rows)
    assert len(left_out) == 1 and left_out[0].startswith(str(samples)) and "run it again for them" in left_out[0]


def _lines_of(folder: Path) -> list[str]:
    return tidy.lines(read([one(folder, documents=5)])).decode().splitlines()


@pytest.mark.parametrize("named", [True, False])
def test_bad_lines_do_not_hide_the_good_ones(tmp_path: Path, named: bool, caplog: pytest.LogCaptureFixture) -> None:
    good = _lines_of(tmp_path / "runs")
    newer = json.dumps(json.loads(good[1]) | {"schema_version": 99})
    place = tmp_path / "records"
    place.mkdir()
    file = place / "records.jsonl"
    torn = [good[0], "{", good[2][:-9], newer, good[3], *["[]"] * 4]
    file.write_text("\n".join(torn))
    said: list[str] = []
    rows = read([file if named else place], said)
    assert [row.source for row in rows] == [f"{file}, line {number}" for number in (1, 5)]
    assert said[0].startswith(f"{file}, line 2: ") and "is no record" in said[0]
    assert said[1].startswith(f"{file}, line 3: ") and "is no record" in said[1]
    assert said[2].startswith(f"{file}, line 4: a record of schema 99") and said[3:] == [
        f"{file}: and 4 more of its lines"
    ]
    assert sum("a line is left out" in line for line in caplog.messages) == 4


@pytest.mark.parametrize("named", [True, False])
def test_a_file_without_a_good_line(tmp_path: Path, named: bool) -> None:
    good = _lines_of(tmp_path / "runs")
    place = tmp_path / "records"
    place.mkdir()
    (place / "records.jsonl").write_text("{\n[]\n")
    with pytest.raises(UserError, match="line 1: { is no record"):
        read([place / "records.jsonl" if named else place])
    # Beside files that are good one that was named is still a mistake, and one below a folder is not.
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "records.jsonl").write_text("\n".join(good))
    said: list[str] = []
    if named:
        with pytest.raises(UserError, match="line 1: { is no record"):
            read([place / "records.jsonl", tmp_path / "more"], said)
    else:
        assert len(read([place, tmp_path / "more"], said)) == len(good) and len(said) == 1


def test_secrets_are_in_no_record(tmp_path: Path) -> None:
    content, _ = made_up.contents(RUN, 3)
    content["config"]["model_args"] |= {"token": "hf_abcdefghijklmnopqrstuvwx", "hf_token": "other"}
    for row in records(content):
        assert "hf_abc" not in row.model_dump_json() and "other" not in row.model_dump_json()


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ('{"pretrained": "org/m", "max_length": 1024}', {"pretrained": "org/m", "max_length": 1024}),
        (["pretrained=org/m", "max_length=1024"], {"pretrained": "org/m", "max_length": 1024}),
        ('pretrained=org/m,chat_template_args={"a": 1, "b": false}',
         {"pretrained": "org/m", "chat_template_args": {"a": 1, "b": False}}),
        ("pretrained=org/m,add_bos_token=True,dtype=bfloat16",
         {"pretrained": "org/m", "add_bos_token": True, "dtype": "bfloat16"}),
        (None, {}),
    ],
)  # fmt: skip
def test_arguments_are_read_in_every_form_and_name_the_model(given: Any, expected: dict[str, Any]) -> None:
    content = lm_eval_content()
    content["config"] |= {"model_args": given, "gen_kwargs": "temperature=0.5,do_sample=True"}
    content.pop("model_name", None)
    row = next(iter(records(content, "x")))
    assert row.model_args == expected and row.gen_kwargs == {"temperature": 0.5, "do_sample": True}
    assert row.model == expected.get("pretrained", "hf")
    content["config"]["gen_kwargs"] = 3
    with pytest.raises(UserError, match="gen_kwargs is 3, an object or a text of name=value is expected"):
        records(content, "x")


@pytest.mark.parametrize(
    "change",
    [
        {"model": "sparse-hf"},
        {"model_args": {"method": "quest"}},
        {"model_args": "pretrained=a,sparsity=0.9"},
        {"model": "sparse-hf", "model_args": '{"method": "quest", "sparsity": 0.9}'},
    ],
)
def test_a_run_that_may_have_been_sparse_is_no_dense_one(change: dict[str, Any]) -> None:
    content = lm_eval_content()
    content["config"] |= change
    with pytest.raises(UserError, match=r"without what it measured \(config.sparse is missing\)"):
        records(content, "x")


def test_a_model_given_as_an_object_is_called_by_where_it_came_from() -> None:
    """lm-eval calls all of them by one made-up name."""
    content = lm_eval_content()
    content |= {"model_name": "qdpv68r5", "model_source": "CUSTOM"}
    content["config"] |= {"model": "/models/A/", "model_args": None}
    assert {row.model for row in records(content, "x")} == {"/models/A"}


def test_documents_are_counted_as_older_versions_of_lm_eval_write_it() -> None:
    content = lm_eval_content()
    for row in content["results"].values():
        row.pop("sample_len", None)
    content["n-samples"] = {task: {"original": 9, "effective": 4} for task in content["results"]}
    assert {row.n for row in records(content, "x")} == {4}


def test_model_arguments_given_as_text_are_read_and_masked() -> None:
    content = lm_eval_content()
    content["config"]["model_args"] = "pretrained=org/m, max_length=4096,token=hf_abcdefghijklmnopqrstuvwxyz"
    assert next(iter(records(content, "x"))).model_args == {"pretrained": "org/m", "max_length": 4096}


def test_the_schema_in_the_docs_is_that_of_the_code() -> None:
    text = (Path(__file__).parents[1] / "docs" / "record.schema.json").read_text()
    assert text == schema.json_schema(), (
        "write it anew: python -m lm_eval_sparse.results.schema > docs/record.schema.json"
    )


def test_a_document_that_scores_more_than_there_is_leaves_no_record(tmp_path: Path) -> None:
    path = one(tmp_path, documents=4)
    lines = [json.loads(line) for line in documents(path).read_text().splitlines()]
    scores = [line["metrics"]["exact"] for line in lines if "exact" in line["metrics"]]
    for line, score in zip(lines, [scores[0] + 2, scores[1] - 2, *scores[2:]], strict=False):
        line["metrics"]["exact"] = score  # the mean is what it was
    documents(path).write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    said: list[str] = []
    rows = read([path], said)
    assert "exact" not in {row.metric for row in rows}
    assert any("a number from 0 to 1 is expected" in line for line in said)
