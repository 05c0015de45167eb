"""`analyze`: from result files to a report, figures, tables and records in one folder.

Puts the parts together and knows none of their statistics; a part is a module with `section(study, options)`.
"""

from __future__ import annotations

import importlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .. import __version__
from ..errors import PROGRAM, UserError, nearest
from ..labels import label
from ..paths import cut
from ..results.load import read, without_collecting
from ..results.schema import Record
from . import folder
from .study import Study, build, short_name

if TYPE_CHECKING:
    from .certify import Options
    from .figure import Section

#: Parts of the report, in its order.
PARTS = ("curves", "certificates", "isocost", "tolerance", "split", "pairs", "scaling")
#: Rows of the table of certificates that is printed; a longer one is read in the report.
_MOST_ROWS = 8
#: What the extra `analysis` installs, by the names it is imported under.
_EXTRA = ("mapie", "pandas", "plotly", "pyarrow", "scipy", "statsmodels")


def check_installed(command: str) -> None:
    """Raise `UserError` when a library of the extra is not there."""
    missing = [name for name in _EXTRA if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"{command} needs {', '.join(missing)}; type pip install 'lm-eval-sparse[analysis]'")


def study_of(
    results: Sequence[str],
    *,
    tasks: Sequence[str] | None = None,
    models: Sequence[str] | None = None,
    methods: Sequence[str] | None = None,
    metric: str | None = None,
    chance: Mapping[str, float] | None = None,
    allow_mixed: bool = False,
    without: Path | None = None,
) -> Study:
    """The study in result files.

    Args:
        results: files, or folders that hold results_*.json or records.jsonl.
        tasks: those to take, by name, family or short name; all by default.
        models, methods: likewise by name; dense runs are always taken.
        without: a folder below them that is not read.

    Raises:
        UserError: they cannot be read, or compared.
    """
    left_out: list[str] = []
    records = read(results, left_out, without=without)
    records = _chosen("--task", records, tasks, lambda record: {record.task, *short_name(record.task)})
    records = _chosen("--model", records, models, lambda record: {record.model})
    dense = [record for record in records if record.method == "dense"]
    sparse = [record for record in records if record.method != "dense"]
    records = dense + _chosen("--method", sparse, methods, lambda record: {record.method})
    return build(records, metric=metric, chance=chance, allow_mixed=allow_mixed, left_out=left_out)


def _chosen(
    option: str, records: list[Record], wanted: Sequence[str] | None, names: Callable[[Record], set[str]]
) -> list[Record]:
    """Records that are called one of the wanted names. Raises `UserError` for a name that none has."""
    if not wanted:
        return records
    present = sorted({name for record in records for name in names(record)})
    for name in wanted:
        if name not in present:
            shown = ", ".join(map(label, present[:20])) + (
                f" and {len(present) - 20} more" if len(present) > 20 else ""
            )
            raise UserError(
                f"{option} {label(name)}: not in these results, which hold {shown}{nearest(cut(name), present)}"
            )
    return [record for record in records if names(record) & set(wanted)]


def length_of(text: str) -> int:
    """Tokens, as typed: `4096`, or `4k` as leaves are called. Raises `UserError`."""
    known = {"4k": 4096, "8k": 8192, "16k": 16384, "32k": 32768, "64k": 65536, "128k": 128000}
    if text.lower() in known:
        return known[text.lower()]
    if not text.isdecimal():
        raise UserError(f"--length {text:.40}: a number of tokens is expected, or one of {', '.join(known)}")
    return int(text)


def sections(study: Study, options: Options) -> list[Section]:
    """All parts of the report."""
    found = [importlib.import_module(f"{__package__}.{name}").section(study, options) for name in PARTS]
    return [section for section in found if section.sentences or section.figures or section.tables]


def analyze(
    results: Sequence[str],
    output: str,
    options: Options,
    *,
    tasks: Sequence[str] | None = None,
    metric: str | None = None,
    chance: Mapping[str, float] | None = None,
    allow_mixed: bool = False,
    pictures: bool = True,
    command: str = "",
) -> str:
    """Write `report.html`, `records.jsonl`, `table.parquet`, `table.csv`, and `figures/` with each figure as PNG, SVG,
    CSV, and each table as CSV. Returns what to print.

    Args:
        results: files or folders, as they are typed.
        output: the folder, as it is typed; new, empty, or of an earlier analysis.
        pictures: whether PNG and SVG are drawn.
        command: the line that made the report.

    Raises:
        UserError: what was typed cannot work, or a file cannot be written; then nothing is.
    """
    option = f"--output {cut(output)}"
    place = folder.checked(option, output)
    with without_collecting():
        return _analyzed(
            results, option, place, options, tasks=tasks, metric=metric, chance=chance, allow_mixed=allow_mixed,
            pictures=pictures, command=command,
        )  # fmt: skip


def _analyzed(
    results: Sequence[str],
    option: str,
    place: Path,
    options: Options,
    *,
    tasks: Sequence[str] | None,
    metric: str | None,
    chance: Mapping[str, float] | None,
    allow_mixed: bool,
    pictures: bool,
    command: str,
) -> str:
    from . import overview, page, static, tables, tidy

    study = study_of(results, tasks=tasks, metric=metric, chance=chance, allow_mixed=allow_mixed, without=place)
    parts = sections(study, options)
    facts = page.Facts(
        title="Sparse attention: what was measured, and what may be said of it",
        summary=overview.summary(study, options, parts),
        made_by=f"{PROGRAM} {__version__}",
        made_with=command,
        runs=overview.run_count(study.records),
        commands=tuple(dict.fromkeys(record.command for record in study.records if record.command)),
        versions=_versions(study.records),
        devices=_devices(study.records),
        dates=_ends(record.date for record in study.records),
        left_out=study.left_out,
        marks=overview.warnings(study),
    )
    with folder.filled(option, place) as fresh:
        (fresh / "report.html").write_text(page.page(parts, facts), encoding="utf-8")
        (fresh / "records.jsonl").write_bytes(tidy.lines(study.records))
        table = tidy.frame(study)
        (fresh / "table.parquet").write_bytes(tidy.parquet(table))
        (fresh / "table.csv").write_bytes(tidy.csv(table))
        static.write(fresh / "figures", parts, static.FORMATS if pictures else ("csv",))
    said = [*facts.marks, *facts.summary, ""]
    shown = next((part.tables[0] for part in parts if part.name == "certificates" and part.tables), None)
    if shown is not None and len(shown.rows) <= _MOST_ROWS:
        said += [tables.show(shown), ""]
    # The first of what could not be read stands above.
    if rest := [line for line in study.left_out if line not in study.unread[:1]]:
        said.append(
            f"{len(rest)} {'more ' if study.unread else ''}remarks on what was left out stand in the report, such as: "
            f"{rest[0]}"
            if len(rest) > 1
            else f"A remark on what was left out stands in the report: {rest[0]}"
        )
    many = len(study.records)
    said.append(f"{many} record{'' if many == 1 else 's'}; look at {place / 'report.html'}")
    return "\n".join(said)


def _versions(records: Iterable[Record]) -> tuple[tuple[str, str], ...]:
    found = {pair for record in records for pair in record.versions.items()}
    return tuple(sorted(found))


def _devices(records: Iterable[Record]) -> tuple[str, ...]:
    runs = {(record.device, record.source) for record in records if record.device}
    counted = Counter(device for device, _ in runs)
    return tuple(
        f"{device} ({number} run{'' if number == 1 else 's'})" if len(counted) > 1 else device
        for device, number in sorted(counted.items())
    )


def _ends(dates: Iterable[str | None]) -> tuple[str, ...]:
    known = sorted(date for date in dates if date)
    return tuple(dict.fromkeys((known[0], known[-1]))) if known else ()
