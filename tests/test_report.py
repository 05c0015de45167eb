"""Figures and tables as pictures, CSV, text and one page, with names that try to be more than names."""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import json
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from browser import Browser, found
from report_cases import sections

from lm_eval_sparse.analysis import look, static
from lm_eval_sparse.analysis.figure import Figure, Panel, Section, Series, Table
from lm_eval_sparse.analysis.page import Facts, page
from lm_eval_sparse.analysis.tables import figure_csv, table_csv

HOSTILE = (
    "</script><script>window.hit=1</script>",
    '"><img src=x onerror=window.hit=1>',
    '<a href="javascript:window.hit=1">link</a>',
    "<b>bold</b><br>line",
    "<!--<script>",
    "'+(window.hit=1)+'",
    "{{ 7*7 }}${7*7}%{x}",
    "&lt;i&gt;",
    "__proto__",
    "$\\alpha^2$",
    "line\u2028two\u2029three",
    "\ud800 half",
    "\x1b[31mred\u202e",
    '=HYPERLINK("http://x")',
    "x" * 3000,
)


def _hostile() -> list[Section]:
    made = []
    for n, name in enumerate(HOSTILE):
        x, y = (0.5, 0.9), (0.8, 0.7)
        lines = (Series(name, x, y, (0.7, 0.6), (0.9, 0.8), hover=(name, name)), Series("dense", x, (0.8, 0.8)))
        facets = (("model", name), (name, name))
        panels = (
            Panel(name, lines, name, name, note=name, facets=facets),
            Panel(f"categories {n}", (Series(name, (name, "b"), (1, 2), kind="bars"),), name, name),
        )
        table = Table(f"table_{n}", name, (name, "number"), ((name, 1.5), ("-1+1", -2)), name)
        made.append(Section(f"part_{n}", name, (name,), (Figure(f"figure_{n}", name, name, panels),), (table,)))
    return made


def _facts() -> Facts:
    name = HOSTILE[0]
    return Facts(
        name, HOSTILE, name, name, 3, HOSTILE, tuple((name, name) for name in HOSTILE), HOSTILE, HOSTILE[:2], HOSTILE,
        HOSTILE,
    )  # fmt: skip


@pytest.fixture
def rng() -> np.random.Generator:
    seed = np.random.SeedSequence().entropy
    print(f"seed {seed}")  # shown where a test fails
    return np.random.default_rng(seed)


# -- values


def test_figures_refuse_what_cannot_be_drawn() -> None:
    for make in (
        lambda: Series("a", (1, 2), (1,)),
        lambda: Series("a", (1, "b"), (1, 2)),
        lambda: Series("a", (1,), (1,), low=(0,)),
        lambda: Series("a", (1,), (1,), (0, 1), (2,)),
        lambda: Series("a", (1,), (1,), kind="pie"),
        lambda: Panel("p", (Series("a", (1,), (1,)), Series("b", ("c",), (1,))), "", ""),
        lambda: Figure("no/file", "", "", ()),
        lambda: Table("t", "", ("a", "b"), ((1,),)),
        lambda: Section("s", "", sentences=(1,)),
    ):
        with pytest.raises(ValueError):
            make()
    some = Series("a", np.array([1, np.nan, 3]), [np.float32(1), 2, np.inf])
    assert (some.x, some.y) == ((1.0, None, 3.0), (1.0, None, None))


def test_colours_stay_apart_where_names_meet(rng: np.random.Generator) -> None:
    names = [f"method {n}" for n in range(20)]
    figures = []
    for n in range(12):
        chosen = rng.choice(names, 4, replace=False)
        lines = tuple(Series(name, (0,), (1,)) for name in ("dense", "an oracle", *chosen))
        figures.append(Figure(f"f{n}", "", "", (Panel("", lines, "", ""),)))
    found_styles = look.styles(figures)
    assert found_styles["dense"].colour == "#111111" and found_styles["an oracle"].colour == "#767676"
    for figure in figures:
        looks = [found_styles[series.name] for series in figure.panels[0].series]
        assert len({(style.colour, style.mark) for style in looks}) == len(looks)
    # More names than colours in one figure still differ, by their marks.
    many = look.styles([Figure("f", "", "", (Panel("", tuple(Series(n, (0,), (1,)) for n in names), "", ""),))])
    assert len({(style.colour, style.mark) for style in many.values()}) == len(names)


@pytest.mark.parametrize("log", (False, True))
def test_ticks_are_round_and_inside(rng: np.random.Generator, log: bool) -> None:
    for _ in range(300):
        low = 10 ** rng.uniform(-8, 18) if log else rng.normal() * 10 ** rng.uniform(-5, 15)
        high = low * 10 ** rng.uniform(0.05, 9) if log else low + abs(low or 1) * 10 ** rng.uniform(-4, 4)
        ticks = look.round_ticks((low, high), log)
        assert 1 <= len(ticks) <= 7
        assert all(low * (1 - 1e-9) - 1e-9 * (high - low) <= value <= high + 1e-9 * (high - low) for value, _ in ticks)
        assert len({words for _, words in ticks}) == len(ticks)
        for value, words in ticks:
            assert float(words.replace(",", "")) == pytest.approx(value, abs=1e-6 * (high - low), rel=1e-6)


# -- files


def test_csv_holds_all_points_and_no_formulas() -> None:
    made = sections()
    figure = made[0].figures[0]
    rows = list(csv.reader(io.StringIO(figure_csv(figure))))
    points = [
        (panel.title, series.name, series.x[n], series.y[n])
        for panel in figure.panels
        for series in panel.series
        for n in range(len(series.x))
    ]
    read = [(row[0], row[4], float(row[5]), float(row[6]) if row[6] else None) for row in rows[1:]]
    assert read == points
    table = Table("t", "", ("a", "b"), (("a", -1.5), ("b", None), ("c", 2)))
    rows = list(csv.reader(io.StringIO(table_csv(table))))
    assert [number for _, number in rows] == ["b", "-1.5", "", "2"]
    for section in _hostile():
        for content in (table_csv(section.tables[0]), figure_csv(section.figures[0])):
            assert "\x1b" not in content and "\u202e" not in content and content.encode()
            assert not any(cell[:1] in "=+@\t\r" for row in csv.reader(io.StringIO(content)) for cell in row if cell)


def _marks(svg: bytes) -> list[tuple[float, float]]:
    root = ElementTree.fromstring(svg)
    groups = [g for g in root.iter("{http://www.w3.org/2000/svg}g") if g.get("id", "").startswith("PathCollection")]
    return [(float(u.get("x")), float(u.get("y"))) for g in groups for u in g.iter("{http://www.w3.org/2000/svg}use")]


@pytest.mark.parametrize("log", (False, True))
def test_points_stand_where_their_figures_are(rng: np.random.Generator, log: bool) -> None:
    x = np.sort(rng.uniform(1, 1000, 12))
    y = list(rng.normal(size=12))
    y[4] = None
    figure = Figure("f", "t", "", (Panel("p", (Series("a", x, y),), "x", "y", log_x=log),))
    places = np.array(_marks(static.draw(figure, formats=("svg",))["svg"]))
    assert len(places) == 11
    known = np.array([v is not None for v in y])
    across = np.log(x[known]) if log else x[known]
    for drawn, value, sign in ((places[:, 0], across, 1), (places[:, 1], np.array(y, float)[known], -1)):
        slope, start = np.polyfit(value, drawn, 1)
        assert slope * sign > 0
        np.testing.assert_allclose(slope * value + start, drawn, atol=0.01)


def test_all_kinds_become_pictures(tmp_path: Path) -> None:
    from PIL import Image

    names = [path.name for path in static.write(tmp_path / "new", sections(tasks=2, lengths=1))]
    stems = {"curves", "isocost", "certified", "tolerance"}
    assert set(names) == {f"{stem}.{kind}" for stem in stems for kind in ("png", "svg", "csv")} | {
        "equal_cost.csv", "certificates.csv"
    }  # fmt: skip
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == sorted(names)  # no rests of writing
    for stem in stems:
        picture = np.asarray(Image.open(tmp_path / "new" / f"{stem}.png").convert("RGB")).astype(int)
        assert (picture == 255).all(2).mean() > 0.5 and len(np.unique(picture @ (1, 256, 65536))) > 50
        ElementTree.parse(tmp_path / "new" / f"{stem}.svg")
    again = static.draw(sections(tasks=2, lengths=1)[1].figures[0])
    assert again["svg"] == static.draw(sections(tasks=2, lengths=1)[1].figures[0])["svg"]


def test_pictures_take_names_for_text() -> None:
    for section in _hostile():
        svg = static.draw(section.figures[0], formats=("svg",))["svg"]
        root = ElementTree.fromstring(svg)
        kinds = {element.tag.rpartition("}")[2] for element in root.iter()}
        assert not kinds & {"script", "a", "image", "b", "i"}
    texts = [t.text for t in ElementTree.fromstring(static.draw(_hostile()[8].figures[0])["svg"]).iter() if t.text]
    assert "__proto__" in texts


def test_empty_figures_are_drawn() -> None:
    nothing = Panel("nothing", (Series("a", (), ()), Series("b", (1.0,), (None,))), "x", "y", note="no runs")
    logs = Panel("logs", (Series("a", (0.0, 1.0), (-1.0, 0.0), (-2, -1), (0, 0)),), "x", "y", log_x=True, log_y=True)
    for panels in ((), (nothing,), (nothing, logs)):
        assert static.draw(Figure("f", "t", "", panels))["png"]
        page([Section("s", "s", figures=(Figure("f", "t", "", panels),))], Facts("t"))


# -- the page


def _data(said: str) -> dict:
    held = re.search(r'<script type="application/json" id="data">(.*?)</script>', said, re.S).group(1)
    assert not re.search("[<>&\u2028\u2029]", held)
    return json.loads(held)


def test_page_is_complete_in_itself() -> None:
    said = page(sections(), Facts("t"))
    stated = re.search(r"This file has ([0-9.]+) MB", said).group(1)
    assert float(stated) == pytest.approx(len(said.encode()) / 1e6, abs=0.06)
    ours = said.replace(re.search(r"<script>.*?</script>", said, re.S).group(0), "")
    assert not re.search(r"https?://(?!www\.w3\.org/)", ours) and " src=" not in ours and "<link" not in ours
    scripts = re.findall(r"<script>(.*?)</script>", said, re.S)
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', said).group(1)
    for script in scripts:
        assert f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'" in policy
    assert len(scripts) == 2 and "'unsafe-inline'" not in policy.split("style-src")[0]
    held = _data(said)["figures"]["curves"]
    for panel, drawn in zip(sections()[0].figures[0].panels, held, strict=True):
        for series, one in zip(panel.series, drawn["series"], strict=True):
            assert one["name"] == series.name
            assert [v is None for v in one["y"]] == [v is None for v in series.y]
            np.testing.assert_allclose(
                [v for v in one["y"] if v is not None], [v for v in series.y if v is not None], rtol=1e-6
            )


def test_hostile_names_stay_inside_of_their_json() -> None:
    held = _data(page(_hostile(), _facts()))["figures"]
    for n, name in enumerate(HOSTILE[:9]):
        first, second = held[f"figure_{n}"]
        assert first["title"] == first["x"] == first["series"][0]["about"][0] == name
        if len(name) <= look.LONGEST:
            assert first["series"][0]["name"] == second["series"][0]["at"][0] == name


def test_names_of_a_page_come_once() -> None:
    part = sections()[1]
    with pytest.raises(ValueError, match="come twice"):
        page([part, part], Facts("t"))


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if found() is None:
        pytest.skip("needs Chromium or Chrome to open pages in; there is none on PATH")
    with Browser() as started:
        yield started


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "report.html"
    facts = Facts("A study", ("One sentence.",), "lm-eval-sparse", runs=3, marks=("Seeds are mixed.",))
    path.write_text(page(sections(lengths=1), facts), encoding="utf-8")
    return path


ALL_DRAWN = """(() => {
  dispatchEvent(new Event("beforeprint"));
  const plots = [...document.querySelectorAll(".plot")];
  return [plots.length, plots.filter((plot) => plot.querySelector("svg.main-svg .points path")).length];
})()"""
PAUSE = "new Promise((done) => setTimeout(done, {}))"


@pytest.mark.parametrize("width", (1280, 375))
def test_all_figures_are_drawn(browser: Browser, study: Path, width: int) -> None:
    browser.open(study, width=width, dark=width < 400, touch=width < 400)
    near = browser.run(f"{PAUSE.format(300)}.then(() => document.querySelectorAll('.plot .main-svg').length)")
    panels = sum(len(figure.panels) for section in sections(lengths=1) for figure in section.figures)
    assert 0 < near < 3 * panels  # only what is near
    assert browser.run("document.documentElement.scrollWidth") <= width
    ground = browser.run("getComputedStyle(document.body).backgroundColor")
    assert (ground == "rgb(255, 255, 255)") == (width > 400)
    assert browser.run(ALL_DRAWN) == [panels, panels]
    assert browser.errors == [] and browser.requests == [study.as_uri()]


def test_points_of_the_page_stand_where_their_figures_are(browser: Browser, study: Path) -> None:
    browser.open(study)
    browser.run(ALL_DRAWN)
    places = browser.run(
        """[...document.querySelectorAll("#figure-isocost .plot")].map((plot) =>
          [...plot.querySelectorAll(".points path")].map((path) => {
            const box = path.getBoundingClientRect();
            return [box.x + box.width / 2, box.y + box.height / 2];
          }))"""
    )
    for panel, drawn in zip(sections(lengths=1)[1].figures[0].panels, places, strict=True):
        points = [point for s in panel.series if s.kind == "dots" for point in zip(s.x, s.y, strict=True)]
        at, (x, y) = np.array(drawn), np.array(points).T
        assert len(at) == len(points)
        for value, place, sign in ((np.log(x), at[:, 0], 1), (y, at[:, 1], -1)):
            slope, start = np.polyfit(value, place, 1)
            assert slope * sign > 0
            np.testing.assert_allclose(slope * value + start, place, atol=0.6)


def test_page_answers(browser: Browser, study: Path) -> None:
    """Filter, legend, theme, sorting, rows, numbers, a new width."""
    browser.open(study)
    total = browser.run("document.querySelectorAll('.panel').length")
    chosen = browser.run(
        """(() => {
          const select = document.querySelector('[data-facet="model"]');
          select.selectedIndex = 1;
          select.dispatchEvent(new Event("input", { bubbles: true }));
          const shown = document.querySelectorAll("#figure-curves .panel:not([hidden])").length;
          return [shown, document.getElementById("count").textContent];
        })()"""
    )
    assert chosen[0] == 6 and chosen[1].endswith(f"of {total} panels")
    lines = browser.run(
        """(() => {
          const plot = document.querySelector("#figure-curves .plot");
          const before = plot.querySelectorAll(".scatterlayer .trace").length;
          document.querySelectorAll("#figure-curves .legend button")[1].click();
          return new Promise((done) => setTimeout(() =>
            done([before, plot.querySelectorAll(".scatterlayer .trace").length]), 300));
        })()"""
    )
    assert lines[0] == lines[1] + 2  # a line and its band
    themes = browser.run(
        """(() => {
          const ground = () => getComputedStyle(document.body).backgroundColor;
          const button = document.getElementById("theme");
          return [0, 0, 0].map(() => (button.click(), [button.textContent, ground()]));
        })()"""
    )
    assert [words for words, _ in themes] == ["Theme: dark", "Theme: light", "Theme: automatic"]
    assert [ground == "rgb(255, 255, 255)" for _, ground in themes] == [False, True, True]
    name = sections()[2].tables[0].header.index("certified sparsity")
    for down in (False, True):
        cells = browser.run(
            f"""(() => {{
              const table = document.querySelector("#table-certificates table");
              table.tHead.rows[0].cells[{name}].querySelector("button").click();
              return [...table.tBodies[0].rows].map((row) => row.cells[{name}].textContent.trim());
            }})()"""
        )
        numbers = [float(cell) for cell in cells if cell != "–"]
        assert numbers == sorted(numbers, reverse=down) and cells[len(numbers) :] == ["–"] * (len(cells) - len(numbers))
    rows = browser.run(
        """(() => {
          const input = document.querySelector("#table-certificates .rows input");
          input.value = "quest vt";
          input.dispatchEvent(new Event("input"));
          return document.querySelectorAll("#table-certificates tbody tr:not([hidden])").length;
        })()"""
    )
    assert rows == 2
    numbers = browser.run(
        f"""(() => {{
          const details = document.querySelector("#figure-curves .numbers");
          details.open = true;
          return {PAUSE.format(100)}.then(() => details.querySelectorAll("tbody tr").length);
        }})()"""
    )
    assert numbers == sum(y is not None for s in sections(lengths=1)[0].figures[0].panels[0].series for y in s.y)
    browser.call("Emulation.setDeviceMetricsOverride", width=500, height=900, deviceScaleFactor=1, mobile=False)
    widths = browser.run(
        f"""{PAUSE.format(600)}.then(() => {{
          scrollTo(0, document.querySelector("#figure-curves").offsetTop);
          return {PAUSE.format(300)}.then(() => {{
            const plot = document.querySelector("#figure-curves .plot");
            return [plot.clientWidth, plot.querySelector(".main-svg").clientWidth];
          }});
        }})"""
    )
    assert widths[0] == widths[1] < 500
    assert browser.errors == []


REASON = "at 0.8: loss 0.003 ± 0.003 on 100 documents, p=0.016 > 0.014; 104 documents would do if the loss stays"


@pytest.mark.parametrize("width", (1280, 375))
def test_reasons_of_a_wide_table_can_be_read(browser: Browser, tmp_path: Path, width: int) -> None:
    header = (*(f"a column {n}" for n in range(13)), "why no more")
    rows = tuple((*("some words" for _ in range(13)), f"{REASON} {n}") for n in range(30))
    path = tmp_path / "wide.html"
    path.write_text(page([Section("s", "S", (), (), (Table("wide", "Wide", header, rows),))], Facts("T")))
    browser.open(path, width=width, touch=width < 400)
    sides = """(() => {
      const scroll = document.querySelector(".table .scroll"), frame = scroll.getBoundingClientRect();
      const cells = [scroll.querySelector("th:last-child"), scroll.querySelector("td:last-child")];
      return [scroll.scrollWidth > scroll.clientWidth, ...cells.flatMap((cell) => {
        const box = cell.getBoundingClientRect();
        return [box.left >= frame.left - 1, box.right <= Math.min(frame.right, innerWidth) + 1];
      })];
    })()"""
    if width < 400:  # there is room for a column or two: that there are more is seen, and each can be reached
        assert browser.run(sides)[:3] == [True, True, False]
        assert "gradient" in browser.run("getComputedStyle(document.querySelector('.table .scroll')).backgroundImage")
        browser.run("document.querySelector('.table .scroll').scrollLeft = 1e6")
    assert browser.run(sides) == [True] * 5
    assert browser.run("document.documentElement.scrollWidth") <= width


def test_hostile_names_stay_text(browser: Browser, tmp_path: Path) -> None:
    path = tmp_path / "hostile.html"
    path.write_text(page(_hostile(), _facts()), encoding="utf-8")
    browser.open(path)
    panels = 2 * len(HOSTILE)
    assert browser.run(ALL_DRAWN) == [panels, panels]
    browser.run("document.querySelectorAll('.numbers').forEach((details) => (details.open = true))")
    kinds = browser.run(
        f"""{PAUSE.format(300)}.then(() => [
          window.hit === undefined,
          document.querySelectorAll("script").length,
          document.querySelectorAll("img, iframe, object, embed, i, .plot a, a[href^=javascript], [onerror]").length,
          document.querySelectorAll("b").length,
        ])"""
    )
    assert kinds == [True, 3, 0, 0]
    hovered = browser.run(
        """[...document.querySelectorAll(".panel:first-child .plot")].map((plot) => {
          const curve = plot.data.findIndex((trace) => trace.hovertemplate);
          Plotly.Fx.hover(plot, [{ curveNumber: curve, pointNumber: 0 }]);
          return plot.querySelector(".hoverlayer")?.textContent ?? "";
        })"""
    )
    ticks = browser.run("[...document.querySelectorAll('.xtick text')].map((text) => text.textContent)")
    for name, said in zip(HOSTILE[:9], hovered, strict=False):
        assert name in said
    for name in (name for name in HOSTILE[:9] if len(name) <= 24):
        assert name in ticks
    assert len(browser.run("[...document.querySelectorAll('h4')].map((head) => head.textContent)")) == panels
    assert browser.run("document.querySelectorAll('.hoverlayer a, .hoverlayer script').length") == 0
    assert browser.errors == [] and browser.requests == [path.as_uri()]
