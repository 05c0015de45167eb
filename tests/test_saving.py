"""Results appear whole or not at all, are as lm-eval writes them, and are never lost."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import random
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hub_records import RESULTS, sample
from lm_eval.loggers import EvaluationTracker, evaluation_tracker

from lm_eval_sparse import endings
from lm_eval_sparse.errors import UserError
from lm_eval_sparse.patches import hub_tracker, stats_file

hub_tracker.apply(evaluation_tracker)

#: How the names of files with samples begin; a few letters of its hash keep `a/b` apart from `a_b`.
NAMES = {"tiny": "samples_tiny", "a/b": f"samples_a_b_{hashlib.sha256(b'a/b').hexdigest()[:8]}", "long": "samples_long"}

TASKS = {"tiny": [sample(0), sample(1)], "a/b": [sample(0)], "long": [sample(2)]}


@pytest.fixture
def save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., EvaluationTracker]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TMPDIR", str(tmp_path / "elsewhere"))
    monkeypatch.setattr("tempfile.tempdir", None)
    (tmp_path / "elsewhere").mkdir()

    def run(output: str = "out", model: str = "sparse-hf", tasks: dict[str, Any] = TASKS) -> EvaluationTracker:
        tracker = EvaluationTracker(output_path=output)
        if model == "sparse-hf":
            hub_tracker.preflight(tracker, log_samples=True, limit=None, predict_only=False)
        tracker.general_config_tracker.log_experiment_args(model, {"pretrained": "m"}, None, None, False)
        samples = copy.deepcopy(tasks)
        tracker.save_results_aggregated(results=copy.deepcopy(RESULTS), samples=samples)
        for task, rows in samples.items():
            tracker.save_results_samples(task_name=task, samples=rows)
        return tracker

    yield run
    endings.keep(None)


def files(folder: Path) -> list[str]:
    """Names of all files below, dates left out."""
    return sorted(path.name.rsplit("_", 1)[0] for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("output", ["out", "out/r.json"])
def test_files_are_as_lm_eval_writes_them(save: Callable[..., Any], tmp_path: Path, output: str) -> None:
    tasks = {name: rows for name, rows in TASKS.items() if "/" not in name}
    save(f"ours/{output}", tasks=tasks)
    save(f"theirs/{output}", model="hf", tasks=tasks)
    ours, theirs = (sorted((tmp_path / side).rglob("*.json*")) for side in ("ours", "theirs"))
    assert files(tmp_path / "ours") == files(tmp_path / "theirs") and len(ours) == 3
    for one, other in zip(ours, theirs, strict=True):
        if one.suffix == ".jsonl":
            assert one.read_bytes() == other.read_bytes()
            continue
        one, other = (json.loads(path.read_text()) for path in (one, other))
        for content in (one, other):
            del content["total_evaluation_time_seconds"], content["model_source"]
        assert one == other


def test_permissions_are_those_of_any_new_file(save: Callable[..., Any], tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        save()
    finally:
        os.umask(before)
    for path in (tmp_path / "out").rglob("*.json*"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o640, path


def test_a_task_whose_name_no_file_can_have(save: Callable[..., Any], tmp_path: Path) -> None:
    save()
    assert files(tmp_path / "out") == sorted(["results", *NAMES.values()])


def torn(monkeypatch: pytest.MonkeyPatch, below: Path, share: float) -> None:
    """A disk that is full: what lm-eval writes below a folder stops in the middle."""
    write_text = Path.write_text

    def full(self: Path, data: str, *args: Any, **kwargs: Any) -> int:
        if below not in self.absolute().parents:
            return write_text(self, data, *args, **kwargs)
        write_text(self, data[: int(share * len(data))], *args, **kwargs)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)


@pytest.mark.parametrize("seed", range(4))
def test_results_that_cannot_be_saved_are_elsewhere(
    save: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, seed: int
) -> None:
    torn(monkeypatch, tmp_path / "out", random.Random(seed).random())
    with pytest.raises(UserError, match="could not be, it is in .* instead") as failure:
        save()
    assert files(tmp_path / "out") == []
    (folder,) = (tmp_path / "elsewhere").iterdir()
    assert str(folder) in str(failure.value) and "out" in str(failure.value)
    assert files(folder) == sorted(["results", *NAMES.values()])
    (results,) = folder.glob("results_*.json")
    assert json.loads(results.read_text())["results"] == RESULTS["results"]
    assert "|tiny |" in capsys.readouterr().out


@pytest.mark.parametrize("broken", TASKS)
def test_samples_that_cannot_be_saved_are_elsewhere(
    save: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    replace = os.replace

    def refuse(source: Any, target: Any) -> None:
        if Path(target).name.startswith(NAMES[broken]) and "elsewhere" not in str(target):
            raise OSError(30, "Read-only file system")
        replace(source, target)

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(UserError, match="the results are in .*, but the samples .* it is in .* instead"):
        save()
    (folder,) = (tmp_path / "elsewhere").iterdir()
    names = [NAMES[task] for task in TASKS]
    place = list(TASKS).index(broken)
    assert files(tmp_path / "out") == sorted(["results", *names[:place]])
    assert files(folder) == sorted(names[place:])
    for task, rows in list(TASKS.items())[place:]:
        (file,) = folder.glob(f"{NAMES[task]}_*")
        assert [json.loads(line)["doc_id"] for line in file.read_text().splitlines()] == [r["doc_id"] for r in rows]


def test_nowhere_to_save(
    save: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    torn(monkeypatch, tmp_path, 0.5)
    with pytest.raises(UserError, match="nor elsewhere .*: the scores are above"):
        save()
    assert "|tiny |" in capsys.readouterr().out
    assert files(tmp_path) == []


def test_a_stopped_save_leaves_nothing_torn(
    save: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(json, "loads", stop)
    with pytest.raises(KeyboardInterrupt):
        save()
    assert not list((tmp_path / "out").rglob("*.*"))


def test_what_looks_like_a_secret_is_masked(
    save: Callable[..., Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    token = "hf_" + "".join(random.choices("abcdefXYZ0123", k=30))
    rows = [sample(0), {**sample(1), "arguments": ((f"the token is {token}.", " yes"),)}]
    save(tasks={"tiny": rows})
    text = "".join(path.read_text() for path in (tmp_path / "out").rglob("*") if path.is_file())
    assert token not in text and "the token is ***." in text
    assert [record for record in caplog.records if "samples_tiny" in record.getMessage()]


def test_figures_that_cannot_be_saved_take_nothing_with_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, save: Callable[..., Any], capsys: Any
) -> None:
    write_whole = stats_file.write_whole

    def full(path: Path, content: bytes) -> None:
        if "elsewhere" not in str(path):
            raise OSError(28, "No space left on device")
        write_whole(path, content)

    stats_file.apply(evaluation_tracker)
    monkeypatch.setattr(stats_file, "write_whole", full)
    monkeypatch.setitem(RESULTS, "sparse_stats", {"figures": [1, 2]})
    with pytest.raises(UserError, match="the results are in .*, but the figures .*No space left.* it is in .* instead"):
        save()
    assert files(tmp_path / "out") == ["results"]
    (folder,) = (tmp_path / "elsewhere").iterdir()
    assert json.loads((folder / "sparse_stats.json").read_text()) == {"figures": [1, 2]}
    assert sorted(name for name in files(folder) if name.startswith("samples")) == sorted(NAMES.values())
    assert "|tiny |" in capsys.readouterr().out
