"""lm-eval's own long-context tasks without `pretrained=`: RULER asks for a tokenizer, LongBench and InfiniteBench not.

Documents are RULER's own or made up here in the form of the others' data; no network. A tiny model stands in for the
embedded one but in the last test, a real process.
"""

from __future__ import annotations

import importlib
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import tiny
import transformers
import yaml
from lm_eval import evaluator, tasks
from lm_eval.tasks import TaskManager

from lm_eval_sparse import patches
from lm_eval_sparse.cli import app as cli
from lm_eval_sparse.model import embedded
from lm_eval_sparse.model.lm import SparseHFLM

patches.install()

REPOSITORY = Path(__file__).resolve().parent.parent
UPSTREAM = Path(tasks.__file__).parent
METHODS = {"flexprefill": "prefill", "snapkv": "eviction", "quest": "decode"}
LENGTH = 1024


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.tiny_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, llama: Path) -> None:
    """No network, the tiny model for the embedded one, and no list of lm-eval's thousands of tasks."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    # RULER looks for the data of its sentence splitter when it is imported, and needs it for essays only.
    (tmp_path / "nltk" / "tokenizers" / "punkt_tab").mkdir(parents=True)
    monkeypatch.setenv("NLTK_DATA", str(tmp_path / "nltk"))
    if (nltk := sys.modules.get("nltk")) is not None:
        monkeypatch.setattr(nltk.data, "path", [str(tmp_path / "nltk")])
    monkeypatch.setattr(embedded, "ensure", lambda: llama)
    known = TaskManager.__init__
    monkeypatch.setattr(
        TaskManager, "__init__", lambda self, *a, **k: known(self, *a, **{**k, "include_defaults": False})
    )


@pytest.fixture
def ruler(monkeypatch: pytest.MonkeyPatch) -> Path:
    """RULER's folder; it makes 4 documents instead of 500."""
    pytest.importorskip("nltk")
    samples = importlib.import_module("lm_eval.tasks.ruler.prepare_niah")
    original = samples.generate_samples

    def few(*args: Any, **kwargs: Any) -> Any:
        return original(*args, **{**kwargs, "num_samples": 4})

    monkeypatch.setattr(samples, "generate_samples", few)
    for name in [name for name in sys.modules if name.startswith("lm_eval.tasks.ruler.niah_utils")]:
        monkeypatch.delitem(sys.modules, name)
    return UPSTREAM / "ruler"


def run(task: str, folder: Path, model_args: str, *argv: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Evaluate two documents through the command line; returns results and logged samples."""
    command = ["run", "--model", "sparse-hf", "--model_args", model_args, "--tasks", task, "--include_path",
               str(folder), "--limit", "2", "--device", "cpu", "--output_path", "out", "--log_samples",
               "--gen_kwargs", "max_gen_toks=6", *argv]  # fmt: skip
    assert cli.main(command) == 0
    (results,) = Path("out").rglob("results_*.json")
    (samples,) = Path("out").rglob("samples_*.jsonl")
    return json.loads(results.read_text()), [json.loads(line) for line in samples.read_text().splitlines()]


def assert_sparse(results: dict[str, Any], method: str) -> None:
    phases = results["config"]["sparse"]["phases"]
    for phase, figures in phases.items():
        assert (figures["calls"]["sparse"] > 0) == (phase == METHODS[method]), phase
    assert 0.4 < phases[METHODS[method]]["executed_sparsity"] < 0.7


METADATA = ("--metadata", json.dumps({"max_seq_lengths": [LENGTH]}))


@pytest.mark.parametrize("method", METHODS)
def test_ruler_without_pretrained(ruler: Path, method: str) -> None:
    results, samples = run("niah_single_1", ruler, f"method={method},sparsity=0.5", *METADATA)
    assert_sparse(results, method)
    tokenizer = tiny.tiny_tokenizer()
    for sample in samples:
        # RULER leaves 128 tokens for the answer and adds haystack as long as it fits.
        assert sample["doc"]["length"] == len(tokenizer(sample["doc"]["input"]).input_ids) + 128
        assert LENGTH / 2 < sample["doc"]["length"] <= LENGTH
    # What a machine's folders are called is in no results.
    assert "tokenizer" not in results["configs"]["niah_single_1"]["metadata"]
    assert "lm-eval-sparse-tokenizer" not in json.dumps(results)


@pytest.fixture
def named() -> list[str]:
    """The tokenizers that a task that makes its own documents was told, instead of such a task."""
    return []


@pytest.fixture
def asks(named: list[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Loads (and with `whole` evaluates) a task that keeps what it was told of the tokenizer, where RULER looks."""
    datasets = importlib.import_module("datasets")

    def made(**kwargs: Any) -> dict[str, Any]:
        named.append(next((kwargs[key] for key in ("tokenizer", "pretrained", "model") if kwargs.get(key)), None))
        return {"test": datasets.Dataset.from_list([{"text": tiny.words(1, 120), "answer": "river"}])}

    config = {
        "task": "asks", "custom_dataset": made, "test_split": "test", "output_type": "generate_until",
        "doc_to_text": "{{text}}", "doc_to_target": "{{answer}}", "metadata": {"version": 1},
        "generation_kwargs": {"max_gen_toks": 2, "until": []},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }  # fmt: skip

    def load(model: Any = "sparse-hf", whole: bool = False, **options: Any) -> Any:
        with monkeypatch.context() as patched:
            if not whole:
                patched.setattr(evaluator, "evaluate", lambda **kwargs: {})
            return evaluator.simple_evaluate(model, tasks=[config], limit=1, device="cpu", **options)

    return load


def vocabulary(folder: str) -> dict[str, int]:
    return transformers.AutoTokenizer.from_pretrained(folder).get_vocab()


@pytest.mark.parametrize("model_args", ["", {}, "method=dense", f"pretrained={embedded.NAME}", {"pretrained": None}])
def test_the_embedded_model_is_named(asks: Callable[..., Any], named: list[str], model_args: Any) -> None:
    results = asks(model_args=model_args, whole=model_args == "method=dense")
    (name,) = named
    assert vocabulary(name) == tiny.tiny_tokenizer().get_vocab()
    assert name not in json.dumps(results, default=str)


def test_what_was_typed_is_left_alone(asks: Callable[..., Any], named: list[str], llama: Path, tmp_path: Path) -> None:
    typed = str(llama)
    asks(model_args=f"pretrained={typed}")
    asks(model_args="", metadata={"tokenizer": "typed/one"})
    asks(model_args="", metadata={"pretrained": "typed/two"})
    asks(model_args="", metadata={"model": "typed/three"})
    asks(model_args=f"tokenizer={typed}/../{llama.name}")
    assert named == [typed, "typed/one", "typed/two", "typed/three", f"{typed}/../{llama.name}"]


def test_names_that_do_not_lead_there_alone(
    asks: Callable[..., Any], named: list[str], llama: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A home folder, a subfolder, a model given as an object, one given as lm-eval's."""
    monkeypatch.setenv("HOME", str(llama.parent))
    asks(model_args=f"pretrained=~/{llama.name}")
    assert named.pop() == str(llama)
    tiny.tiny_llama(tmp_path / "models" / "one")
    (tmp_path / "models" / "config.json").write_text((llama / "config.json").read_text())
    asks(model_args=f"pretrained={tmp_path / 'models'},subfolder=one")
    assert vocabulary(named.pop()) == tiny.tiny_tokenizer().get_vocab()
    asks(SparseHFLM(pretrained=tiny.family("llama"), tokenizer=tiny.tiny_tokenizer(), device="cpu"))
    assert vocabulary(named.pop()) == tiny.tiny_tokenizer().get_vocab()
    asks(SparseHFLM(pretrained=str(llama), device="cpu"))
    assert vocabulary(named.pop()) == tiny.tiny_tokenizer().get_vocab()


def test_other_models_are_told_nothing(asks: Callable[..., Any], named: list[str], llama: Path) -> None:
    """Not even after an evaluation of ours whose model is still there."""
    kept = SparseHFLM(device="cpu")
    asks("hf", model_args={"pretrained": str(llama)}, metadata={"pretrained": ""})
    asks("dummy")
    assert named == [None, None] and kept is not None


# --- data sets of the Hub, made up -----------------------------------------------------------------------------------


def longbench(seed: int) -> dict[str, Any]:
    """A row of LongBench as its YAML files read it."""
    return {
        "input": "", "question": f"Which word is {seed}?", "context": tiny.words(seed, 300), "answers": ["river stone"],
        "length": 300, "dataset": "any", "language": "en", "all_classes": ["Number", "Person"], "_id": str(seed),
    }  # fmt: skip


def infinitebench(seed: int) -> dict[str, Any]:
    """A row of InfiniteBench, whose `answer` and `options` are lists."""
    return {
        "id": seed, "context": tiny.words(seed, 300), "input": "What is the pass key? The largest number of",
        "answer": [str(1000 + seed)], "options": ["river", "stone", "cloud", "green"],
    }  # fmt: skip


DATA: dict[str, tuple[str, Callable[[int], dict[str, Any]], tuple[str, ...]]] = {
    "longbench": ("longbench", longbench, ("qasper", "2wikimqa", "trec", "passage_count")),
    "infinitebench": (
        "infinitebench",
        infinitebench,
        ("infinitebench_passkey", "infinitebench_kv_retrieval", "infinitebench_code_debug", "infinitebench_math_find"),
    ),
}


@pytest.fixture
def _metrics(monkeypatch: pytest.MonkeyPatch) -> None:
    """What LongBench's metrics import for Chinese text and summaries, which are not evaluated here."""
    for name, holds in (("jieba", ""), ("fuzzywuzzy", "fuzz"), ("rouge", "Rouge")):
        if importlib.util.find_spec(name) is None:
            module = ModuleType(name)
            if holds:
                setattr(module, holds, random)
            monkeypatch.setitem(sys.modules, name, module)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("suite", DATA)
def test_data_sets_of_the_hub(suite: str, method: str, tmp_path: Path, _metrics: None) -> None:
    """Each derived from lm-eval's file of the same name, with a local file in place of the data set."""
    folder, row, names = DATA[suite]
    data = tmp_path / "docs.jsonl"
    data.write_text("".join(json.dumps(row(seed)) + "\n" for seed in range(3)))
    derived = tmp_path / "tasks"
    derived.mkdir()
    for name in names:
        split = yaml.safe_load("\n".join(
            line for line in (UPSTREAM / folder / f"{name}.yaml").read_text().splitlines()
            if line.startswith("test_split")
        ))["test_split"]  # fmt: skip
        config = {
            "include": str(UPSTREAM / folder / f"{name}.yaml"), "task": f"local_{name}", "tag": "local",
            "dataset_path": "json", "dataset_name": None,
            "dataset_kwargs": {"data_files": {split: str(data)}, "cache_dir": str(tmp_path / "datasets")},
        }  # fmt: skip
        (derived / f"{name}.yaml").write_text(yaml.safe_dump(config))
    command = ["run", "--model", "sparse-hf", "--model_args", f"method={method},sparsity=0.5", "--tasks", "local",
               "--include_path", str(derived), "--limit", "1", "--device", "cpu", "--output_path", "out",
               "--gen_kwargs", "max_gen_toks=6"]  # fmt: skip
    assert cli.main(command) == 0
    (file,) = Path("out").rglob("results_*.json")
    results = json.loads(file.read_text())
    assert_sparse(results, method)
    assert {name for name in results["results"] if name.startswith("local_")} == {f"local_{name}" for name in names}
    for name in names:
        assert 0 <= results["results"][f"local_{name}"]["score,none"] <= 1


# --- a real process --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_embedded_model_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # the real model and the working folder's cache of it
    try:
        embedded.ensure()
    except embedded.UserError as error:
        pytest.skip(str(error))
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY), "HF_HUB_OFFLINE": "1", "NLTK_DATA": str(tmp_path / "nltk")}
    command = ["run", "--model", "sparse-hf", "--model_args", "method=flexprefill+quest,sparsity=0.5", "--tasks",
               "niah_single_1", "--metadata", json.dumps({"max_seq_lengths": [512]}), "--limit", "1",
               "--include_path", str(UPSTREAM / "ruler"), "--device", "cpu", "--output_path", str(tmp_path / "out"),
               "--gen_kwargs", "max_gen_toks=4"]  # fmt: skip
    quick = (
        "import sys, lm_eval_sparse.patches as patches; patches.install()\n"
        "from lm_eval.tasks import TaskManager\n"
        "known = TaskManager.__init__\n"
        "TaskManager.__init__ = lambda self, *a, **k: known(self, *a, **{**k, 'include_defaults': False})\n"
        "from lm_eval_sparse.cli.app import main\n"
        "sys.exit(main())"
    )
    done = subprocess.run(
        [sys.executable, "-c", quick, *command], capture_output=True, text=True, cwd=tmp_path, env=env, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (file,) = (tmp_path / "out").rglob("results_*.json")
    results = json.loads(file.read_text())
    assert results["model_name"] == embedded.NAME
    phases = results["config"]["sparse"]["phases"]
    assert {phase for phase, figures in phases.items() if figures["calls"]["sparse"]} == {"prefill", "decode"}
