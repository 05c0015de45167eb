"""How long `lm-eval-sparse analyze` takes for a study of 10,000 records, by part, without and with pictures.

The study is made up (tests/made_up.py): result files with 100 documents a task, as runs leave them, read from files and
again from `records.jsonl`. Each part is timed in one process after its libraries are imported; the whole command is
timed in a process of its own.

    python benchmarks/analyze.py --output benchmarks/results/analyze
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import made_up

from lm_eval_sparse.analysis import analyze, page, static, tidy
from lm_eval_sparse.analysis.certify import Options
from lm_eval_sparse.analysis.study import build
from lm_eval_sparse.results.load import read, without_collecting

LIBRARIES = ("numpy", "pandas", "scipy", "statsmodels", "MAPIE", "pydantic", "plotly", "matplotlib")


def study_files(folder: Path, records: int) -> int:
    """Write whole runs of nine tasks until there are `records` records, two for each task; returns the files."""
    models, lengths, tasks, methods = map(tuple, (made_up.SHAPES, made_up.LENGTHS, made_up.TASKS, made_up.METHODS))
    grid = made_up.runs(
        models, lengths, tasks, methods, (0.5, 0.7, 0.8, 0.9, 0.95)
    )  # fmt: skip
    return made_up.write(folder, itertools.islice(grid, records // (2 * len(made_up.TASKS))))


def measure(records: int) -> dict[str, Any]:
    seconds: dict[str, float] = {}

    def timed(name: str, function: Callable[[], Any]) -> Any:
        begun = time.perf_counter()
        found = function()
        seconds[name] = round(time.perf_counter() - begun, 2)
        return found

    with tempfile.TemporaryDirectory() as place, without_collecting():  # as the command does it
        runs, out = Path(place) / "runs", Path(place) / "out"
        files = study_files(runs, records)
        begun = time.perf_counter()
        parts = {name: importlib.import_module(f"lm_eval_sparse.analysis.{name}") for name in analyze.PARTS}
        for name in ("pandas", "pyarrow", "plotly.offline", "statsmodels.api", "matplotlib.figure"):
            importlib.import_module(name)
        seconds["import libraries"] = round(time.perf_counter() - begun, 2)
        rows = timed("read result files", lambda: read([runs]))
        study = timed("put together", lambda: build(rows))
        sections = [
            timed(name, lambda module=module: module.section(study, Options())) for name, module in parts.items()
        ]
        text = timed("page", lambda: page.page(sections, page.Facts("timed")))
        timed("table, records", lambda: (tidy.csv(table := tidy.frame(study)), tidy.parquet(table), tidy.lines(rows)))
        analysed = round(sum(value for name, value in seconds.items() if name != "import libraries"), 2)
        timed("pictures", lambda: static.write(out, sections))
        figures = sum(len(section.figures) for section in sections)
        panels = sum(len(figure.panels) for section in sections for figure in section.figures)
        command = [
            sys.executable,
            "-m",
            "lm_eval_sparse",
            "analyze",
            str(runs),
            "--output",
            str(out / "x"),
            "--no-pictures",
        ]
        timed("whole command, no pictures", lambda: subprocess.run(command, check=True, capture_output=True))
        (Path(place) / "records").mkdir()
        (Path(place) / "records" / "records.jsonl").write_bytes(tidy.lines(rows))
        timed("read records.jsonl", lambda: read([Path(place) / "records"]))
    return {
        "records": len(rows), "result files": files, "documents a record": 100, "figures": figures, "panels": panels,
        "page bytes": len(text.encode()), "analysed in": analysed, "seconds": seconds, "device": processor(),
        "versions": {"python": platform.python_version()} | {name: version(name) for name in LIBRARIES},
    }  # fmt: skip


def processor() -> str:
    return f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores"


def table(found: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    made = f"{found['records']:,} records in {found['result files']} files"
    lines = [
        "# A study of 10,000 records",
        "",
        f"{found['device']}; {versions}. Made-up results: {made}, 100 documents each; "
        f"{found['figures']} figures of {found['panels']} panels. "
        f"From result files to a report: {found['analysed in']} s, without importing libraries and without pictures.",
        "",
        "| part | s |",
        "|---|---|",
        *(f"| {name} | {value:.2f} |" for name, value in found["seconds"].items()),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=10_008)
    parser.add_argument("--output", required=True)
    given = parser.parse_args()
    found = measure(given.records)
    Path(f"{given.output}.json").write_text(json.dumps(found, indent=1) + "\n")
    Path(f"{given.output}.md").write_text(table(found))
    print(table(found))


if __name__ == "__main__":
    main()
