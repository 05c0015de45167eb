"""Wheel, source distribution and editable install, each in a fresh environment."""

from __future__ import annotations

import configparser
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from fresh_venv import ROOT, Venv, run

pytest.importorskip("pip")
pytest.importorskip("build")
pytest.importorskip("hatchling")

FOLDERS = ("lm_eval_sparse", "tasks", "kernels", "patches", "hub_cards")
ROOT_FILES = {"_lm_eval_sparse_hook.py", "lm_eval_sparse_autoload.pth", "lm_eval_sparse_autoload.start"}


def source_files() -> set[str]:
    """Files of the five folders as a wheel must name them; what git ignores is no part of the project."""
    files = {}  # where a wheel has it -> where it lies here
    for folder in FOLDERS:
        for path in (ROOT / folder).rglob("*"):
            inside = path.relative_to(ROOT).as_posix()
            if path.is_file() and "__pycache__" not in path.parts and path.name not in ROOT_FILES:
                files[inside if folder == "lm_eval_sparse" else f"lm_eval_sparse/{inside}"] = inside
    if (ROOT / ".git").exists() and files:
        names = "\n".join(files.values())
        done = subprocess.run(
            ["git", "-C", ROOT, "check-ignore", "--no-index", "--stdin"], input=names, capture_output=True, text=True
        )
        ignored = set(done.stdout.split("\n"))
        files = {name: inside for name, inside in files.items() if inside not in ignored}
    return set(files)


def build(kind: str, source: Path, out: Path) -> Path:
    run(sys.executable, "-m", "build", "--no-isolation", f"--{kind}", "--outdir", out, source)
    (built,) = out.iterdir()
    return built


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("sdist", ROOT, tmp_path_factory.mktemp("sdist"))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("wheel", ROOT, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module", params=["wheel", "editable"])
def installed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Venv:
    env = Venv(tmp_path_factory.mktemp(request.param) / "venv")
    if request.param == "wheel":
        env.install(request.getfixturevalue("wheel"))
    else:
        env.install("--editable", ROOT)
    return env


REGISTERED = """
import sys, lm_eval.models
from lm_eval.api.registry import model_registry
print("sparse-hf" in model_registry, "torch" in sys.modules)
"""


def names_in(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        return [name for name in archive.namelist() if ".dist-info/" not in name]


def test_the_wheel_is_complete(wheel: Path) -> None:
    names = names_in(wheel)
    assert len(names) == len(set(names))
    assert set(names) == source_files() | ROOT_FILES


def test_the_sdist_builds_the_same_wheel(sdist: Path, wheel: Path, tmp_path: Path) -> None:
    with tarfile.open(sdist) as archive:
        if hasattr(tarfile, "data_filter"):
            archive.extractall(tmp_path, filter="data")
        else:
            archive.extractall(tmp_path)
    (source,) = tmp_path.iterdir()
    for name in ("pyproject.toml", "LICENSE", "README.md", "tests"):
        assert (source / name).exists(), name
    assert names_in(build("wheel", source, tmp_path / "out")) == names_in(wheel)


def test_metadata(wheel: Path) -> None:
    import lm_eval_sparse

    with zipfile.ZipFile(wheel) as archive:
        info = f"lm_eval_sparse-{lm_eval_sparse.__version__}.dist-info"
        metadata = archive.read(f"{info}/METADATA").decode()
        entry_points = configparser.ConfigParser()
        entry_points.read_string(archive.read(f"{info}/entry_points.txt").decode())
        assert f"{info}/licenses/LICENSE" in archive.namelist()
    assert "License-Expression: Apache-2.0" in metadata
    assert f"Version: {lm_eval_sparse.__version__}\n" in metadata
    assert {name: dict(entry_points[name]) for name in entry_points.sections()} == {
        "console_scripts": {"lm-eval-sparse": "lm_eval_sparse.cli.app:main"},
        "lm_eval.models": {"sparse-hf": "lm_eval_sparse.model.lm:SparseHFLM"},
        "lm_eval.tasks": {"frontier": "lm_eval_sparse.tasks"},
    }


def test_every_folder_is_importable_or_readable(installed: Venv) -> None:
    code = """
import importlib.util, pathlib, lm_eval_sparse
for name in ("tasks", "kernels", "patches", "hub_cards"):
    spec = importlib.util.find_spec(f"lm_eval_sparse.{name}")
    (folder,) = spec.submodule_search_locations
    print(name, len(list(pathlib.Path(folder).rglob("*.*"))) > 0, pathlib.Path(lm_eval_sparse.__file__).parent)
"""
    lines = installed.code(code).stdout.splitlines()
    assert [line.split()[:2] for line in lines] == [[n, "True"] for n in ("tasks", "kernels", "patches", "hub_cards")]
    # Guards the test itself: the package under test is this environment's, not the test runner's.
    where = Path(lines[0].split(maxsplit=2)[2])
    assert where == ROOT / "lm_eval_sparse" or where == installed.site / "lm_eval_sparse"


def test_plain_lm_eval_knows_the_model_type(installed: Venv) -> None:
    done = installed.code(REGISTERED)
    assert done.stdout.split() == ["True", "False"]
    assert done.stderr == ""


def test_opt_out(installed: Venv) -> None:
    assert installed.code(REGISTERED, LM_EVAL_SPARSE_NO_AUTOLOAD="1").stdout.split() == ["False", "False"]


def test_task_manager_finds_the_tasks(installed: Venv) -> None:
    # lm-eval's own thousands, in the folder of its module, take five seconds to list.
    code = (
        "import lm_eval.tasks.manager as module; module.__file__ = '/nowhere/manager.py'; "
        "print(*module.TaskManager().all_tasks)"
    )
    names = installed.code(code).stdout.split()
    assert {"frontier", "forced_frontier", "frontier_niah_4k", "forced_frontier_niah_4k"} <= set(names)


@pytest.mark.slow
def test_lm_eval_ls_tasks_shows_the_tasks(installed: Venv) -> None:
    if (installed.site / "lm_eval_sparse").exists():  # some 13 s: once, in the wheel's environment
        done = run(installed.python, "-m", "lm_eval", "ls", "tasks")
        assert "|frontier_niah_4k" in done.stdout.replace(" ", "")


def test_the_script_runs(installed: Venv) -> None:
    import lm_eval_sparse

    for command in ([installed.bin / "lm-eval-sparse"], [installed.python, "-m", "lm_eval_sparse"]):
        assert run(*command, "--version").stdout.startswith(f"lm-eval-sparse {lm_eval_sparse.__version__} (lm_eval 0.")
    assert "frontier" in run(installed.bin / "lm-eval-sparse", "--help").stdout


@pytest.mark.parametrize("kind", ["wheel", "editable"])
def test_uninstall_leaves_nothing(kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    env = Venv(tmp_path / "venv")
    before = env.listing()
    env.install(*([request.getfixturevalue("wheel")] if kind == "wheel" else ["--editable", ROOT]))
    env.code("import lm_eval_sparse, lm_eval_sparse.patches, _lm_eval_sparse_hook")  # byte code is written now
    assert len(env.listing() - before) > len(ROOT_FILES)
    env.pip("uninstall", "--yes", "lm-eval-sparse")
    assert env.listing() == before
    assert [path for path in env.folder.rglob("*sparse*") if not path.is_symlink()] == []
    assert env.code("import lm_eval_sparse", check=False).returncode != 0


def test_target_install_works_without_start_up_files(wheel: Path, tmp_path: Path) -> None:
    env = Venv(tmp_path / "venv")
    env.install("--target", tmp_path / "target", wheel)
    path = str(tmp_path / "target")
    assert env.code(REGISTERED, PYTHONPATH=path).stdout.split() == ["False", "False"]
    code = "import lm_eval_sparse.patches; lm_eval_sparse.patches.install()" + REGISTERED
    assert env.code(code, PYTHONPATH=path).stdout.split() == ["True", "False"]
    assert run(env.python, "-m", "lm_eval_sparse", "--version", PYTHONPATH=path).stdout
