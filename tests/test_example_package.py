"""The package in `examples/` is built, installed and run as its user would do it: another package's method, by name."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny
from fresh_venv import ROOT, run

from lm_eval_sparse.cli import app
from lm_eval_sparse.methods import METHODS, plugins

pytest.importorskip("build")
pytest.importorskip("hatchling")

NAME, PACKAGE = "example_keydiff", "lm_eval_sparse_example_method"
SOURCE = ROOT / "examples" / PACKAGE


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the installed package, as `pip install` leaves it."""
    folder = tmp_path_factory.mktemp("example")
    shutil.copytree(SOURCE, folder / "source", ignore=shutil.ignore_patterns("__pycache__", "dist"))
    run(sys.executable, "-m", "build", "--no-isolation", "--wheel", "--outdir", folder / "dist", folder / "source")
    (wheel,) = (folder / "dist").iterdir()
    run(
        sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", folder / "site", wheel
    )
    return folder / "site"


@pytest.fixture
def installed(site: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The package in this process."""
    monkeypatch.syspath_prepend(str(site))
    plugins.found.cache_clear()
    yield site
    plugins.found.cache_clear()
    for name in [name for name in sys.modules if name.split(".")[0] == PACKAGE]:
        del sys.modules[name]


def test_lm_eval_runs_it_by_its_name(site: Path, tmp_path: Path) -> None:
    """In a process of its own, which knows the folder and nothing else of the package."""
    model, tasks = tiny.tiny_llama(tmp_path / "model"), tiny.write_tasks(tmp_path / "tasks", (150, 190))
    options = f"pretrained={model},method={NAME},sparsity=0.5,backend=gather"
    run(
        *(sys.executable, "-m", "lm_eval_sparse", "run", "--model", "sparse-hf", "--model_args", options),
        *("--tasks", "tiny_choice", "--include_path", tasks, "--output_path", tmp_path / "out", "--device", "cpu"),
        PYTHONPATH=f"{site}:{ROOT}",
        OMP_NUM_THREADS="1",
    )
    (file,) = (tmp_path / "out").rglob("results_*.json")
    found = json.loads(file.read_text())["config"]["sparse"]
    assert found["method"] == NAME and found["phases"]["eviction"]["calls"]["sparse"]
    assert found["phases"]["eviction"]["executed_sparsity"] == pytest.approx(0.5, abs=0.01)
    assert found["code"][NAME]["from"] == f"lm-eval-sparse-example-method 0.1.0 {PACKAGE}.keydiff:KeyDiff"
    assert len(found["code"][NAME]["sha256"]) == 64


def test_it_is_listed_and_holds_what_every_method_promises(installed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert NAME in METHODS and f"{PACKAGE}.keydiff" not in sys.modules
    assert app.main(["check-method", NAME, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["passed"]
    assert app.main(["methods"]) == 0
    assert f"{NAME} (eviction)" in (shown := capsys.readouterr().out) and "lm-eval-sparse-example-method 0.1.0" in shown


def test_its_own_tests_are_tests(installed: Path) -> None:
    spec = importlib.util.spec_from_file_location("example_tests", SOURCE / "tests" / "test_keydiff.py")
    spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
    module.test_it_keeps_what_points_away_from_the_mean()
    (mark,) = module.test_it_holds_what_every_method_promises.pytestmark
    assert "promise" in mark.args[1] and Path(module.KeyDiff.score.__code__.co_filename).is_relative_to(installed)
