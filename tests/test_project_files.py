"""What people who pick a project up look for: citation, continuous integration, forms, links that lead somewhere."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from fresh_venv import ROOT
from markdown_it import MarkdownIt

import lm_eval_sparse
from lm_eval_sparse.cli import app

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
WORKFLOW = ROOT / ".github" / "workflows" / "ci.yml"
FORMS = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))
PAGES = sorted(
    path
    for pattern in ("*.md", "docs/*.md", "tasks/*.md", "kernels/*.md", "patches/*.md", "benchmarks/**/*.md")
    for path in ROOT.glob(pattern)
)


def read(path: Path) -> Any:
    return yaml.safe_load(path.read_text())


# --- citation ---------------------------------------------------------------------------------------------------------


def test_citation() -> None:
    """What CFF 1.2.0 requires, and what this project is."""
    cited = read(ROOT / "CITATION.cff")
    assert {"cff-version", "message", "title", "authors"} <= cited.keys()
    assert cited["cff-version"] == "1.2.0" and cited["type"] == "software"
    assert (cited["title"], cited["license"]) == (PROJECT["name"], PROJECT["license"])
    assert cited["version"] == lm_eval_sparse.__version__ and cited["keywords"] == PROJECT["keywords"]
    assert cited["authors"] and all("name" in who or "family-names" in who for who in cited["authors"])
    (paper,) = cited["references"]
    assert {"type", "title", "authors"} <= paper.keys() and "2504.17768" in paper["url"]
    assert [who["family-names"] for who in paper["authors"]][0::5] == ["Nawrot", "Ponti"]


# --- continuous integration -------------------------------------------------------------------------------------------


def commands(job: dict[str, Any]) -> list[str]:
    """The lines that a job runs."""
    return [line.strip() for step in job["steps"] if "run" in step for line in step["run"].splitlines()]


def test_the_workflow_runs_the_script_on_every_python() -> None:
    jobs = read(WORKFLOW)["jobs"]
    versions = [found[1] for line in PROJECT["classifiers"] if (found := re.search(r":: (3\.\d+)$", line))]
    assert jobs["test"]["strategy"]["matrix"]["python"] == versions
    low, high = re.fullmatch(r">=3\.(\d+),<3\.(\d+)", PROJECT["requires-python"]).groups()
    assert versions == [f"3.{minor}" for minor in range(int(low), int(high))]
    assert commands(jobs["test"]) == [".ci/run"]
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK) and "make test" in script.read_text()
    assert subprocess.run(["bash", "-n", script]).returncode == 0


def test_the_workflow_builds_a_wheel_and_asks_it() -> None:
    ran = commands(read(WORKFLOW)["jobs"]["wheel"])
    assert "python -m build" in ran and any("pip install" in line and "dist/*.whl" in line for line in ran)
    asked = [line.split("lm-eval-sparse ")[1] for line in ran if "bin/lm-eval-sparse " in line]
    assert asked and set(asked) <= {"--version", *app.COMMANDS}
    leaf = re.search(r"grep --quiet (\S+)", "\n".join(ran)).group(1)
    assert list((ROOT / "tasks").rglob(f"{leaf}.yaml"))


# --- forms ------------------------------------------------------------------------------------------------------------


def test_there_is_a_form_for_each() -> None:
    assert [path.name for path in FORMS] == ["bug.yml", "config.yml", "method.yml", "task.yml"]


@pytest.mark.parametrize("path", [path for path in FORMS if path.name != "config.yml"], ids=lambda path: path.stem)
def test_forms(path: Path) -> None:
    """GitHub ignores a form in which anything is wrong."""
    form = read(path)
    assert form.keys() <= {"name", "description", "title", "labels", "body"} and form["name"] and form["description"]
    fields = [part for part in form["body"] if part["type"] != "markdown"]
    assert len({part["id"] for part in fields}) == len(fields) > 2
    for part in form["body"]:
        attributes = part["attributes"]
        if part["type"] == "markdown":
            assert attributes.keys() == {"value"}
            continue
        assert part["type"] in ("input", "textarea", "dropdown") and re.fullmatch(r"[a-z_]+", part["id"])
        assert attributes.keys() <= {"label", "description", "placeholder", "render", "options"} and attributes["label"]
        assert ("options" in attributes) == (part["type"] == "dropdown")
        assert "render" not in attributes or part["type"] == "textarea"
    assert any(part.get("validations", {}).get("required") for part in fields)
    assert "lm-eval-sparse --version" in path.read_text()


# --- links ------------------------------------------------------------------------------------------------------------


def anchors(path: Path) -> set[str]:
    """What headings of a page are called in links."""
    found: set[str] = set()
    tokens = MarkdownIt().parse(path.read_text())
    for token, inside in zip(tokens, tokens[1:], strict=False):
        if token.type == "heading_open":
            words = "".join(part.content for part in inside.children or [])
            name = re.sub(r"[^\w\- ]", "", words.lower()).replace(" ", "-")
            found.add(name if name not in found else f"{name}-1")
    return found


def links(path: Path) -> list[str]:
    """Where a page leads and what pictures it shows."""
    parts = [part for token in MarkdownIt("gfm-like", {"linkify": False}).parse(path.read_text()) if token.children
             for part in token.children]  # fmt: skip
    return [str(part.attrs.get("href", part.attrs.get("src"))) for part in parts if {"href", "src"} & part.attrs.keys()]


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(path: Path) -> None:
    for link in links(path):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = (path.parent / name).resolve() if name else path
        assert target.exists() and (target == ROOT or ROOT in target.parents), link
        assert not anchor or anchor in anchors(target), link


def test_links_are_found() -> None:
    """Guards the test above."""
    found = {link for path in PAGES for link in links(path)}
    assert {"docs/methods.md", "docs/decoding.md#speed", "docs/architecture.md", "CONTRIBUTING.md"} <= found
    assert "speed" in anchors(ROOT / "docs" / "decoding.md") and any(link.endswith(".png") for link in found)


#: Files that pages name in code: `kernels/…`, `lm_eval_sparse/…`, `tests/…`.
NAMED = re.compile(r"`((?:lm_eval_sparse|kernels|tests|benchmarks|examples|docs|patches)/[\w/.-]*\w\.\w+)`")


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "docs/architecture.md", "docs/decoding.md",
                                  "docs/accounting.md", "docs/kernels.md", "tasks/README.md"])  # fmt: skip
def test_files_that_pages_name_are_there(name: str) -> None:
    missing = [path for path in NAMED.findall((ROOT / name).read_text()) if not (ROOT / path).exists()]
    assert not missing


# --- length -----------------------------------------------------------------------------------------------------------


def test_a_long_file_says_why() -> None:
    """Above 450 lines the head of a file says why it is one."""
    folders = ("lm_eval_sparse", "kernels", "patches", "tests", "benchmarks", "examples", "tasks", "hub_cards")
    paths = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    assert len(paths) > 200
    long = {path: text for path in paths if (text := path.read_text()).count("\n") > 450}
    assert ROOT / "tests" / "test_phases.py" in long
    silent = [
        str(path.relative_to(ROOT))
        for path, text in long.items()
        if not re.search(r"\b(long,? since|in one file)\b", text.split('"""')[1], re.IGNORECASE)
    ]
    assert not silent
