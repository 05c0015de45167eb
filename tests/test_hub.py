"""Pushing results: lm-eval's own tracker, our patch of it, and the card, against a Hub on the loopback interface.

Long, since one loopback Hub serves all cases.
"""

from __future__ import annotations

import copy
import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hub_records import RESULTS, sample
from huggingface_hub import constants
from loopback_hub import LoopbackHub, Repo, Token

from lm_eval_sparse.cli import app as cli
from lm_eval_sparse.errors import UserError
from lm_eval_sparse.hub import card_text, cards
from lm_eval_sparse.hub import upload as hub
from lm_eval_sparse.model import embedded
from lm_eval_sparse.patches import hub_tracker

REPOSITORY = Path(__file__).resolve().parent.parent
DATE = "2026-11-22T16-35-29.589920"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[LoopbackHub]:
    with LoopbackHub() as running:
        # What HF_ENDPOINT and its like would have set, had huggingface_hub not been imported long ago.
        monkeypatch.setattr(constants, "ENDPOINT", running.url)
        template = running.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(hub, "_sleep", lambda seconds: None)
        yield running


@pytest.fixture(scope="module")
def trackers() -> Any:
    """lm-eval's module with our patch in it, twice over: it must be idempotent."""
    module = pytest.importorskip("lm_eval.loggers.evaluation_tracker")
    hub_tracker.apply(module)
    patched = vars(module.EvaluationTracker).copy()
    hub_tracker.apply(module)
    assert vars(module.EvaluationTracker) == patched
    return module


@pytest.fixture
def evaluate(trackers: Any, server: LoopbackHub, tmp_path: Path) -> Callable[..., Any]:
    """What lm-eval's command line does with a tracker, without the model between: returns the tracker."""

    def run(
        model_args: Any = None,
        samples: bool = False,
        model: str = "sparse-hf",
        tasks: tuple[str, str] = ("tiny", "long"),
        **options: Any,
    ) -> Any:
        options = {"output_path": str(tmp_path / "out"), "token": "hf_test", "push_results_to_hub": True, **options}
        tracker = trackers.EvaluationTracker(**options)
        if model == "sparse-hf":
            hub_tracker.preflight(tracker, log_samples=samples, limit=2, predict_only=False)
        tracker.general_config_tracker.log_experiment_args(
            model_source=model,
            model_args=model_args or RESULTS["config"]["model_args"],
            system_instruction=None,
            chat_template=None,
            fewshot_as_multiturn=False,
        )
        results = copy.deepcopy(RESULTS)
        for part in ("results", "configs"):
            results[part] = {
                dict(zip(("tiny", "long"), tasks, strict=True)).get(task, task): row
                for task, row in results[part].items()
            }
        logged = {tasks[0]: [sample(0), sample(1)], tasks[1]: [sample(0)]} if samples else None
        tracker.save_results_aggregated(results=results, samples=logged)
        for task in logged or ():
            tracker.save_results_samples(task_name=task, samples=logged[task])
        if tracker.push_results_to_hub or tracker.push_samples_to_hub:
            tracker.recreate_metadata_card()
        return tracker

    return run


def front_matter(card: bytes) -> dict[str, Any]:
    return yaml.safe_load(card.decode().split("---\n")[1])


# -- what works

NAMES = {
    "default": ({}, "lm-eval-results", "lm-eval-results"),
    "separate": ({"details_repo_name": "det", "results_repo_name": "res"}, "res", "det"),
    "hub_repo_name": ({"hub_repo_name": "one"}, "one", "one"),
    "org": ({"hub_results_org": "myorg", "results_repo_name": "res"}, "res", "lm-eval-results"),
}


@pytest.mark.parametrize("names", NAMES)
@pytest.mark.parametrize("public", [True, False])
@pytest.mark.parametrize("push", ["results", "results and samples", "samples"])
def test_push(server: LoopbackHub, evaluate: Callable, tmp_path: Path, names: str, public: bool, push: str) -> None:
    options, results_name, details_name = NAMES[names]
    options = {"push_results_to_hub": "results" in push, "push_samples_to_hub": "samples" in push, **options}
    evaluate(samples="samples" in push, public_repo=public, **options)

    owner, suffix = options.get("hub_results_org", "tester"), "" if public else "-private"
    name, folder = embedded.NAME, embedded.NAME.replace("/", "__")
    date = next((tmp_path / "out" / folder).glob("results_*.json")).stem.removeprefix("results_")
    expected: dict[str, set[str]] = {}
    if "results" in push:
        expected[f"{owner}/{results_name}{suffix}"] = {f"{name}/results_{date}.json", "README.md"}
    if "samples" in push:
        files = {f"{folder}/{file}" for file in (f"samples_tiny_{date}.jsonl", f"samples_long_{date}.jsonl")}
        files |= {f"{folder}/results_{date}.json", "README.md"}
        expected.setdefault(f"{owner}/{details_name}{suffix}", set()).update(files)
    assert {repo: set(server.dataset(repo).files) for _, repo in server.repos} == expected
    for _, repo in server.repos:
        assert server.dataset(repo).private is not public
        card = server.dataset(repo).files["README.md"]
        configs = [entry["config_name"] for entry in front_matter(card).get("configs", [])]
        has_samples = any("samples_tiny" in file for file in expected[repo])
        assert configs == ([f"{folder}__long", f"{folder}__tiny"] if has_samples else [])
        assert "| tiny | 1 | 0 | none | acc ↑ | 0.5000 | 0.2500 | 2 | 0.9012 |" in card.decode()


def test_one_commit_for_the_samples_of_all_tasks(server: LoopbackHub, evaluate: Callable) -> None:
    evaluate(samples=True, push_samples_to_hub=True)
    summaries = [commit["summary"] for commit in server.dataset("tester/lm-eval-results-private").commits]
    assert [summary.split()[:3] for summary in summaries] == [["Add", "results", "of"], ["Add", "samples", "of"]] + [
        ["Update", "the", "results"]
    ]


@pytest.mark.parametrize("tasks", [("a/b", "a_b"), ("../../x", "x" * 300), ("a\nb\x1b[1m", "<script>"), ("..", "con")])
def test_samples_of_tasks_of_any_name(
    server: LoopbackHub, evaluate: Callable, tmp_path: Path, tasks: tuple[str, str]
) -> None:
    evaluate(samples=True, push_samples_to_hub=True, push_results_to_hub=False, tasks=tasks)
    (folder,) = (tmp_path / "out").iterdir()
    assert [path for path in tmp_path.rglob("*samples*") if path.parent != folder] == []
    files = server.dataset("tester/lm-eval-results-private").files
    pushed = {name: content for name, content in files.items() if "samples_" in name}
    assert {Path(name).name for name in pushed} == {path.name for path in folder.glob("samples_*.jsonl")}
    assert sorted(content.count(b"\n") for content in pushed.values()) == [1, 2]
    card = files["README.md"]
    assert b"<script" not in card and b"\x1b" not in card
    opened = [entry["data_files"][1]["path"][0] for entry in front_matter(card)["configs"]]
    assert sorted(opened) == sorted(pushed)


def test_a_secret_in_the_samples_stops_the_push(
    server: LoopbackHub, evaluate: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "nobody-knows-this")
    monkeypatch.setitem(RESULTS["configs"], "tiny", {"description": "nobody-knows-this"})
    with pytest.raises(UserError, match=r"results_\S+\.json holds a secret") as error:
        evaluate()
    assert "nobody-knows-this" not in str(error.value) and not server.writes()
    assert list(tmp_path.rglob("results_*.json"))  # what was computed is kept


@pytest.mark.parametrize(
    "card", [b"\xff\xfe", b"---\n- a\n---\n", b"---\na: &a [*a]\n---\n", b"---\ntags: 5\n---\nwords"]
)
def test_an_odd_card_does_not_stop_a_push(server: LoopbackHub, evaluate: Callable, card: bytes) -> None:
    evaluate()
    repo = server.dataset("tester/lm-eval-results-private")
    repo.files["README.md"] = card
    evaluate()
    assert b"## Scores" in repo.files["README.md"]
    assert (b"words" in repo.files["README.md"]) == (b"words" in card)


def test_only_this_run_is_pushed(server: LoopbackHub, evaluate: Callable, tmp_path: Path) -> None:
    """lm-eval uploads the whole folder: with a file name as output path, everything beside that file."""
    (tmp_path / "secret.txt").write_text("mine")
    (tmp_path / "samples_tiny_2020-01-01T00-00-00.jsonl").write_text("{}\n")
    evaluate(samples=True, push_samples_to_hub=True, output_path=str(tmp_path / "scores.json"))
    names = {Path(name).name.split("_2")[0] for name in server.dataset("tester/lm-eval-results-private").files}
    assert names == {"README.md", "scores", "samples_tiny", "samples_long"}
    assert not any("2020-01-01" in name for name in server.dataset("tester/lm-eval-results-private").files)


def test_large_files_go_through_lfs(server: LoopbackHub, evaluate: Callable) -> None:
    server.lfs_bytes = 1
    evaluate(samples=True, push_samples_to_hub=True)
    assert server.blobs
    files = server.dataset("tester/lm-eval-results-private").files
    assert sum(name.endswith(".jsonl") for name in files) == 2


def test_gated_before_the_first_file(server: LoopbackHub, evaluate: Callable) -> None:
    evaluate(samples=True, push_samples_to_hub=True, public_repo=True, gated=True)
    repo = server.dataset("tester/lm-eval-results")
    assert repo.gated == "auto"
    calls = [call for call in server.writes() if "/settings" in call or "/commit/" in call]
    assert "/settings" in calls[0]
    repo.gated = "manual"
    evaluate(samples=True, push_samples_to_hub=True, public_repo=True, gated=True)
    assert repo.gated == "manual", "a stricter gate set by hand stays"


@pytest.mark.parametrize("status", [412, 503])
def test_a_busy_hub_is_asked_again(server: LoopbackHub, evaluate: Callable, status: int) -> None:
    answers = [status, status]
    server.fail = lambda method, path: answers.pop() if "/commit/" in path and answers else None
    evaluate()
    assert not answers
    assert "README.md" in server.dataset("tester/lm-eval-results-private").files


def test_the_second_run_keeps_the_first_and_the_text_of_people(server: LoopbackHub, evaluate: Callable) -> None:
    evaluate(samples=True, push_samples_to_hub=True)
    repo = server.dataset("tester/lm-eval-results-private")
    card = repo.files["README.md"].decode()
    repo.files["README.md"] = card.replace("tags:", "license: mit\ntags:\n- mine").encode() + b"\n## Notes\nby hand\n"
    evaluate(samples=True, push_samples_to_hub=True)
    card = repo.files["README.md"].decode()
    assert card.count(card_text.BEGIN) == card.count(card_text.END) == card.count("## Scores") == 1
    assert card.endswith("by hand\n")
    data = front_matter(card.encode())
    assert data["license"] == "mit" and data["tags"][0] == "mine" and "lm-eval-sparse" in data["tags"]
    assert len([name for name in repo.files if "samples_tiny" in name]) == 2
    newest = max(name for name in repo.files if "samples_tiny" in name)
    assert [entry["data_files"][1]["path"] for entry in data["configs"]][1] == [newest]


# -- names


def test_a_folder_is_published_under_its_own_name(server: LoopbackHub, evaluate: Callable, tmp_path: Path) -> None:
    folder = tmp_path / "home" / "somebody" / "my model [v2]"
    folder.mkdir(parents=True)
    evaluate(model_args={"pretrained": str(folder), "method": "dense"}, samples=True, push_samples_to_hub=True)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["my model __v2__"]
    files = server.dataset("tester/lm-eval-results-private").files
    assert {name.split("/")[0] for name in files} == {"README.md", "my model __v2__"}
    assert "somebody" not in files["README.md"].decode()


@pytest.mark.parametrize(
    "model_args, expected",
    [
        (None, (embedded.NAME, None)),
        ("method=flexprefill,sparsity=0.9", (embedded.NAME, None)),
        ({"pretrained": embedded.NAME}, (embedded.NAME, None)),
        ("pretrained=org/model,delta=0.5", ("org/model", "org/model")),
        ({"pretrained": "org/model", "peft": "org/adapter"}, ("org/adapter", "org/adapter")),
        ({"pretrained": "somewhere/tiny"}, ("tiny", None)),
        ({"pretrained": "./somewhere/tiny/"}, ("tiny", None)),
        ({"pretrained": "hub/models--org--name/snapshots/0123"}, ("org/name", "org/name")),
    ],
)
def test_public_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model_args: Any, expected: tuple[str, str | None]
) -> None:
    pytest.importorskip("lm_eval")
    (tmp_path / "somewhere" / "tiny").mkdir(parents=True)
    (tmp_path / "hub" / "models--org--name" / "snapshots" / "0123").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert hub_tracker.public_name(model_args) == expected


def test_other_models_are_left_to_lm_eval(server: LoopbackHub, evaluate: Callable, tmp_path: Path) -> None:
    """Its defect included: the push without samples dies in its card, under the path as a name."""
    with pytest.raises(IndexError):
        evaluate(model="hf", model_args={"pretrained": str(tmp_path)})
    (name,) = server.dataset("tester/lm-eval-results-private").files
    assert name.startswith(str(tmp_path).lstrip("/"))


# -- what cannot work is refused before the run

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no output path": ({"output_path": None}, "add --output_path"),
    "samples not logged": ({"push_samples_to_hub": True}, "add --log_samples"),
    "gated without samples": ({"gated": True}, "add push_samples_to_hub=True"),
    "a word for public": ({"public_repo": "no"}, "public_repo=False"),
    "a word for push": ({"push_results_to_hub": "off"}, "push_results_to_hub=False"),
    "a word for gated": ({"gated": "yes"}, "gated=True or gated=False"),
    "owner in the name": ({"hub_repo_name": "tester/x"}, "hub_results_org"),
    "foreign organisation": ({"hub_results_org": "nobody"}, "it can write to tester, myorg, not to 'nobody'"),
    "reader of the organisation": ({"hub_results_org": "readers"}, "not to 'readers'"),
    "read-only token": ({"token": "hf_read"}, "read-only"),
    "rejected token": ({"token": "hf_wrong", "hub_results_org": "tester"}, "rejects the token"),
    "fine-grained elsewhere": ({"token": "hf_fine", "hub_results_org": "myorg"}, "no write permission"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(server: LoopbackHub, evaluate: Callable, tmp_path: Path, case: str) -> None:
    options, words = REFUSED[case]
    allowed = [{"entity": {"type": "user", "name": "tester"}, "permissions": ["repo.content.read", "repo.write"]}]
    server.tokens["hf_fine"] = Token("fineGrained", allowed)
    with pytest.raises(UserError) as refusal:
        evaluate(**options)
    assert words in str(refusal.value) and "\n" not in str(refusal.value)
    assert not server.writes() and not server.repos and not list(tmp_path.iterdir())


def test_a_fine_grained_token_that_covers_the_owner(server: LoopbackHub, evaluate: Callable) -> None:
    scope = {"entity": {"type": "org", "name": "myorg"}, "permissions": ["repo.write"]}
    server.tokens["hf_fine"] = Token("fineGrained", [scope])
    evaluate(token="hf_fine", hub_results_org="myorg")
    assert ("dataset", "myorg/lm-eval-results-private") in server.repos


def test_private_results_never_go_to_a_public_repository(server: LoopbackHub, evaluate: Callable) -> None:
    evaluate()
    repo = server.dataset("tester/lm-eval-results-private")
    repo.private, before = False, len(server.writes())
    with pytest.raises(UserError, match="is a public repository; make it private"):
        evaluate()
    assert len(server.writes()) == before


def test_an_existing_repository_that_the_token_may_only_read(server: LoopbackHub, evaluate: Callable) -> None:
    evaluate()
    before = len(server.writes())
    with pytest.raises(UserError, match="may not write to tester/lm-eval-results-private"):
        evaluate(token="hf_read")
    assert len(server.writes()) == before


@pytest.mark.parametrize("public", [True, False])
def test_a_repository_of_somebody_else(server: LoopbackHub, evaluate: Callable, public: bool) -> None:
    """One that is there: seen and not written to, or not even seen."""
    name = "nobody/lm-eval-results" + ("" if public else "-private")
    server.repos[("dataset", name)] = Repo(name, "dataset", private=not public)
    with pytest.raises(UserError, match=f"the token may not write to {name} .403"):
        evaluate(hub_results_org="nobody", public_repo=public)
    assert not server.writes()


@pytest.mark.parametrize("status", [401, 403, 500, 503])
@pytest.mark.parametrize("call", ["whoami", "datasets"])
def test_a_hub_that_does_not_say_who_may_write(
    server: LoopbackHub, evaluate: Callable, tmp_path: Path, status: int, call: str
) -> None:
    server.fail = lambda method, path: status if call in path else None
    with pytest.raises(UserError) as refusal:
        evaluate(hub_results_org="tester")
    words = "rejects the token" if (status, call) == (401, "whoami") else str(status)
    assert words in str(refusal.value) and "\n" not in str(refusal.value)
    assert not server.writes() and not list(tmp_path.iterdir())


def test_output_path_below_a_file(server: LoopbackHub, evaluate: Callable, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file"):
        evaluate(output_path=str(tmp_path / "file" / "out"))
    assert not server.writes()


def test_hub_out_of_reach(server: LoopbackHub, evaluate: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UserError, match="cannot be reached"):
        evaluate(hub_results_org="tester")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="HF_HUB_OFFLINE"):
        evaluate(hub_results_org="tester")


def test_nothing_to_push_asks_nothing(server: LoopbackHub, evaluate: Callable, tmp_path: Path) -> None:
    evaluate(push_results_to_hub=False, token="hf_wrong", gated="yes", samples=True)
    assert not server.log
    assert len(list((tmp_path / "out" / embedded.NAME.replace("/", "__")).iterdir())) == 3


# -- what fails all the same is said after the files are safe


@pytest.mark.parametrize("broken", ["res-private", "det-private"])
def test_a_failed_upload(
    server: LoopbackHub, evaluate: Callable, tmp_path: Path, capsys: pytest.CaptureFixture[str], broken: str
) -> None:
    server.fail = lambda method, path: 403 if "/commit/" in path and broken in path else None
    with pytest.raises(UserError) as failure:
        evaluate(samples=True, push_samples_to_hub=True, results_repo_name="res", details_repo_name="det")
    folder = tmp_path / "out" / embedded.NAME.replace("/", "__")
    assert len(list(folder.iterdir())) == 3
    said = str(failure.value)
    assert f"the results are safe in {folder}, but pushing to tester/{broken} failed (403" in said
    assert f"hf upload tester/{broken} " in said and "--private" in said and "\n" not in said
    assert ("tester/res-private" in said) == (broken == "res-private")
    assert "|tiny |" in capsys.readouterr().out
    assert not server.dataset(f"tester/{broken}").files


def test_a_failed_card(server: LoopbackHub, evaluate: Callable, capsys: pytest.CaptureFixture[str]) -> None:
    server.fail = lambda method, path: 403 if "/tree/" in path else None
    with pytest.raises(UserError, match="everything is pushed but the card: pushing to tester/.* failed"):
        evaluate()
    assert "|tiny |" in capsys.readouterr().out


def test_files_that_could_not_be_saved(
    server: LoopbackHub, evaluate: Callable, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(UserError, match="could not be, nor elsewhere .*nothing was pushed"):
        evaluate()
    assert "|tiny |" in capsys.readouterr().out
    assert not server.writes()


def test_samples_that_could_not_be_saved(
    server: LoopbackHub, evaluate: Callable, trackers: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trackers, "sanitize_list", lambda resps: 1 / 0)
    with pytest.raises(UserError, match="the samples .* could not be, nor elsewhere"):
        evaluate(samples=True, push_samples_to_hub=True)
    assert not any("samples" in name for name in server.dataset("tester/lm-eval-results-private").files)


# -- the card


def test_card_contents() -> None:
    files = [f"org__m/results_{DATE}.json", f"org__m/samples_tiny_{DATE}.jsonl", "other.txt"]
    results = {**RESULTS, "model_name": "org/m", "system_instruction": "it's you", "chat_template": "x"}
    results["config"] = {**RESULTS["config"], "model_args": {"pretrained": "/home/me/secret/m", "token": "hf_x"}}
    card = cards.results_card(results, repo_id="a/b", files=files, model_url="http://hub/org/m", contact="me|you")
    assert "/home/me" not in card and "secret" not in card and "hf_x" not in card
    for line in (
        "| Method | flexprefill |",
        "| Requested sparsity | 0.9 |",
        "| Sparsity executed by the kernel | 0.8990 |",
        "| Attention calls sparse / dense / fallback | 60 / 2 / 1 |",
        "| tiny | 1 | 0 | none | a\\|b | 3.0000 | – | 2 | 0.9012 |",
        "lm_eval_sparse 0.1.0, torch 2.13.0.",
        "| Contact | me\\|you |",
        "- long: 128000 tokens are more than the model's 8192",
        f'"org__m/results_{DATE}.json"',
        'load_dataset("a/b", "org__m__tiny", split="latest")',
        "lm_eval --model sparse-hf --model_args pretrained=path/to/m --tasks tiny,long --num_fewshot 0 --limit 2 "
        "--system_instruction 'it'\"'\"'s you' --apply_chat_template",
    ):
        assert line in card, line
    assert "| | prefill |" in card, "a phase that made no call has no column"
    assert "\n\n\n" not in card


def test_card_of_methods_in_several_phases() -> None:
    calls = {"calls": {"sparse": 30, "dense": 0, "fallback": 0}, "backends": {"gather": 30}}
    phases = {
        "prefill": {"requested_sparsity": None, "executed_sparsity": 0.0, "calls": {"dense": 30}, "backends": {}},
        "eviction": {"requested_sparsity": 0.5, "executed_sparsity": 0.501, **calls},
        "decode": {"requested_sparsity": 0.8, "executed_sparsity": 0.799, **calls},
    }
    knobs = {"snapkv": {"window": 256, "kernel": 21}, "quest": {"page_size": 16}}
    sparse = {"method": "snapkv+quest", "requested_sparsity": None, "knobs": knobs, "phases": phases}
    config = {**RESULTS["config"], "sparse": {**sparse, "tasks": {"tiny": phases}}}
    card = cards.results_card({**RESULTS, "config": config}, repo_id="a/b")
    for line in (
        "| Knobs of snapkv | window=256, kernel=21 |",
        "| Knobs of quest | page_size=16 |",
        "| | prefill | eviction | decode |",
        "| Requested sparsity | – | 0.5000 | 0.8000 |",
        "| tiny | 1 | 0 | none | a\\|b | 3.0000 | – | 2 | 0.5010 / 0.7990 |",
    ):
        assert line in card, line


def test_card_of_sparse_results_says_so_and_of_dense_ones_too() -> None:
    dense = {"config": {"sparse": {"method": "dense", "requested_sparsity": None}}, "model_name": "m"}
    assert "dense attention, the baseline" in cards.results_card(dense, repo_id="a/b")
    assert "training-free sparse attention" in cards.results_card(RESULTS, repo_id="a/b")
    assert "dense attention" in cards.results_card({}, repo_id="a/b"), "an older results file has no sparse block"


def test_cards_merge() -> None:
    ours = cards.results_card(RESULTS, repo_id="a/b")
    theirs = "---\nlicense: mit\npretty_name: Mine\n---\n# Mine\n\nhello\n"
    merged = card_text.merge_cards(theirs, ours)
    assert front_matter(merged.encode())["pretty_name"] == "Mine"
    assert merged.index("hello") < merged.index(card_text.BEGIN)
    assert card_text.merge_cards(merged, ours) == merged
    generated = "---\npretty_name: x\n---\nDataset automatically created during the evaluation run of model m\n"
    assert card_text.merge_cards(generated, ours) == card_text.merge_cards("", ours)


# -- lm-eval's command line, the real model type

TASK = """\
task: tiny_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {docs}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{q}}}}"
doc_to_choice: ["yes", "no"]
doc_to_target: c
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
metadata: {{version: 1.0}}
"""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny random Llama (without BOS token) and a folder of one task."""
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("hub")
    words = ["<eos>", "<unk>", "a", "b", "c", "d", "yes", "no", "?"]
    vocabulary = {word: index for index, word in enumerate(words)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    special = {"eos_token": "<eos>", "unk_token": "<unk>", "pad_token": "<eos>"}
    model = str(folder / "model" / "tiny-llama")
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(model)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.LlamaConfig(vocab_size=len(words), max_position_embeddings=64, **sizes)
    transformers.LlamaForCausalLM(config).save_pretrained(model)
    tasks = folder / "tasks"
    tasks.mkdir()
    (tasks / "docs.json").write_text(json.dumps([{"q": "a b ?", "c": 0}, {"q": "c d ?", "c": 1}] * 2))
    (tasks / "task.yaml").write_text(TASK.format(docs=json.dumps(str(tasks / "docs.json"))))
    return folder


def command(inputs: Path, output: Path | None, *more: str) -> list[str]:
    pretrained = f"pretrained={inputs / 'model' / 'tiny-llama'},method=dense"
    tasks = ["--tasks", "tiny_choice", "--include_path", str(inputs / "tasks"), "--limit", "2", "--device", "cpu"]
    saved = ["--output_path", str(output)] if output else []
    return ["run", "--model", "sparse-hf", "--model_args", pretrained, *tasks, *saved, *more]


def environment(server: LoopbackHub, home: Path) -> dict[str, str]:
    dropped = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE")
    kept = {key: value for key, value in os.environ.items() if key not in dropped}
    ours = {"HF_ENDPOINT": server.url, "HF_TOKEN": "hf_test", "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
    return {**kept, **ours, "PYTHONPATH": str(REPOSITORY), "HF_HUB_DISABLE_TELEMETRY": "1"}


def python(server: LoopbackHub, home: Path, *argv: str) -> subprocess.CompletedProcess[str]:
    settings: dict[str, Any] = {"cwd": home, "env": environment(server, home), "text": True, "timeout": 300}
    return subprocess.run([sys.executable, *argv], capture_output=True, **settings)


@pytest.mark.slow
def test_command_line_with_samples(inputs: Path, tmp_path: Path) -> None:
    """A process of its own with the environment that users set; then what was pushed opens with `datasets`."""
    with LoopbackHub() as server:
        push = ["--hf_hub_log_args", "push_results_to_hub=True,push_samples_to_hub=True"]
        arguments = command(inputs, tmp_path / "out", "--log_samples", *push)
        code = """if True:
            import runpy
            try:
                runpy.run_module("lm_eval_sparse", run_name="__main__")
            except SystemExit as end:
                assert not end.code
            from datasets import load_dataset
            config = "tiny-llama__tiny_choice"
            print("rows", len(load_dataset("tester/lm-eval-results-private", config, split="latest")))
        """
        done = python(server, tmp_path, "-c", code, *arguments)
        assert done.returncode == 0, done.stderr[-3000:]
        assert "|tiny_choice|" in done.stdout.replace(" ", "")
        assert done.stdout.splitlines()[-1] == "rows 2"
        repo = server.dataset("tester/lm-eval-results-private")
        assert repo.private
        kinds = sorted(name.split("_2")[0] for name in repo.files)
        assert kinds == ["README.md", "tiny-llama/results", "tiny-llama/samples_tiny_choice"]
        assert (tmp_path / "out" / "tiny-llama").is_dir()
        card = repo.files["README.md"].decode()
        assert "| tiny_choice |" in card and str(inputs) not in card


@pytest.fixture
def run_here(
    server: LoopbackHub, monkeypatch: pytest.MonkeyPatch, inputs: Path, trackers: Any
) -> Callable[..., tuple[int | None, str]]:
    """The same command line in this process, with only the test's task known (lm-eval's own take 5 s to find)."""
    tasks = pytest.importorskip("lm_eval.tasks")
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    # lm-eval's log handler outlives the stream that pytest gave to an earlier test.
    monkeypatch.setattr(logging, "raiseExceptions", False)
    known = tasks.TaskManager.__init__
    monkeypatch.setattr(
        tasks.TaskManager, "__init__", lambda self, **kwargs: known(self, **{**kwargs, "include_defaults": False})
    )

    def run(output: Path | None, *more: str) -> tuple[int | None, str]:
        return cli.main(command(inputs, output, *more))

    return run


@pytest.mark.parametrize("public", ["True", "False"])
def test_command_line_without_samples(
    run_here: Callable, server: LoopbackHub, tmp_path: Path, capsys: pytest.CaptureFixture[str], public: str
) -> None:
    status = run_here(tmp_path / "out", "--hf_hub_log_args", f"push_results_to_hub=True,public_repo={public}")
    assert status == 0
    assert "tiny_choice" in capsys.readouterr().out
    ((_, repo),) = server.repos
    assert repo == "tester/lm-eval-results" + {"True": "", "False": "-private"}[public]
    assert sorted(name.split("_2")[0] for name in server.dataset(repo).files) == ["README.md", "tiny-llama/results"]


@pytest.mark.parametrize(
    "options, token, words",
    [
        ("push_results_to_hub=True", "hf_test", "add --output_path"),
        ("push_results_to_hub=True,push_samples_to_hub=True", "hf_test", "add --log_samples"),
        ("push_results_to_hub=True", "hf_wrong", "rejects the token"),
        ("push_results_to_hub=True", "", "there is no token; set HF_TOKEN"),
        ("push_result_to_hub=True", "hf_test", "did you mean 'push_results_to_hub'"),
        ("push_results_to_hub=True,hub_results_org=nobody", "hf_test", "not to 'nobody'"),
    ],
)
def test_command_line_refuses_before_compute(
    run_here: Callable,
    server: LoopbackHub,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    options: str,
    token: str,
    words: str,
) -> None:
    from lm_eval_sparse.model.lm import SparseHFLM

    monkeypatch.setattr(SparseHFLM, "__init__", lambda *args, **kwargs: pytest.fail("the model was built"))
    monkeypatch.setenv("HF_TOKEN", token)
    status = run_here(None if "output_path" in words else tmp_path / "out", "--hf_hub_log_args", options)
    shown = capsys.readouterr().err
    assert status == 1 and words in shown.splitlines()[-1] and "Traceback" not in shown
    assert not server.writes() and not (tmp_path / "out").exists()


@pytest.mark.parametrize("org", ["", ",hub_results_org=tester"])
def test_command_line_without_a_hub(
    run_here: Callable, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, org: str
) -> None:
    """lm-eval itself asks whose token it is when no organisation is given."""
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    status = run_here(tmp_path / "out", "--hf_hub_log_args", f"push_results_to_hub=True{org}")
    shown = capsys.readouterr().err
    assert status == 1 and "cannot be reached" in shown.splitlines()[-1] and "Traceback" not in shown
    assert not (tmp_path / "out").exists()


def test_command_line_says_that_an_upload_failed(
    run_here: Callable, server: LoopbackHub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.fail = lambda method, path: 403 if "/commit/" in path else None
    status = run_here(tmp_path / "out", "--hf_hub_log_args", "push_results_to_hub=True")
    shown = capsys.readouterr()
    assert status == 1 and "|tiny_choice|" in shown.out.replace(" ", "")
    assert "the results are safe in" in shown.err and "Traceback" not in shown.err
    assert len(list((tmp_path / "out" / "tiny-llama").glob("results_*.json"))) == 1
