"""One cell of a sweep as its ledger keeps it: what was run, the records that came of it, and a checksum."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from .. import sealed
from ..errors import UserError
from .files import read_bytes, write_whole
from .schema import Record, parse

#: Raised when a field changes its meaning or goes.
SCHEMA = 1
#: What files of cells and the file that makes a folder a ledger are called.
LEDGER = "ledger.json"
_NAME = re.compile(r"cell_(?P<address>[0-9a-f]{20})\.json")
#: Folders of a ledger that hold what its cells were made of.
MADE_OF = ("raw", "work")


def address_of(name: str) -> str | None:
    """The address in the name of a cell's file; None for other names."""
    found = _NAME.fullmatch(name)
    return found["address"] if found else None


def file_of(folder: Path, address: str) -> Path:
    return folder / f"cell_{address}.json"


def write(path: Path, cell: Mapping[str, Any], records: Iterable[Record], made: Mapping[str, Any]) -> None:
    """Write a cell, whole or not at all. Raises `OSError`.

    Args:
        cell: what was run.
        made: when, where and how long.
    """
    rows = [
        {**row.model_dump(mode="json", exclude_defaults=True), "schema_version": row.schema_version} for row in records
    ]
    value = {"schema": SCHEMA, "cell": dict(cell), "made": dict(made), "records": rows}
    write_whole(path, sealed.seal(_place(path), value) + b"\n")


def read(path: Path) -> tuple[dict[str, Any], list[Record]]:
    """All that a cell's file holds, and its records.

    Raises:
        UserError: it is torn, changed, of another cell or of a newer version.
    """
    line = read_bytes(path).strip()
    try:
        value = sealed.unseal(_place(path), line)
    except sealed.Broken as error:
        raise UserError(f"{path}: not as a sweep has written it ({error}); delete it, and it is run again") from None
    if value.get("schema") != SCHEMA:
        raise UserError(
            f"{path}: a cell of schema {value.get('schema')}, and this version reads {SCHEMA}; upgrade lm-eval-sparse"
        )
    rows = value["records"] if isinstance(value.get("records"), list) else []
    found = [parse(json.dumps(row), f"{path}, record {number}") for number, row in enumerate(rows, 1)]
    return value, [row.model_copy(update={"source": str(path)}) for row in found]


def _place(path: Path) -> str:
    return f"lm-eval-sparse {path.name}"
