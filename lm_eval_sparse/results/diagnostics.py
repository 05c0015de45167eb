"""What `diagnose=N` has left in a result file: figures of every layer and head, read and checked, and as a table."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UserError, one_line
from ..labels import label
from .figures import PHASES
from .load import candidates, load
from .parts import Part, is_finite

logger = logging.getLogger(__name__)

#: Figures of query heads, with the words for them.
HEADS = {"mass_kept": "mass kept", "output_error": "output error", "oracle_overlap": "oracle overlap"}
#: What a method keeps of each token, a figure of KV heads.
BITS = "auxiliary_bits_per_token"
#: More layers or heads than that no model has, and no picture shows.
MOST = 1024


@dataclass(frozen=True)
class Diagnosed:
    """What the samples of one run say of one phase.

    Attributes:
        where: the file.
        model, method, phase: names.
        samples, queries: prompts, and queries of each head, that the figures are averages over.
        layers: numbers of the layers that a method ran in.
        figures: by name a row for each layer with a value for each query head (of `BITS`: KV head); None where there
            is none.
    """

    where: str
    model: str
    method: str
    phase: str
    samples: int
    queries: int
    layers: list[int]
    figures: dict[str, list[list[float | None]]]


def read(paths: Iterable[str | Path]) -> list[Diagnosed]:
    """The diagnosed phases of all result files among the given files and below the given folders.

    A file below a folder that is torn or none of lm-eval is left out with a warning.

    Raises:
        UserError: a file that was named itself is not good, none is, or none has what `diagnose=N` writes.
    """
    files, found = candidates(paths), []
    refused: list[UserError] = []
    for path, named in files:
        try:
            found += diagnosed(load(path), str(path))
        except UserError as error:
            if named or len(refused) + 1 == len(files):
                raise
            refused.append(error)
    for error in refused:
        logger.warning("a file is left out: %s", one_line(str(error)))
    if not found:
        more = f" and {len(files) - 1} more" if len(files) > 1 else ""
        raise UserError(
            f"{files[0][0]}{more}: nothing was diagnosed in these runs; run lm_eval with a method and --model_args "
            "method=NAME,sparsity=S,diagnose=8"
        )
    return found


def diagnosed(content: dict[str, Any], where: str) -> list[Diagnosed]:
    """The diagnosed phases of one result file, a JSON object of any shape. Raises `UserError`."""
    whole = Part(where, "", content)
    if not whole["config"] or not (sparse := whole["config"]["sparse"]) or not sparse["phases"]:
        return []
    names = [part.value for part in (whole["model_name"], whole["config"]["model"]) if isinstance(part.value, str)]
    model = next((label(name) for name in names if name.strip()), "?")  # a model in memory need not have one
    found = []
    for phase in PHASES:
        part = sparse["phases"][phase]
        if not part or not (block := part["diagnostics"]):
            continue
        rows = block["layers"].list()
        figures = {figure: [_values(row, figure) for row in rows] for figure in HEADS}
        if any(row[BITS] for row in rows):
            figures[BITS] = [_values(row, BITS) for row in rows]
        for figure, values in figures.items():
            if len({len(row) for row in values}) > 1:
                raise block["layers"].refuse(f"as many {figure} in each layer")
        if not rows or not figures["mass_kept"][0] or len({len(figures[figure][0]) for figure in HEADS}) > 1:
            raise block["layers"].refuse("a list of layers, each with figures of its heads")
        found.append(
            Diagnosed(
                where,
                model,
                label(part["method"].text()),
                phase,
                block["samples"].count(),
                block["queries"].count(),
                [row["layer"].count() for row in rows],
                figures,
            )
        )
    return found


def _values(row: Part, figure: str) -> list[float | None]:
    values = row[figure].list()
    for value in values:
        if value.value is not None and (not is_finite(value.value) or value.value < 0):
            raise value.refuse("a number of at least 0, or null,")
        if value.value is not None and figure in ("mass_kept", "oracle_overlap") and value.value > 1.001:
            raise value.refuse("a number from 0 to 1, or null,")
    return [value.value for value in values]


# -- tables


def table(found: Iterable[Diagnosed]) -> str:
    """A line for each phase of each run: means over layers and heads, and the head that keeps least."""
    rows = [["model", "method", "phase", "samples", "queries", *HEADS.values(), "bits a token", "least mass"]]
    for one in found:
        means = [_mean(one.figures[figure]) for figure in HEADS]
        bits = _mean(one.figures[BITS]) if BITS in one.figures else None
        rows.append([
            label(one.model, 40), label(one.method, 40), one.phase, str(one.samples), str(one.queries),
            *map(_shown, means), "-" if bits is None else f"{bits:.4g}", _least(one),
        ])  # fmt: skip
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ("  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def _mean(rows: list[list[float | None]]) -> float | None:
    known = [value for row in rows for value in row if value is not None]
    return sum(known) / len(known) if known else None


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _least(one: Diagnosed) -> str:
    """The head that keeps least of its attention."""
    known = [
        (value, layer, head)
        for layer, row in zip(one.layers, one.figures["mass_kept"], strict=True)
        for head, value in enumerate(row)
        if value is not None
    ]
    if not known:
        return "-"
    value, layer, head = min(known)
    return f"{value:.4f} (layer {layer}, head {head})"


def summary(content: Mapping[str, Any]) -> str:
    """The table of a run that has just ended, as lm-eval holds its results; empty where nothing was diagnosed."""
    try:
        found = diagnosed(dict(content), "the results")
    except UserError:  # a run must not fail over what is printed at its end
        return ""
    return f"{table(found)}\n" if found else ""
