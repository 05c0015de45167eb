"""The commands `analyze` and `recommend`, from result files to files and lines, and what they refuse."""

from __future__ import annotations

import builtins
import csv
import json
import re
import shlex
from pathlib import Path
from typing import Any

import made_up
import pytest

from lm_eval_sparse.analysis import analyze as command
from lm_eval_sparse.cli import app
from lm_eval_sparse.results.load import read

MODELS, LENGTHS = tuple(made_up.SHAPES)[:2], ("4k", "16k")


def grid(**more: Any) -> Any:
    given = {
        "models": MODELS, "lengths": LENGTHS, "tasks": ("niah", "toefl", "story_multihop"),
        "methods": ("quest", "oracle_topk", "vertical_slash"), "sparsities": (0.5, 0.9), **more,
    }  # fmt: skip
    return made_up.runs(**given)


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("study")
    made_up.write(folder, grid(), documents=60)
    return folder


@pytest.fixture(scope="module")
def certain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study in which a method loses nothing on a task that the model can do."""
    folder = tmp_path_factory.mktemp("certain")
    dense = made_up.Run(MODELS[0], "dense", 0.0, "4k", ("niah",))
    made_up.write(folder, iter([dense]), documents=100)
    content, lines = made_up.contents(dense, 100)
    for sparsity in (0.5, 0.9):
        run = made_up.Run(MODELS[0], "quest", sparsity, "4k", ("niah",))
        sparse, _ = made_up.contents(run, 100)
        sparse["results"] = content["results"]
        place = folder / f"quest_{sparsity}"
        place.mkdir()
        (place / "results_x.json").write_text(json.dumps(sparse))
        (place / "documents_x.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return folder


def run(*arguments: object) -> int:
    return app.main([str(argument) for argument in arguments])


def test_everything_is_written_and_read_again(study: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert run("analyze", study, "--output", out) == 0
    said = capsys.readouterr().out
    names = {path.name for path in out.iterdir()}
    assert names == {"report.html", "records.jsonl", "table.csv", "table.parquet", "figures", "contents.json"}
    page = (out / "report.html").read_text()
    assert all(f'id="section-{name}"' in page for name in command.PARTS), said
    assert "dense cannot do this task" in page and "lm-eval-sparse analyze" in page
    with (out / "table.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert len(rows) == 2 * 2 * 7 * 3 * 2 == len((out / "records.jsonl").read_text().splitlines())
    figures = {path.stem for path in (out / "figures").glob("*.svg")}
    assert figures == {path.stem for path in (out / "figures").glob("*.png")}
    assert figures <= {path.stem for path in (out / "figures").glob("*.csv")} and len(figures) >= 10
    # From its own records the same is said, and in the same place.
    again = tmp_path / "again"
    assert run("analyze", out / "records.jsonl", "--output", again, "--no-pictures") == 0
    assert capsys.readouterr().out.replace(str(again), "") == said.replace(str(out), "")
    assert run("analyze", study, "--output", out, "--no-pictures", "--task", "niah") == 0
    with (out / "table.csv").open() as stream:
        assert {row["short"] for row in csv.DictReader(stream)} == {"niah"}
    assert not list((out / "figures").glob("*.png"))


def test_a_link_as_output_stays_and_what_it_leads_to_is_not_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made_up.write(tmp_path / "runs", grid(models=MODELS[:1], lengths=("4k",), methods=("quest",)), documents=30)
    target, link = tmp_path / "runs" / "earlier", tmp_path / "out"
    target.mkdir()
    link.symlink_to(target)
    for _ in range(2):  # the second time the first one's records lie among the runs
        assert run("analyze", tmp_path / "runs", "--output", link, "--no-pictures") == 0
        said = capsys.readouterr().out.splitlines()[-1]
        assert said == f"18 records; look at {link / 'report.html'}" and link.is_symlink()
        lines = [json.loads(line) for line in (target / "records.jsonl").read_text().splitlines()]
        assert len(lines) == 18 == len((link / "records.jsonl").read_text().splitlines())


def test_a_configuration_is_recommended_with_a_line_that_parses(
    certain: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("recommend", certain, "--task", "niah", "--length", "4k") == 0
    said = capsys.readouterr().out
    assert said.startswith("Take quest at sparsity 0.9 of org/small-0.5B: the cheapest of 2 configurations")
    assert "Runner-up: quest at sparsity 0.5" in said and "run a higher sparsity" in said
    option, line = shlex.split(said.splitlines()[-1])
    assert option == "--model_args"
    assert dict(pair.split("=") for pair in line.split(",")) == {
        "pretrained": "org/small-0.5B", "method": "quest", "sparsity": "0.9",
    }  # fmt: skip
    # By what is held, a method that reads less and keeps all is no better than dense.
    assert run("recommend", certain, "--task", "niah", "--by", "memory") == 1
    assert "take dense" in capsys.readouterr().out


@pytest.fixture(scope="module")
def lossless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study in which a method of each phase loses nothing: what it costs is all that it differs by."""
    folder = tmp_path_factory.mktemp("lossless")
    dense = made_up.Run(MODELS[0], "dense", 0.0, "16k", ("niah",))
    made_up.write(folder, iter([dense]), documents=100)
    content, lines = made_up.contents(dense, 100)
    for method in ("vertical_slash", "snapkv", "quest"):
        for sparsity in (0.5, 0.9):
            sparse, _ = made_up.contents(made_up.Run(MODELS[0], method, sparsity, "16k", ("niah",)), 100)
            place = folder / f"{method}_{sparsity}"
            place.mkdir()
            (place / "results_x.json").write_text(json.dumps(sparse | {"results": content["results"]}))
            (place / "documents_x.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return folder


def test_what_is_recommended_follows_what_is_asked_to_be_least(
    lossless: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first: dict[str, str] = {}
    for by in ("memory", "time", "cost"):
        assert run("recommend", lossless, "--task", "niah", "--by", by) == 0
        first[by] = capsys.readouterr().out.splitlines()[0]
    # Only an eviction keeps less; what chooses in decoding keeps all, and its bounds.
    assert first["memory"].startswith("Take snapkv at sparsity 0.9")
    assert re.match("Take (vertical_slash|snapkv|quest) at sparsity 0.9", first["time"])
    for by, method in (("memory", "quest"), ("memory", "vertical_slash")):
        assert run("recommend", lossless, "--task", "niah", "--by", by, "--method", method) == 1
        assert "take dense" in capsys.readouterr().out
    for method in ("vertical_slash", "snapkv", "quest"):
        assert run("recommend", lossless, "--task", "niah", "--by", "time", "--method", method) == 0
        assert f"Take {method} at sparsity 0.9" in capsys.readouterr().out


@pytest.mark.parametrize("method", ["dense", *made_up.METHODS])
def test_made_up_figures_are_those_that_a_report_can_have(method: str) -> None:
    made = made_up.Run(MODELS[0], method, 0.0 if method == "dense" else 0.8, "16k", ("niah", "vt"))
    sparse = made_up.contents(made, 50)[0]["config"]["sparse"]
    ran = sparse["run"]
    for phase, speed in ran["tokens_per_second"].items():
        assert speed == pytest.approx(ran["tokens"][phase] / ran["seconds"][phase])
    assert ran["samples"] == 100 and ran["seconds"]["total"] == pytest.approx(
        ran["seconds"]["prefill"] + ran["seconds"]["decode"]
    )
    for task in sparse["tasks"].values():
        (share,) = {task[phase]["kv_memory_fraction"] for phase in made_up.PHASES}  # a figure of the prompt
        kept = 1 - task["eviction"]["executed_sparsity"]
        assert share == pytest.approx(kept + (1 / 16 if method == "quest" else 0))
        assert task["decode"]["bytes_read_fraction"] <= kept + 1 / 16


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--task", "story_multihop"], r"dense cannot do this task: 0\.\d+ ± 0\.\d+ against chance 0"),
        (["--group", "high_dispersion"], "dense cannot do this task"),
        (["--task", "toefl", "--tolerance", ".01"], r"\d+ documents"),
    ],
)
def test_a_refusal_has_its_reason(
    study: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    assert run("recommend", study, *arguments) == 1
    out = capsys.readouterr().out
    assert out.startswith("Nothing is recommended: ") and re.search(said, out) and "--model_args" not in out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["analyze", "{study}", "--output", "{out}", "--tolerance", "2"], "tolerance"),
        (["analyze", "{study}", "--output", "{out}", "--level", "0"], "level"),
        (["analyze", "{study}", "--output", "{out}", "--level", "x"], "--level x: a number is expected"),
        (["analyze", "{study}", "--output", "{out}", "--batch", "0"], "--batch 0"),
        (["analyze", "{study}", "--output", "{out}", "--chance", "toefl"], "--chance toefl: TASK=LEVEL is expected"),
        (["analyze", "{study}", "--output", "{out}", "--chance", "toefl=2"], "--chance toefl=2: TASK=LEVEL"),
        (["analyze", "{study}", "--output", "{out}", "--chance", "tofl=.2"], "--chance tofl: no such task"),
        (["analyze", "{study}", "--output", "{out}", "--task", "tofl"], "--task tofl: .* did you mean 'toefl'"),
        (["analyze", "{study}", "--output", "{out}", "--metric", "f1"], "--metric f1: no run here has it"),
        (["analyze", "{study}", "--output", "{study}"], "which no analysis has written"),
        (["analyze", "{empty}", "--output", "{out}"], "no results_"),
        (["analyze", "{empty}/none", "--output", "{out}"], "no such file or folder"),
        (["analyze", "{torn}", "--output", "{out}"], "not JSON"),
        (["analyze", "{foreign}", "--output", "{out}"], "not a result file of lm-eval"),
        (["analyze", "{newer}", "--output", "{out}"], "a record of schema 99"),
        (["analyze", "{mixed}", "--output", "{out}"], "runs that cannot be compared: .* seed 0 and 7"),
        (["recommend", "{study}"], "give --task NAME or --group NAME"),
        (["recommend", "{study}", "--task", "niah", "--group", "single_qa"], "one of them"),
        (["recommend", "{study}", "--group", "qa"], "--group qa: choose single_qa"),
        (["recommend", "{study}", "--task", "niah", "--length", "5k"], "--length 5k: a number of tokens"),
        (["recommend", "{study}", "--task", "niah", "--length", "99"], "99"),
        (["recommend", "{study}", "--task", "niah", "--method", "ques"], "--method ques: .* did you mean 'quest'"),
        (["recommend", "{study}", "--task", "niah", "--answer_tokens", "-1"], "--answer_tokens -1"),
    ],
)
def test_what_cannot_work_is_one_line_and_writes_nothing(
    study: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    places = {"study": study, "out": tmp_path / "out", "empty": tmp_path / "empty"}
    places["empty"].mkdir()
    for name, text in (("torn", '{"results": {'), ("foreign", '{"a": 1}')):
        places[name] = tmp_path / f"results_{name}.json"
        places[name].write_text(text)
    places["newer"] = tmp_path / "records.jsonl"
    places["newer"].write_text('{"schema_version": 99, "model": "m"}\n')
    places["mixed"] = tmp_path / "mixed"
    if "{mixed}" in arguments:
        for seed in (0, 7):
            few = made_up.Run(MODELS[0], "dense", 0.0, "4k", ("niah",))
            made_up.write(places["mixed"] / str(seed), iter([few]), documents=3, task_seed=seed)
    before = sorted(tmp_path.rglob("*"))
    assert run(*(argument.format(**places) for argument in arguments)) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("lm-eval-sparse: error: ") and re.search(said, error)
    assert sorted(tmp_path.rglob("*")) == before


def test_without_the_extra_it_says_what_to_type(
    study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = command.importlib.util.find_spec
    monkeypatch.setattr(command.importlib.util, "find_spec", lambda name: None if name == "mapie" else found(name))
    assert run("analyze", study, "--output", tmp_path / "out") == 1
    assert "analyze needs mapie; type pip install 'lm-eval-sparse[analysis]'" in capsys.readouterr().err


def test_plot_needs_nothing_of_the_extra(study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def refusing(name: str, *more: Any, **named: Any) -> Any:
        if name.partition(".")[0] in command._EXTRA:
            raise ImportError(name)
        return real(name, *more, **named)

    monkeypatch.setattr(builtins, "__import__", refusing)
    assert run("plot", study, "--output", tmp_path / "a.png", "--task", "forced_frontier_niah_4k") == 0


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("no dense", "no dense baseline: run the task with method=dense"),
        ("no documents", "no bands, no certificate"),
        ("other documents", "dense and sparse runs have no document in common"),
        ("no chance", "what chance scores is unknown: give --chance niah=.25"),
        ("few", "3 documents are too few: a tolerance of 0.05 at level 0.1 needs 45"),
    ],
)
def test_what_cannot_be_certified_is_said_and_nothing_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], change: str, said: str
) -> None:
    few = grid(models=MODELS[:1], lengths=("4k",), tasks=("niah",), methods=("quest",))
    runs = tmp_path / "runs"
    made_up.write(runs, few, documents=3 if change == "few" else 60)
    for path in list(runs.rglob("*.json*")):
        dense, text = "dense" in str(path), path.read_text()
        if (change == "no dense" and dense) or (change == "no documents" and path.suffix == ".jsonl"):
            path.unlink()
        elif change == "other documents" and not dense:
            path.write_text(text.replace('"doc_hash": "', '"doc_hash": "x'))
        elif change == "no chance":
            path.write_text(text.replace('"chance"', '"luck"'))
    assert run("recommend", runs, "--task", "niah") == 1
    assert said in capsys.readouterr().out
    assert run("analyze", runs, "--output", tmp_path / "out", "--no-pictures") == 0
    page = (tmp_path / "out" / "report.html").read_text()
    assert said in page and "within 0.05 of dense up to" not in page
    printed = capsys.readouterr().out
    assert "?" not in printed and "is a tie" not in page and " tie with " not in page


def test_one_record_is_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made_up.write(tmp_path / "runs", iter([made_up.Run(MODELS[0], "dense", 0.0, "4k", ("niah",))]), documents=30)
    assert run("analyze", tmp_path / "runs", "--metric", "exact", "--output", tmp_path / "out", "--no-pictures") == 0
    said = capsys.readouterr().out
    assert said.splitlines()[-1] == f"1 record; look at {tmp_path / 'out' / 'report.html'}"
    assert "Dense attention can do 1 of 1 task.\n" in said


TOO_LARGE = {
    "length": ("configs", "forced_frontier_niah_4k", "metadata", "length"),
    "seed": ("configs", "forced_frontier_niah_4k", "metadata", "seed"),
    "shots": ("n-shot", "forced_frontier_niah_4k"),
    "n": ("results", "forced_frontier_niah_4k", "sample_len"),
    "peak_memory_bytes": ("config", "sparse", "run", "peak_memory_bytes", "seen"),
    "model_parameters": ("config", "model_num_parameters"),
    "layers": ("config", "sparse", "model", "layers"),
}


@pytest.mark.parametrize("name", TOO_LARGE)
def test_a_whole_number_that_nothing_has_is_a_line_and_no_traceback(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good, bad = tmp_path / "good", tmp_path / "bad"
    made_up.write(good, grid(models=MODELS[:1], tasks=("niah",), methods=("quest",), sparsities=(0.5,)), documents=30)
    made_up.write(bad, iter([made_up.Run(MODELS[0], "quest", 0.9, "4k", ("niah",))]), documents=30)
    (file,) = bad.rglob("results_*.json")
    content = json.loads(file.read_text())
    *way, last = TOO_LARGE[name]
    part = content
    for key in way:
        part = part.setdefault(key, {})
    part[last] = 10**30
    file.write_text(json.dumps(content))
    assert run("analyze", good, bad, "--output", tmp_path / "out", "--no-pictures") == 0
    wanted = (
        r"sample_len is 1\d+, a whole number of at most" if name == "n" else f"{name}: Input should be less than or "
    )
    assert re.search(wanted, (tmp_path / "out" / "report.html").read_text())
    capsys.readouterr()
    assert run("analyze", bad, "--output", tmp_path / "none", "--no-pictures") == 1
    said = capsys.readouterr().err.strip()
    assert "\n" not in said and re.search(wanted, said)


@pytest.mark.parametrize("digits", [30, 400, 1000])
@pytest.mark.parametrize("name", ["schema_version", "model_parameters", "length", "seed", "n", "prompt_tokens"])
def test_a_record_with_a_number_that_nothing_has_is_a_line(
    name: str, digits: int, study: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    value = 10 ** (digits if name != "prompt_tokens" else max(digits, 200))
    (file, *_) = sorted(study.rglob("results_*.json"))
    row = json.loads(next(iter(read([file]))).model_dump_json())
    (tmp_path / "records.jsonl").write_text(json.dumps(row | {name: value}))
    assert run("analyze", tmp_path / "records.jsonl", "--output", tmp_path / "out", "--no-pictures") == 1
    said = capsys.readouterr().err.strip()
    assert "\n" not in said and len(said.partition("line 1: ")[2]) < 250
