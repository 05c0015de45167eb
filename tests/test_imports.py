"""Imports point one way: the contracts in pyproject.toml, on a copy of the package with the layout of a wheel."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from fresh_venv import ROOT

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

pytest.importorskip("importlinter", reason="import-linter comes with the extra dev")

CONTRACTS = {
    contract["id"]: contract
    for contract in tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
}

#: For each contract imports that break it: file of the package, line that is put at its end.
PLANTED = {
    "attention": [
        ("kernels/dense.py", "from ..methods import METHODS"),
        ("methods/dense.py", "from ..runtime import layers"),
        ("runtime/memory.py", "def late():\n    import lm_eval_sparse.model.lm"),
    ],
    "records": [
        ("results/load.py", "from ..analysis import picture"),
        ("analysis/picture.py", "from ..hub.cards import *"),
    ],
    "records-alone": [
        ("analysis/picture.py", "def late():\n    import torch"),
        ("hub/cards.py", "from ..model import embedded"),
        ("results/files.py", "import transformers"),
        ("errors.py", "from .kernels.types import Blocks"),  # at second hand
    ],
    "kernels-alone": [("kernels/dense.py", "from ..errors import UserError"), ("kernels/dense.py", "import lm_eval")],
    "methods-alone": [("methods/scored/prefill.py", "from transformers import AutoConfig")],
    "runtime-alone": [("runtime/memory.py", "from lm_eval.api import model")],
    "ground": [("values.py", "import torch"), ("paths.py", "from .hub import cards")],
    "command-line": [
        ("frontier/fill.py", "from ..cli import app"),
        ("patches/saving.py", "from ..cli.app import main"),
    ],
    "kit": [("methods/scored/prefill.py", "from ...testing import select")],
}


def wheel_layout(folder: Path) -> Path:
    """The package's Python files as a wheel has them, and the contracts beside them."""

    def other(where: str, names: list[str]) -> list[str]:
        return [name for name in names if not name.endswith(".py") and not (Path(where) / name).is_dir()]

    package = folder / "lm_eval_sparse"
    shutil.copytree(ROOT / "lm_eval_sparse", package, ignore=other)
    for name in ("kernels", "patches", "tasks", "hub_cards"):
        shutil.copytree(ROOT / name, package / name, ignore=other)
    shutil.copy(ROOT / "pyproject.toml", folder)
    return package


def lint(folder: Path, *contracts: str) -> tuple[int, str]:
    """Exit status of the linter, and what it printed. It runs apart: here the package is imported from elsewhere."""
    done = subprocess.run(
        [
            *(sys.executable, "-c", "from importlinter.cli import lint_imports_command; lint_imports_command()"),
            *("--no-cache", *(word for contract in contracts for word in ("--contract", contract))),
        ],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), *sys.path]), "COLUMNS": "200", "NO_COLOR": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    return done.returncode, done.stdout + done.stderr


def test_imports_point_one_way(tmp_path: Path) -> None:
    wheel_layout(tmp_path)
    status, said = lint(tmp_path)
    assert status == 0, said
    assert f"Contracts: {len(CONTRACTS)} kept, 0 broken." in said
    seen = int(re.search(r"Analyzed (\d+) files", said).group(1))
    assert seen >= len(list((tmp_path / "lm_eval_sparse").rglob("*.py")))  # kernels and patches among them


@pytest.mark.parametrize("name", CONTRACTS)
def test_a_planted_import_breaks_its_contract(name: str, tmp_path: Path) -> None:
    package = wheel_layout(tmp_path)
    for file, line in PLANTED[name]:
        with (package / file).open("a") as opened:
            opened.write(f"\n{line}\n")
    status, said = lint(tmp_path, name)
    assert status == 1 and f"{CONTRACTS[name]['name']} BROKEN" in said
    for file, _ in PLANTED[name]:
        assert f"lm_eval_sparse.{file.removesuffix('.py').replace('/', '.')} -> " in said, (file, said)


def test_contracts_name_every_room() -> None:
    """Folders and files that are new have a place among the arrows."""
    rooms = {
        f"lm_eval_sparse.{path.stem}"
        for folder in (ROOT / "lm_eval_sparse", ROOT)
        for path in folder.iterdir()
        if path.suffix == ".py" or (path / "__init__.py").is_file()
    } - {"lm_eval_sparse.__init__", "lm_eval_sparse.lm_eval_sparse", "lm_eval_sparse.tests"}
    named = {
        module for module in CONTRACTS["kernels-alone"]["forbidden_modules"] if module.startswith("lm_eval_sparse.")
    }
    assert named | {"lm_eval_sparse.kernels"} == rooms
    assert PLANTED.keys() == CONTRACTS.keys()
