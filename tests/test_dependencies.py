"""What is imported is declared, and the oldest versions that are declared work."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import packages_distributions, version
from pathlib import Path

import pytest
from fresh_venv import ROOT, Venv, clean_env
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
DECLARED = {canonicalize_name(line.name): line for line in map(Requirement, PROJECT["dependencies"])}

#: Imported inside functions only, where a file says what it does without: module -> where it comes from.
OPTIONAL = {
    "flash_attn": "fa4", "cutlass": "fa4", "pytest": "dev", "ray": "ray",
    **dict.fromkeys(("mapie", "markupsafe", "pandas", "plotly", "pyarrow", "scipy", "statsmodels"), "analysis"),
}  # fmt: skip
OURS = {"lm_eval_sparse", "_lm_eval_sparse_hook"}


def imports(path: Path) -> Iterator[tuple[str, bool]]:
    """Top-level modules that a file imports, and whether it does so as soon as it is imported itself."""

    def walk(node: ast.AST, early: bool) -> Iterator[tuple[str, bool]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
                continue  # never runs
            if isinstance(child, ast.Import):
                yield from ((alias.name.split(".")[0], early) for alias in child.names)
            elif isinstance(child, ast.ImportFrom) and child.level == 0:
                yield str(child.module).split(".")[0], early
            yield from walk(child, early and not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda))

    return walk(ast.parse(path.read_text()), True)


@pytest.fixture(scope="module")
def found() -> set[tuple[str, bool, str]]:
    """Modules of others, whether as soon as the file is imported, and the file."""
    return {
        (module, early, path.relative_to(ROOT).as_posix())
        for folder in ("lm_eval_sparse", "kernels", "tasks", "patches", "hub_cards")
        for path in (ROOT / folder).rglob("*.py")
        for module, early in imports(path)
        if module not in sys.stdlib_module_names and module not in OURS
    }


def test_imports_are_found(found: set[tuple[str, bool, str]]) -> None:
    """Guards the test itself."""
    assert ("torch", True, "kernels/types/blocks.py") in found
    assert ("matplotlib", False, "lm_eval_sparse/analysis/picture.py") in found
    assert ("psutil", True, "lm_eval_sparse/runtime/memory.py") in found


def test_what_is_imported_is_declared(found: set[tuple[str, bool, str]]) -> None:
    homes, undeclared = packages_distributions(), []
    for module in sorted({module for module, _, _ in found}):
        early = sorted(path for name, early, path in found if name == module and early)
        if module in OPTIONAL:
            assert not early and OPTIONAL[module] in PROJECT["optional-dependencies"], (module, early)
            continue
        names = {canonicalize_name(name) for name in homes.get(module, [module])}
        if not names & set(DECLARED):
            undeclared.append(f"{module} of {sorted(names)} is imported by {early or 'a function'}")
    assert not undeclared


@pytest.mark.parametrize("name", sorted(DECLARED))
def test_what_is_installed_is_allowed(name: str) -> None:
    line = DECLARED[name]
    if line.marker is not None and not line.marker.evaluate():
        pytest.skip("not for this platform")
    assert line.specifier.contains(version(name), prereleases=True)


def test_versions_that_must_stay_allowed() -> None:
    """Those of a GPU machine and the newest of each."""
    for name, versions in {
        "torch": ("2.11.0", "2.13.0"),
        "transformers": ("5.17.0", "5.24.0"),
        "huggingface-hub": ("1.33.0", "2.4.0"),
        "datasets": ("4.8.5", "5.2.0"),
        "triton": ("3.6.0", "3.9.0"),
        "lm-eval": ("0.4.13",),
    }.items():
        assert all(DECLARED[name].specifier.contains(one) for one in versions), name
    assert not DECLARED["transformers"].specifier.contains("6.0.0")
    assert not DECLARED["huggingface-hub"].specifier.contains("3.0.0")
    assert not DECLARED["filelock"].specifier.contains("3.20.2")  # CVE-2025-68146, CVE-2026-22701


# --- the oldest of everything ----------------------------------------------------------------------------------------

#: Run with the oldest versions: what touches transformers, lm-eval, the Hub, Triton and the command line, in minutes.
FAST = (
    "test_transformers_versions.py", "test_adapters.py", "test_paths.py", "test_cli.py", "test_encoding.py",
    "test_gguf_check.py", "test_hub.py", "test_operators.py", "test_sparse_arguments.py", "test_pattern_triton.py",
)  # fmt: skip


def oldest() -> list[str]:
    """Each declared dependency at its lower bound; torch is left as it is, see `test_oldest_versions`."""
    pins = []
    for name, line in DECLARED.items():
        if name == "torch" or (line.marker is not None and not line.marker.evaluate()):
            continue
        lowest = next(part.version for part in line.specifier if part.operator in (">=", "=="))
        pins.append(f"{line.name}{'[' + ','.join(line.extras) + ']' if line.extras else ''}=={lowest}")
    return pins


def test_every_dependency_has_an_oldest_version() -> None:
    assert len(oldest()) >= len(DECLARED) - 2
    assert "transformers==5.17" in oldest() and "lm_eval[hf]==0.4.13" in oldest()


@pytest.mark.oldest
def test_oldest_versions(tmp_path: Path) -> None:
    """An environment with the lower bounds, in which the fast tests pass.

    torch stays that of the running interpreter: builds of 2.11 for a CPU are not on the package index, and those for
    CUDA are gigabytes. Packages that the lower bounds do not ask for are lent from the running interpreter, too.
    """
    env = Venv(tmp_path / "venv")
    env.pip("install", "--prefer-binary", "--quiet", *oldest())
    shown = env.code(
        "import transformers, huggingface_hub; print(transformers.__version__, huggingface_hub.__version__)"
    )
    assert re.fullmatch(r"5\.17\.\d+ 1\.5\.\d+\n", shown.stdout)
    files = [str(ROOT / "tests" / name) for name in FAST]
    done = subprocess.run(
        [env.python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not slow", *files],
        cwd=ROOT,
        env=clean_env(OMP_NUM_THREADS=os.environ.get("OMP_NUM_THREADS", "2")),
        capture_output=True,
        text=True,
        timeout=3600,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
