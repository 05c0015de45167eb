"""The section of a report on certificates: tables of the largest certified sparsity, figures, and sentences.

What is certified is computed in `certify`; here it is only shown. What a t-test accepts is no certificate and is not
called one.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np

from . import guarantee
from .certify import Certificate, Options, Row, certify
from .figure import Figure, Panel, Section, Series, Table
from .ladder import reached
from .study import Study

#: Sentences of a section at most; the rest stands in its tables.
MOST_SENTENCES = 60
#: What stands beside all that a t-test accepts, and what such tests are called.
APPROXIMATE = "approximation, no guarantee"
_T_TESTS = {"paired-t": "the paired t-test", "welch": "Welch's t-test"}


def section(study: Study, options: Options | None = None) -> Section:
    """Tables of the largest certified sparsity, figures along model size and length, and a sentence for each row."""
    options = options or Options()
    rows = certify(study, options)
    return Section(
        "certificates",
        _title("Largest sparsity with a guarantee", "Largest sparsity that a t-test accepts", options),
        _sentences(rows, options),
        _figures(rows, options),
        (_wide(rows, options), _long(rows, options)) if rows else (),
    )


def _title(bound: str, t_test: str, options: Options) -> str:
    """A title where the bound is the test, or else one that says what a t-test is worth."""
    return f"{t_test} ({APPROXIMATE})" if options.test in _T_TESTS else bound


def _word(options: Options) -> str:
    return "accepted" if options.test in _T_TESTS else "certified"


def promise(options: Options) -> str:
    """What a certificate says, for captions."""
    if options.test in _T_TESTS:
        return (
            f"Accepted ({APPROXIMATE}): a t-test shows the fall of the mean, that of dense - sparse, to be below "
            f"{options.tolerance:g}; gains on some documents pay for losses on others. Test: "
            f"{guarantee.TESTS[options.test]}. Where nothing varies a t-test has no p-value, and that of the "
            "Hoeffding-Bentkus bound stands there. Documents count as independent draws of the task. Along a method "
            "sparsities are tested from the lowest on, and the first that is not accepted ends it. "
        )
    return (
        f"Certified: mean loss of at most {options.tolerance:g} against dense attention on the same documents, where "
        "a document's loss is max(0, dense - sparse), so gains do not pay for losses. Test: "
        f"{guarantee.TESTS[options.test]}. Documents count as independent draws of the task. Along a method "
        "sparsities are tested from the lowest on, and the first that is not certified ends it. "
    )


def _caption(options: Options) -> str:
    groups = (
        " Groups are always tested with the Hoeffding-Bentkus bound on the mean of max(0, dense - sparse)."
        if options.test in _T_TESTS
        else ""
    )
    return (
        promise(options)
        + f"A row is a model, method and length, and three families in it have a level of {options.level:g} each, for "
        f"anything that is falsely {_word(options)}: its tasks (Holm over their sequences), its groups (Holm; the mean "
        "over tasks with as many documents of each, the first ones) and its worst task (all must pass, one sequence). "
        "A worst task can pass where single tasks are empty: it is one statement, that every task passes, and is "
        "tested at the whole level, while single tasks share theirs. It is refused where dense cannot do one of its "
        "tasks. Nothing corrects for "
        f"the number of rows.{groups} Empty or a dash: nothing is {_word(options)}, or nothing can be said; the "
        "second table has the reasons."
    )


def _reached(c: Certificate) -> str:
    """The largest certified sparsity in words; empty where nothing is certified."""
    return reached(c.sparsity, c.points[c.certified - 1].measured) if c.sparsity is not None else ""


def _wide(rows: Sequence[Row], options: Options) -> Table:
    columns = list(dict.fromkeys((c.kind, c.name) for row in rows for c in row.certificates))
    columns.sort(key=lambda column: ("task", "group", "worst").index(column[0]))
    body = []
    for row in rows:
        found = {(c.kind, c.name): c.sparsity for c in row.certificates}
        less = "; ".join(f"{c.name}: {_reached(c)}" for c in row.certificates if "measured" in _reached(c))
        body.append((row.model, row.label, row.length, row.mark, *(found.get(column) for column in columns), less))
    header = ("model", "method", "length", "setting", *(name for _, name in columns), "measured less than requested")
    if not any(line[-1] for line in body):
        header, body = header[:-1], [line[:-1] for line in body]
    if not any(row.mark for row in rows):  # nothing is mixed
        header, body = header[:3] + header[4:], [line[:3] + line[4:] for line in body]
    title = _title("Largest certified sparsity", "Largest sparsity that a t-test accepts", options)
    return Table("certificates", title, header, tuple(body), _caption(options))


def _long(rows: Sequence[Row], options: Options) -> Table:
    header = (
        "model", "method", "length", "setting", "what", "name", f"largest {_word(options)}", "measured", "documents",
        "loss", "standard error", "p", "at most", "family", "why no more",
    )  # fmt: skip
    body = []
    for row in rows:
        for c in row.certificates:
            last, t = c.certified - 1, c.tested
            figures = (None,) * 4 if last < 0 else (c.points[last].measured, t.loss[last], t.stderr[last], t.p[last])
            measured, loss, error, p = figures
            documents = c.documents if last < 0 else int(t.n[last])
            body.append(
                (row.model, row.label, row.length, row.mark, c.kind, c.name, c.sparsity, measured, documents, loss,
                 error, p, None if c.refused else c.level, c.family, c.reason or "")
            )  # fmt: skip
    approximate = (
        f" p of tasks and of the worst task is that of {_T_TESTS[options.test]} ({APPROXIMATE}), which looks at "
        "the fall of the mean, not at the loss that stands beside it; p of groups is that of the bound."
        if options.test in _T_TESTS
        else ""
    )
    caption = (
        f"Loss (mean of max(0, dense - sparse)), standard error and p are those of the largest {_word(options)} "
        "sparsity; p had to be `at most` what stands beside it, in a family of as many sequences."
        f"{approximate} The last column says what ended the sequence, or why there is none. Documents of a group are "
        "those of all its tasks. The tasks of a worst task are all of the row that have documents enough; a worst task "
        "is refused where dense cannot do one of its tasks."
    )
    return Table("certificate_reasons", "What ended each sequence", header, tuple(body), caption)


def _sentences(rows: Sequence[Row], options: Options) -> tuple[str, ...]:
    found: dict[str, None] = {}
    none_of = "nothing is certified for"
    test = ""
    if options.test in _T_TESTS:
        none_of = f"{_T_TESTS[options.test]} ({APPROXIMATE}) accepts nothing for"
        test = f"{_T_TESTS[options.test]}: {APPROXIMATE}, "
    for row in rows:
        tasks = [c for c in row.certificates if c.kind == "task"]
        place = f"{row.model}{f', {row.length:,} tokens' if row.length else ''}{f', {row.mark}' if row.mark else ''}"
        for c in tasks:
            if c.refused and c.reason:
                found[f"{c.name} ({place}): {c.reason}."] = None
        kept = [c for c in tasks if c.certified]
        none = [c.name for c in tasks if not c.certified and not c.refused]
        if kept:
            each = ", ".join(f"{c.name} up to sparsity {_reached(c)}" for c in kept)
            if len(kept) == 1:
                up = f"up to sparsity {_reached(kept[0])}"
                each = f"{kept[0].name} within {options.tolerance:g} of dense {up}"
            else:
                each = f"within {options.tolerance:g} of dense {each}"
            documents = sorted({c.documents for c in kept})
            many = f"{documents[0]}" if len(documents) == 1 else f"{documents[0]} to {documents[-1]}"
            holm = f", Holm over {kept[0].family} tasks" if kept[0].family > 1 else ""
            rest = f"; {none_of} {', '.join(none)}" if none else ""
            how = f"{test}level {options.level:g}{holm}, {many} documents"
            found[f"{row.label} ({place}) keeps {each} ({how}){rest}."] = None
        elif none:
            found[f"{row.label} ({place}): {none_of} {', '.join(none)}."] = None
    said = list(found)
    if len(said) > MOST_SENTENCES:
        said[MOST_SENTENCES:] = [f"{len(said) - MOST_SENTENCES} more such sentences stand as rows in the tables."]
    return tuple(said)


def _figures(rows: Sequence[Row], options: Options) -> tuple[Figure, ...]:
    """Along length, for each model and method; along size, for each method and length: as the paper's first version."""
    rows = [row for row in rows if not row.oracle]
    along = (
        ("certificates_length", "length", "tokens", lambda r: (r.model, r.label, r.mark), lambda r: r.length),
        (
            "certificates_size",
            "model size",
            "parameters",
            lambda r: (r.label, f"{r.length:,} tokens" if r.length else None, r.mark),
            lambda r: r.parameters,
        ),
    )
    found = []
    for name, what, unit, panel, x in along:
        panels: dict[Any, list[Row]] = defaultdict(list)
        for row in rows:
            if x(row) is not None:
                panels[panel(row)].append(row)
        drawn = tuple(
            _panel(group, members, x, unit, f"largest {_word(options)} sparsity")
            for group, members in panels.items()
            if len(set(map(x, members))) > 1
        )
        if drawn:
            caption = (
                f"A dot is the largest {_word(options)} sparsity of one task, 0 where none is; dots of one {what} "
                "stand side by side. The line is their mean, the band one standard deviation between tasks. Tasks of "
                "which nothing can be said are left out. "
                f"{promise(options)}Level {options.level:g} for the tasks of one model, method and length (Holm)."
            )
            title = _title(
                f"Largest certified sparsity along {what}",
                f"Largest sparsity that a t-test accepts along {what}",
                options,
            )
            found.append(Figure(name, title, caption, drawn))
    return tuple(found)


def _panel(group: tuple[Any, ...], members: Sequence[Row], x: Any, unit: str, y_label: str) -> Panel:
    # Places are categories: dots of tasks with the same sparsity stand side by side there.
    values: dict[str, dict[float, float]] = defaultdict(dict)
    for row in members:
        for c in row.certificates:
            if c.kind == "task" and not c.refused:
                values[c.name][x(row)] = c.sparsity or 0.0
    places = sorted(set(map(x, members)))
    at = [[found[place] for found in values.values() if place in found] for place in places]
    mean = [float(np.mean(one)) if one else None for one in at]
    spread = [float(np.std(one, ddof=1)) if len(one) > 1 else 0.0 for one in at]
    low = [None if m is None else max(0.0, m - s) for m, s in zip(mean, spread, strict=True)]
    high = [None if m is None else min(1.0, m + s) for m, s in zip(mean, spread, strict=True)]
    # The mean first: of more names than there are colours it has one to itself.
    named = {place: f"{place / 1e9:.3g}B" if unit == "parameters" else f"{place}" for place in places}
    series = [Series("mean", tuple(named.values()), tuple(mean), tuple(low), tuple(high))]
    series += [
        Series(name, tuple(named[place] for place in found), tuple(found.values()), kind="dots")
        for name, found in values.items()
    ]
    title = ", ".join(str(part) for part in group if part not in (None, ""))
    return Panel(title, tuple(series), unit, y_label)
