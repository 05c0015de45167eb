"""Every command line of the table goes as it should: refused in one line with nothing written, or carried out.

Some rows of each kind run daily, all of them with `--attacks`. `python -m tests.attacks` says how all of them go.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import attacks
import pytest
from attack_rows import EITHER, Row, daily, table

ROWS = table()
DAILY = {row.id for row in daily(ROWS)}
_ON_REQUEST = (pytest.mark.attacks,)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> attacks.Shared:
    return attacks.Shared.make(tmp_path_factory.mktemp("shared"))


@pytest.mark.parametrize(
    "row", [pytest.param(row, id=row.id, marks=() if row.id in DAILY else _ON_REQUEST) for row in ROWS]
)
def test_row(row: Row, shared: attacks.Shared, tmp_path: Path) -> None:
    outcome = attacks.run(row, shared, tmp_path)
    assert outcome.right, f"{outcome.kind}: {outcome.why} | {outcome.message} | {row.argv}"


def test_the_table_is_what_it_says() -> None:
    """Every area has rows, every row runs some time, and few leave open what is right."""
    assert len(ROWS) >= 370 and len(DAILY) >= 150
    areas = Counter(row.area for row in ROWS)
    assert min(areas.values()) >= 20, areas
    assert set(areas) == {row.area for row in ROWS if row.id in DAILY}
    assert sum(row.verdict == EITHER for row in ROWS) < len(ROWS) / 8
    assert all(row.doubt for row in ROWS if row.alone and row.verdict == EITHER)
