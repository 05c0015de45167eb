"""Tables as CSV that nothing computes, as text for a terminal, and as cells of the page."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable

import pytest
from report_cases import sections

from lm_eval_sparse.analysis import look, tidy
from lm_eval_sparse.analysis.figure import Section, Table
from lm_eval_sparse.analysis.page import Facts, page
from lm_eval_sparse.analysis.tables import show, table_csv


def _of_table(text: str) -> str:
    return list(csv.reader(io.StringIO(table_csv(Table("t", "", ("a",), ((text,),))))))[1][0]


def _of_frame(text: str) -> str:
    import pandas

    said = tidy.csv(pandas.DataFrame({"a": [text], "b": [1]})).decode()
    return list(csv.DictReader(io.StringIO(said, newline="")))[0]["a"]


FORMULAS = ("=1+1", "+1", "-1", "@a", "＝1", "＋1", "－1", "＠a", "﹦1", "﹣1")
BEFORE = ("", " ", "  ", "\t", "\n", "\r", "\r\n", "\u00a0", "\u3000", "\u200b", "\ufeff", "\u2060", " \u200d\t")


@pytest.mark.parametrize("written", [_of_table, _of_frame])
def test_no_cell_is_computed(written: Callable[[str], str]) -> None:
    for text in (before + formula for before in BEFORE for formula in FORMULAS):
        cell = written(text)
        # Either a spreadsheet is told that it is a text, or what stands in front is written out.
        assert cell.startswith(("'", "\\")), (text, cell)
    for text in ("\ta", "\na", "\ra"):
        assert written(text)[0] == "'"
    for text in ("a=1", "quest", "1-2", "漢字", "<=1", "", "'=1"):
        assert written(text) == " ".join(text.split())
    assert "\x1b" not in written("a\x1b[2J")


def test_text_tables_fit_and_stand_in_columns() -> None:
    made = sections()[2].tables[0]
    for width in (60, 80, 100):
        said = show(made, width)
        assert max(map(len, said.splitlines())) <= width
        assert said.count("flexprefill") == 12 or width > 60
    table = Table("t", "Title", ("name", "score"), (("a", 0.5), ("漢字", 12.25), ("c\x1b[2J", None)), "words")
    lines = show(table).splitlines()
    assert lines[0] == "Title" and lines[-1] == "words"
    assert [line.split()[-1] for line in lines[3:5]] == ["0.50", "12.25"]
    assert len(lines[3]) == len(lines[4]) + 2  # two characters of two columns each
    assert "\x1b" not in show(table) and "\\x1b[2J" in lines[5]
    assert "(no rows)" in show(Table("t", "", ("a",), ()))


def test_a_table_turned_upright_shows_empty_cells_as_well() -> None:
    header = ("model", *(f"task{at}" for at in range(30)))
    said = show(Table("t", "", header, (("m", 0.5, *(None,) * 29),)), 80).splitlines()
    assert [line.split() for line in said[1:]] == [["model", "m"], ["task0", "0.5"]] + [
        [f"task{at}", "-"] for at in range(1, 30)
    ]


def test_numbers_of_a_column_are_written_by_one_rule() -> None:
    for values, said in (
        ((0.3, 0.25, 0.0), ["0.30", "0.25", "0.00"]),
        ((0.5, 0.00003, -0.00003, None), ["0.5", "<0.001", ">-0.001", ""]),
        ((0.12345, 12345.6), ["0.123", "12,345.600"]),
        ((0.00003, 0.0, 0.0004), ["3.00e-5", "0", "4.00e-4"]),
        ((5e17, 1234.5, -2e6), ["5.00e17", "1.23e3", "-2.00e6"]),
        ((4096, 16384, 1000000), ["4,096", "16,384", "1,000,000"]),
        (("a", None, 1.0), ["a", "", "1"]),
    ):
        assert look.column(values) == said


def test_a_column_of_nothing_is_left_to_the_file() -> None:
    table = Table("t", "T", ("model", "setting", "score"), (("m", "", None), ("n", "", None)))
    made = page([Section("s", "S", (), (), (table,))], Facts("T"))
    assert ">model<" in made.replace("\n", "") and ">setting<" not in made and ">score<" in made
    assert table_csv(table).splitlines()[0] == "model,setting,score"
    assert ">setting<" in page([Section("s", "S", (), (), (Table("t", "T", ("setting",), ()),))], Facts("T"))


def test_a_long_table_says_what_is_left_out() -> None:
    rows = tuple((f"row{number}", number) for number in range(507))
    made = page([Section("s", "S", (), (), (Table("long", "Long", ("a", "b"), rows, ""),))], Facts("T"))
    assert "The first 500 of 507 rows; all of them are in figures/long.csv." in made
    assert ">row499<" in made.replace(" ", "") and "row500" not in made
