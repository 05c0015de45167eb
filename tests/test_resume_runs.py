"""Runs that go on from the log of samples: what they compute, and that nobody can tell them from whole ones."""

from __future__ import annotations

import json
import math
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import yaml

from lm_eval_sparse import patches
from lm_eval_sparse.errors import UserError
from lm_eval_sparse.methods.plan import parse
from lm_eval_sparse.model import answers
from lm_eval_sparse.model.decoding import Decoding
from lm_eval_sparse.model.lm import SparseHFLM
from lm_eval_sparse.model.resume import FOLDER
from lm_eval_sparse.model.scoring import Scorer
from lm_eval_sparse.results import load

patches.install()

ALL = ["tiny_choice", "tiny_loglikelihood", "tiny_generate", "tiny_rolling"]
ARGS = {"method": "flexprefill+quest", "gamma": 0.5, "min_budget": 0, "block_size": 16, "budget": 32, "page_size": 8,
        "batch_size": 2}  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("resume")
    (folder / "llama").mkdir()
    tiny.tiny_llama(folder / "llama")
    tiny.write_tasks(folder / "tasks", lengths=(70, 110, 90, 60, 80, 100))
    sampled = yaml.safe_load((folder / "tasks" / "tiny_generate.yaml").read_text())
    sampled |= {"task": "tiny_sampled", "repeats": 3, "filter_list": [{"name": "all", "filter": [
        {"function": "take_first_k", "k": 3}]}]}  # fmt: skip
    sampled["generation_kwargs"] |= {"do_sample": True, "temperature": 1.0}
    (folder / "tasks" / "tiny_sampled.yaml").write_text(yaml.safe_dump(sampled))
    return folder


@pytest.fixture(autouse=True, scope="module")
def _without_environment() -> Iterator[None]:
    """lm-eval asks pip for all packages, which takes longer than these runs."""
    from lm_eval import evaluator

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluator, "add_env_info", lambda results: None)
        yield


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was computed: prompts that were scored, and prompts that were answered."""
    found: list[str] = []
    score, decode = Scorer.score_context, Decoding._decode

    def scored(self: Any, *args: Any) -> Any:
        found.append("scored")
        return score(self, *args)

    def decoded(self: Any, decoder: Any, prompts: Any, *rest: Any) -> Any:
        found.extend(["answered"] * len(prompts))
        return decode(self, decoder, prompts, *rest)

    monkeypatch.setattr(Scorer, "score_context", scored)
    monkeypatch.setattr(Decoding, "_decode", decoded)
    return found


class Run:
    """A run as lm-eval's command line does it, with what it saved."""

    def __init__(self, place: Path, output: Path, tasks: list[str], **options: Any):
        from lm_eval import evaluator
        from lm_eval.loggers import EvaluationTracker

        args = {"pretrained": str(place / "llama"), **ARGS, **options.pop("args", {})}
        options.setdefault("log_samples", True)
        tracker = EvaluationTracker(output_path=str(output))
        self.results = evaluator.simple_evaluate(
            "sparse-hf", args, tasks=tasks, task_manager=tiny.manager(place / "tasks"), bootstrap_iters=0,
            evaluation_tracker=tracker, **options,
        )  # fmt: skip
        self.samples = self.results.pop("samples", None)
        tracker.save_results_aggregated(results=self.results, samples=self.samples)
        (self.folder,) = output.iterdir()
        date = tracker.date_id
        self.saved = json.loads((self.folder / f"results_{date}.json").read_text())
        lines = (self.folder / f"documents_{date}.jsonl").read_text().splitlines()
        self.documents = [json.loads(line) for line in lines]
        stats = self.folder / f"sparse_stats_{date}.json"
        self.stats = json.loads(stats.read_text()) if stats.exists() else None
        self.sparse = dict(self.saved["config"]["sparse"])
        self.runs = {one["run"]: one["prompts"] for one in self.sparse.pop("runs")}
        self.log = self.folder / FOLDER

    def lines(self) -> int:
        """Prompts in the log."""
        return sum(len(file.read_bytes().splitlines()) - 1 for file in self.log.rglob("*.jsonl"))


def differences(one: Any, other: Any, where: str = "") -> list[str]:
    """Where two results differ by more than the last digits of sums that were added in another order, and by who made
    what."""
    if isinstance(one, dict) and isinstance(other, dict) and one.keys() == other.keys():
        names = [name for name in one if name not in ("run", "runs")]
        return [found for name in names for found in differences(one[name], other[name], f"{where}.{name}")]
    if isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        return [found for n in range(len(one)) for found in differences(one[n], other[n], f"{where}[{n}]")]
    close = isinstance(one, float) and isinstance(other, float) and math.isclose(one, other, rel_tol=1e-12)
    return [] if one == other or close else [f"{where}: {one!r}, {other!r}"]


def alike(one: Run, other: Run) -> None:
    assert one.saved["results"] == other.saved["results"]  # not a digit is another
    for part in ("sparse", "documents", "stats"):
        assert differences(getattr(one, part), getattr(other, part)) == []
    assert (one.samples is None) == (other.samples is None)
    for task, rows in (one.samples or {}).items():
        for mine, theirs in zip(rows, other.samples[task], strict=True):
            assert mine["resps"] == theirs["resps"] and mine["doc_id"] == theirs["doc_id"]
            assert differences(mine["sparse"], theirs["sparse"]) == []


@pytest.fixture(scope="module")
def whole(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """All documents in one go, with the figures of every head, and two samples looked at."""
    return Run(place, tmp_path_factory.mktemp("whole"), ALL, args={"stats": "full", "diagnose": 2})


def test_a_limit_is_extended(place: Path, tmp_path: Path, made: list[str], whole: Run) -> None:
    """Only what is new is computed, whatever the batch size, and everything is reported."""
    more = {"stats": "full", "diagnose": 2}
    first = Run(place, tmp_path, ALL, limit=2, args=more)
    assert made.count("scored") == 4 and made.count("answered") == 2 and first.lines() == 8
    made.clear()
    second = Run(place, tmp_path, ALL, limit=4, args=more)
    assert made.count("scored") == 4 and made.count("answered") == 2 and second.lines() == 16
    assert list(second.runs.values()) == [8, 8] and first.runs.keys() < second.runs.keys()
    rows = {row["doc_id"]: row["runs"] for row in second.documents if row["task"] == "tiny_choice"}
    assert rows[0] == rows[1] == list(first.runs) and rows[2] == rows[3] != rows[0]
    third = Run(place, tmp_path, ALL, args=more)
    alike(third, whole)
    made.clear()
    fewer = Run(place, tmp_path, ALL, limit=2, args={**more, "batch_size": 1})  # and back
    alike(fewer, first)
    assert made == [] and fewer.runs == first.runs and fewer.lines() == 24
    # The log is no result, and what is one is found.
    assert len(load.find([tmp_path])) == 4


@pytest.mark.parametrize("after", [1, 5])
def test_a_run_that_was_broken_off(
    place: Path, tmp_path: Path, made: list[str], whole: Run, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    with monkeypatch.context() as patch:
        give = answers.Answers.answer

        def answer(self: Any, *args: Any) -> None:
            if len(made) > after:
                raise KeyboardInterrupt
            give(self, *args)

        patch.setattr(answers.Answers, "answer", answer)
        with pytest.raises(KeyboardInterrupt):
            Run(place, tmp_path, ["tiny_choice", "tiny_generate"])
    before = len(made)
    assert before < 12
    second = Run(place, tmp_path, ["tiny_choice", "tiny_generate"])
    assert second.lines() == 12 and sorted(second.runs.values()) == sorted([after, 12 - after])
    assert len(made) == 12 + before - after
    for task in ("tiny_choice", "tiny_generate"):
        assert second.saved["results"][task] == whole.saved["results"][task]


def test_more_is_asked_of_a_sample_than_was_kept(place: Path, tmp_path: Path, made: list[str], whole: Run) -> None:
    """What has no figures per head, or was not looked at, is made again where these are wanted, and only there."""
    tasks = ["tiny_choice", "tiny_generate"]
    plain = Run(place, tmp_path, tasks)
    made.clear()
    looked = Run(place, tmp_path, tasks, args={"diagnose": 2})
    assert made == ["scored"] * 2 and looked.sparse["phases"]["prefill"]["diagnostics"]["samples"] == 2
    assert sorted(looked.runs.values()) == [2, 10]
    for task in tasks:
        assert differences(looked.sparse["tasks"][task], whole.sparse["tasks"][task]) == []
    made.clear()
    full = Run(place, tmp_path, tasks, args={"stats": "full", "diagnose": 2})
    assert len(made) == 12 and len(full.runs) == 1
    made.clear()
    again = Run(place, tmp_path, tasks)  # what has more serves, without what nobody asked for
    assert made == [] and "diagnostics" not in again.sparse["phases"]["prefill"] and again.stats is None
    assert again.saved["results"] == plain.saved["results"]
    assert made == []


def test_sampled_answers(place: Path, tmp_path: Path, made: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of several answers to a prompt each is kept, under its number; another seed draws others."""
    whole = Run(place, tmp_path / "whole", ["tiny_sampled"], limit=2, args={"batch_size": 1})
    assert len({str(text) for row in whole.samples["tiny_sampled"][:1] for text in row["resps"][0]}) == 3
    made.clear()
    with monkeypatch.context() as patch:
        give = answers.Answers.answer

        def answer(self: Any, *args: Any) -> None:
            if len(made) == 3:
                raise KeyboardInterrupt
            give(self, *args)

        patch.setattr(answers.Answers, "answer", answer)
        with pytest.raises(KeyboardInterrupt):
            Run(place, tmp_path / "parts", ["tiny_sampled"], limit=2, args={"batch_size": 1})
    made.clear()
    second = Run(place, tmp_path / "parts", ["tiny_sampled"], limit=2, args={"batch_size": 1})
    assert len(made) == 4 and second.lines() == 6
    alike(second, whole)
    other = Run(place, tmp_path / "parts", ["tiny_sampled"], limit=2, torch_random_seed=5)
    assert other.lines() == 12


def test_documents(place: Path, tmp_path: Path) -> None:
    """With their true numbers, with and without logged samples, and as these have them."""
    picked = {"tiny_choice": [4, 1], "tiny_generate": [0, 5]}  # in an order that is not that of the data
    logged = Run(place, tmp_path, list(picked), samples=picked)
    bare = Run(place, tmp_path, list(picked), samples=picked, log_samples=False)
    assert differences(bare.documents, logged.documents) == [] and bare.samples is None
    found = [(row["task"], row["doc_id"]) for row in bare.documents]
    assert found == [("tiny_choice", 1), ("tiny_choice", 4), ("tiny_generate", 0), ("tiny_generate", 5)]
    texts = [doc["text"] for doc in tiny.documents((70, 110, 90, 60, 80, 100))]
    for row, sample in zip(logged.documents, [s for rows in logged.samples.values() for s in rows], strict=True):
        assert row["doc_hash"] == sample["doc_hash"] and row["filter"] == sample["filter"]
        assert sample["doc"]["text"] == texts[row["doc_id"]]
        assert row["metrics"] == {metric: sample[metric] for metric in sample["metrics"]}
        assert row["prefill_sparsity"] == sample["sparse"]["prefill_sparsity"]
        assert set(row["runs"]) == {request["run"] for request in sample["sparse"]["requests"]}


def test_off(place: Path, tmp_path: Path, made: list[str]) -> None:
    for _ in range(2):
        run = Run(place, tmp_path, ["tiny_choice"], limit=2, args={"resume": 0})
        assert not run.log.exists() and len(run.documents) == 2
    assert made == ["scored"] * 4
    assert parse({}).resume and parse({"resume": True}).resume and not parse({"resume": False}).resume
    for value in ("no", 2, -1, 0.5, [], "0"):
        with pytest.raises(UserError, match="resume=.* is not accepted: give 0 to answer all anew"):
            parse({"resume": value})


def test_what_decides_an_answer(place: Path, tmp_path: Path, made: list[str], caplog: pytest.LogCaptureFixture) -> None:
    """Another model, configuration or task under the same name is not answered by the log; what scores is not asked."""
    one = {"limit": 1, "log_samples": False}
    folder = tmp_path / "copy"
    folder.mkdir()
    tiny.tiny_llama(folder / "llama")
    tiny.write_tasks(folder / "tasks", lengths=(70,))

    def computes(what: list[str], **options: Any) -> None:
        made.clear()
        Run(folder, tmp_path / "out", ["tiny_generate"], **one, **options)
        assert made == what

    computes(["answered"])
    computes([], device="cpu", num_fewshot=0)
    caplog.clear()
    computes(["answered"], args={"budget": 48})
    assert "1 other configuration, which are not used (the nearest: knobs: " in caplog.text
    computes(["answered"], gen_kwargs={"max_gen_toks": 5})
    computes(["answered"], system_instruction="Answer.")
    computes(["answered"], num_fewshot=1)
    task = yaml.safe_load((folder / "tasks" / "tiny_generate.yaml").read_text())
    scored = {**task, "metric_list": [{"metric": "exact_match", "aggregation": "mean", "ignore_case": True}]}
    for changed, computed in ((scored, []), ({**task, "metadata": {"version": 2}}, ["answered"])):
        (folder / "tasks" / "tiny_generate.yaml").write_text(yaml.safe_dump(changed))
        computes(computed)
    (folder / "tasks" / "tiny_generate.yaml").write_text(yaml.safe_dump(task))
    computes([])
    for name, field in (("generation_config", "repetition_penalty"), ("config", "rope_theta")):
        path = folder / "llama" / f"{name}.json"
        before = path.read_text()
        content = json.loads(before)
        if name == "config":
            content["rope_parameters"] = {**(content.get("rope_parameters") or {}), field: 77.0}
        else:
            content[field] = 1.5
        path.write_text(json.dumps(content))
        computes(["answered"])
        path.write_text(before)
    computes([])
    tiny.tiny_llama(folder / "llama", seed=1)
    computes(["answered"])


def test_beside_a_response_cache(place: Path, tmp_path: Path, made: list[str]) -> None:
    """Each answer is counted once, whoever has it."""
    whole = Run(place, tmp_path / "whole", ["tiny_choice", "tiny_rolling"], limit=4)
    cache = str(tmp_path / "answers")
    Run(place, tmp_path / "out", ["tiny_choice", "tiny_rolling"], limit=2, use_cache=cache)
    Run(place, tmp_path / "out", ["tiny_choice", "tiny_rolling"], limit=3)
    made.clear()
    last = Run(place, tmp_path / "out", ["tiny_choice", "tiny_rolling"], limit=4, use_cache=cache)
    assert made == ["scored"] and last.sparse["prompts"] == 8 and sorted(last.runs.values()) == [2, 2, 4]
    assert last.saved["results"] == whole.saved["results"]


def test_a_model_that_is_evaluated_twice(place: Path, tmp_path: Path, made: list[str]) -> None:
    """Nothing is read or kept where results have no place, and the log is closed when the evaluation is over."""
    from lm_eval import evaluator

    lm = SparseHFLM(pretrained=str(place / "llama"), **ARGS)
    manager = tiny.manager(place / "tasks")
    evaluator.simple_evaluate(lm, tasks=["tiny_choice"], task_manager=manager, limit=2, bootstrap_iters=0)
    assert lm.sample_log is None and len(made) == 2
    tasks = manager.load(["tiny_choice"])["tasks"]
    assert "process_results" not in vars(tasks["tiny_choice"])


# --- killed -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def started(place: Path, tmp_path: Path) -> Iterator[Any]:
    """Starts `python -m lm_eval`, and ends what is left of it."""
    running: list[subprocess.Popen[bytes]] = []

    def start(output: str) -> subprocess.Popen[bytes]:
        typed = ",".join(f"{name}={value}" for name, value in {"pretrained": place / "llama", **ARGS}.items()
                         if name != "batch_size")  # fmt: skip
        command = [sys.executable, "-m", "lm_eval_sparse", "run", "--model", "sparse-hf", "--model_args", typed,
                   "--tasks", "tiny_choice,tiny_generate", "--include_path", str(place / "tasks"),
                   "--output_path", str(tmp_path / output)]  # fmt: skip
        with (tmp_path / "said").open("ab") as said:
            running.append(subprocess.Popen(command, stdout=said, stderr=said))
        return running[-1]

    yield start
    for one in running:
        one.kill()
        one.wait()


@pytest.mark.kills
def test_five_kills(place: Path, tmp_path: Path, started: Any) -> None:
    """`kill -9` at random moments of a run on the command line; then it is as if nothing had been."""
    tiny.write_tasks(place / "tasks", lengths=tuple(random.Random(0).choices(range(60, 300), k=120)))
    try:
        killed = 0
        for attempt in range(5):
            one = started("killed")
            before = len(kept(tmp_path / "killed"))
            deadline = time.monotonic() + 120
            while len(kept(tmp_path / "killed")) < before + 3 * attempt + 1 and one.poll() is None:
                assert time.monotonic() < deadline
                time.sleep(0.01)
            time.sleep(random.random() * 0.3)
            one.send_signal(signal.SIGKILL)
            killed += one.wait() == -signal.SIGKILL
        assert killed == 5
        for output in ("killed", "whole"):
            assert started(output).wait() == 0, (tmp_path / "said").read_text()
    finally:
        tiny.write_tasks(place / "tasks", lengths=(70, 110, 90, 60, 80, 100))
    found = {output: saved(tmp_path / output) for output in ("killed", "whole")}
    results, documents = zip(*found.values(), strict=True)
    assert results[0]["results"] == results[1]["results"] and differences(*documents) == []
    runs = [results[0]["config"]["sparse"].pop("runs"), results[1]["config"]["sparse"].pop("runs")]
    assert sum(one["prompts"] for one in runs[0]) == runs[1][0]["prompts"] == 240 and len(runs[0]) == 6
    assert differences(results[0]["config"]["sparse"], results[1]["config"]["sparse"]) == []
    keys = kept(tmp_path / "killed")
    assert len(keys) == len(set(keys)) == 240


def kept(output: Path) -> list[str]:
    """Keys of all whole lines."""
    lines = [line for file in output.rglob(f"{FOLDER}/*/*.jsonl") for line in file.read_bytes().split(b"\n")[1:-1]]
    return [json.loads(line)["key"] for line in lines]


def saved(output: Path) -> tuple[dict[str, Any], list[Any]]:
    (results,), (documents,) = output.rglob("results_*.json"), output.rglob("documents_*.jsonl")
    return json.loads(results.read_text()), [json.loads(line) for line in documents.read_text().splitlines()]
