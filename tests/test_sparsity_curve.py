"""The example that runs several methods: which results it takes for its own, and what it refuses before the first."""

from __future__ import annotations

import copy
import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import made_up
import pytest

from lm_eval_sparse import frontier
from lm_eval_sparse.errors import UserError
from lm_eval_sparse.model import embedded

SCRIPT = Path(__file__).parents[1] / "examples" / "sparsity_curve.py"
TASK = "forced_frontier_niah_4k"


@pytest.fixture(scope="module")
def manager() -> Any:
    tasks = pytest.importorskip("lm_eval.tasks")
    # lm-eval's own tasks take seconds to list.
    return tasks.TaskManager(include_path=str(SCRIPT.parents[1] / "tasks" / "niah"), include_defaults=False)


@pytest.fixture
def script(manager: Any, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The example, which notes what it would run instead of running it."""
    spec = importlib.util.spec_from_file_location("sparsity_curve", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.ran = []

    class Tracker:
        def __init__(self, output_path: str):
            self.folder = Path(output_path)

        def save_results_aggregated(self, results: dict[str, Any], samples: Any) -> None:
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / "results_now.json").write_text(json.dumps(results))

    def evaluate(**options: Any) -> dict[str, Any]:
        module.ran.append((options["model_args"]["method"], options["model_args"]["sparsity"]))
        given = {"pretrained": embedded.NAME, **options["model_args"]}
        return {**results(options["limit"], **given), "samples": {}}

    monkeypatch.setattr(module, "TaskManager", lambda: manager)
    monkeypatch.setattr(module, "EvaluationTracker", Tracker)
    monkeypatch.setattr(module, "simple_evaluate", evaluate)
    return module


def results(limit: Any = 2, **model_args: Any) -> dict[str, Any]:
    """What a run saves, as far as it tells runs apart."""
    model_args = model_args or {
        "method": "quest",
        "sparsity": 0.5,
        "backend": "gather",
        "pretrained": embedded.NAME,
    }
    version = frontier.recipe("niah").version
    metadata = {
        "version": version,
        "samples": 100,
        "seed": 0,
        "length": 4096,
        "prompt_tokens": 4096,
        "answer_tokens": 256,
        "chance": {"exact": 0.0},
        "config_source": "/x",
    }
    method = model_args.get("method", "dense")
    run = made_up.Run("org/small-0.5B", method, float(model_args.get("sparsity", 0)), "4k", ("niah",))
    measured = made_up.contents(run, 2)[0]["config"]["sparse"]
    measured["tasks"] = {TASK: next(iter(measured["tasks"].values()))}
    return {
        "results": {TASK: {"exact,none": 0.5, "sample_len": 2}},
        "configs": {TASK: {"task": TASK, "metadata": metadata}},
        "config": {
            "model": "sparse-hf",
            "model_args": model_args,
            "limit": limit,
            "gen_kwargs": None,
            "sparse": measured,
        },
        "chat_template": None,
        "system_instruction": None,
    }


def command(output: Path, *more: str) -> list[str]:
    given = ["--method", "quest", "--sparsity", "0.5", "--limit", "2", "--backend", "gather"]
    return [*given, "--output_path", str(output), *more]


def test_each_run_once(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    sparsities = ("--sparsity", "0", "0.5", "0.5", "0.9")
    script.main(command(tmp_path, *sparsities))
    assert script.ran == [("dense", 0.0), ("quest", 0.5), ("quest", 0.9)] and not caplog.records
    capsys.readouterr()
    script.main(command(tmp_path, *sparsities))
    assert len(script.ran) == 3 and capsys.readouterr().out.count("done before") == 3


def test_a_table_of_all_runs_and_results_of_the_command_line(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = {"method": "dense", "sparsity": 0, "pretrained": embedded.NAME}
    content = results(**arguments) | {"higher_is_better": {TASK: {"exact": True}}}
    content["config"] |= {"gen_kwargs": {}, "limit": 2.0}  # as `lm_eval` writes them
    content["configs"][TASK]["metadata"] |= {"method": "dense", "sparsity": 0}
    content["results"][TASK] |= {"exact_stderr,none": 0.25, "sample_len": 2}
    file = tmp_path / "dense" / "m" / "results_before.json"
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps(content))
    script.main(command(tmp_path, "--sparsity", "0"))
    assert not script.ran
    _, _, table = capsys.readouterr().out.partition(f"\n{TASK}\n")
    header, first, *_ = table.splitlines()
    assert header.split() == ["method", "requested", "measured", "n", "exact", "↑"]
    assert first.split() == ["dense", "0", "0.0000", "2", "0.500", "±", "0.250"]


def test_answers_stand_under_each_other(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    class Model:
        def __init__(self, **settings: Any):
            self.settings, self.templated = settings, False

        def generate_until(self, requests: list[Any], disable_tqdm: bool) -> list[str]:
            (request,) = requests
            assert self.templated and request.args[0] == "PROMPT1. key: ab"
            return ["cdefghi" if self.settings["method"] == "dense" else "\x1b[2Jx"]

    monkeypatch.setattr(script, "SparseHFLM", Model)
    runs = [{"method": "dense", "sparsity": 0.0}, {"method": "quest", "sparsity": 0.9}]
    assert script.answers("PROMPT", "1. key:", " abcdefghi", runs, True).splitlines() == [
        "asked                  1. key:",
        "gold                   abcdefghi",
        "dense                  ab|cdefghi",
        "quest at sparsity 0.9  ab|\\x1b[2Jx",
    ]


def changed(path: str, value: Any) -> str:
    content: Any = copy.deepcopy(results())
    part = content
    *way, last = path.split("/")
    for key in way:
        part = part[key]
    if value is ...:
        del part[last]
    else:
        part[last] = value
    return json.dumps(content)


OTHERS = {
    "empty": "",
    "torn": json.dumps(results())[:-9],
    "binary": "\0\1\2",
    "list": "[]",
    "nested": "[" * 100_000,
    "no results": '{"config": {}}',
    "no config": changed("config", ...),
    "config of another shape": changed("config", [1]),
    "arguments of another shape": changed("config/model_args", "method=quest"),
    "configs of another shape": changed("configs", 5),
    "metadata of another shape": changed(f"configs/{TASK}/metadata", [1]),
    "task": changed("configs", {"other": {"metadata": {}}}),
    "more tasks": changed("configs/other", {"metadata": {}}),
    "limit": changed("config/limit", 5),
    "no limit": changed("config/limit", None),
    "method": changed("config/model_args/method", "snapkv"),
    "sparsity": changed("config/model_args/sparsity", 0.9),
    "backend": changed("config/model_args/backend", "auto"),
    "model": changed("config/model_args/pretrained", "org/m"),
    "more arguments": changed("config/model_args/page_size", 32),
    "model type": changed("config/model", "hf"),
    "chat template": changed("chat_template", "{{ x }}"),
    "metadata": changed(f"configs/{TASK}/metadata/samples", 5),
    "more metadata": changed(f"configs/{TASK}/metadata/depth", 5),
    "metadata of other arguments": changed(f"configs/{TASK}/metadata/sparsity", 0.9),
    "gen_kwargs": changed("config/gen_kwargs", "max_gen_toks=5"),
    "system instruction": changed("system_instruction", "x"),
}


@pytest.mark.parametrize("what", OTHERS)
def test_results_of_another_run_are_not_its_own(
    what: str, script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "quest_0.5" / "m" / "results_before.json"
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps(results()))
    script.main(command(tmp_path))
    assert not script.ran and "done before" in capsys.readouterr().out
    file.write_text(OTHERS[what])
    script.main(command(tmp_path))
    assert script.ran == [("quest", 0.5)]
    said = capsys.readouterr().out.splitlines()[0]
    assert str(file) in said and "is not of this run" in said
    script.main(command(tmp_path))
    assert len(script.ran) == 1  # the good one beside it counts


REFUSED = {
    "--task nosuch": "--task nosuch is unknown",
    "--sparsity 2": "sparsity=2",
    "--sparsity -1": "sparsity=-1",
    "--sparsity 0.5 nan": "sparsity=nan",
    "--sparsity abc": "abc",
    "--method quset": "quset",
    "--method quest ../x": "../x",
    "--backend nosuch": "backend='nosuch'",
    "--limit 0": "limit=0",
    "--limit -1": "limit=-1",
    "--limit 2.5": "limit=2.5",
    "--limit many": "limit=many",
    "--answer -1": "answer=-1",
    "--answer first": "answer=first",
    "--output_path /dev/null/x": "--output_path /dev/null/x",
    "--output_path file": "--output_path file",
    "--output_path ~nosuchuser/x": "nosuchuser",
    f"--output_path {'x' * 300}": "255 are allowed",
    "--colour red": "--colour",
}


@pytest.mark.parametrize("more", REFUSED, ids=lambda text: text[:30])
def test_refused_before_the_first_run(
    more: str, script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("")
    with pytest.raises(UserError) as error:
        script.main(command(tmp_path / "out", *more.split(" ")))
    assert REFUSED[more] in str(error.value) and not script.ran
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
