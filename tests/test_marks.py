"""Marks that series choose and bands that are not drawn, the same in pictures and on the page."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from browser import Browser, found

from lm_eval_sparse.analysis import look, static
from lm_eval_sparse.analysis.figure import Figure, Panel, Section, Series
from lm_eval_sparse.analysis.page import Facts, page
from lm_eval_sparse.analysis.tables import figure_csv


def _data(figure: Figure) -> dict[str, Any]:
    said = page([Section("s", "s", figures=(figure,))], Facts("t"))
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', said, re.S).group(1))


def test_a_series_may_have_a_mark_of_its_own_and_a_band_that_is_not_drawn() -> None:
    x, low, high = (1.0, 2.0, 3.0), (0.1, 0.1, -9.0), (0.9, 0.9, 0.9)

    def of(**more: Any) -> tuple[int, int, tuple[float, float], dict]:
        """Marks, areas, range of y, and the page's data of one series."""
        figure = Figure("f", "t", "", (Panel("p", (Series("a", x, (0.5, 0.5, 0.5), low, high, **more),), "x", "y"),))
        (panel,) = look.prepare(figure)
        svg = static.draw(figure, formats=("svg",))["svg"].decode()
        (held,) = _data(figure)["figures"]["f"]
        return svg.count("<use "), svg.count("PolyCollection"), panel.y_range, held["series"][0]

    marks, areas, span, held = of(kind="dashed")
    assert (marks, areas, held["mark"], held["band"]) == (0, 1, None, True) and span[0] < -9
    marks, areas, span, held = of(kind="dashed", mark=look.MARKS)  # the first one again
    assert (marks, areas, held["mark"]) == (3, 1, 0)
    assert of(mark=3)[-1]["mark"] == 3
    marks, areas, span, held = of(band=False)
    assert (marks, areas, held["band"]) == (3, 0, False) and span[0] > 0
    assert held["low"] == list(low), "it is shown beside a point"
    figure = Figure("f", "t", "", (Panel("p", (Series("a", x, x, low, high, band=False),), "x", "y"),))
    assert "-9" in figure_csv(figure), "and written down"
    for wrong in (-1, "o", 0.5):
        with pytest.raises(ValueError, match="a mark is a number"):
            Series("a", (1,), (1,), mark=wrong)


@pytest.mark.skipif(found() is None, reason="no Chromium on this system")
def test_the_page_draws_them_alike(tmp_path: Path) -> None:
    x, low, high = (1.0, 2.0, 3.0), (0.1, 0.1, 0.1), (0.9, 0.9, 0.9)
    drawn = {}
    with Browser() as browser:
        for name, more in (("plain", {}), ("marked", {"mark": 3}), ("unbanded", {"mark": 3, "band": False})):
            series = Series("a", x, (0.5, 0.5, 0.5), low, high, kind="dashed", **more)
            figure = Figure("f", "t", "", (Panel("p", (series,), "x", "y"),))
            place = tmp_path / f"{name}.html"
            place.write_text(page([Section("s", "s", figures=(figure,))], Facts("t")), encoding="utf-8")
            browser.open(place)
            drawn[name] = browser.run(
                """new Promise((done) => {
                  const look = () => {
                    const plot = document.querySelector(".plot .scatterlayer");
                    if (!plot || !plot.querySelector(".js-line")) return setTimeout(look, 20);
                    done([plot.querySelectorAll("path.point").length, plot.querySelectorAll(".js-fill").length]);
                  };
                  look();
                })"""
            )
            assert not browser.errors
    assert drawn == {"plain": [0, 1], "marked": [3, 1], "unbanded": [3, 0]}
