// Draws the figures of a report when they come near, and lets tables be sorted. Text from the data is always text:
// `textContent` in HTML, `escaped` for plotly, which obeys some tags of its own.
(() => {
  "use strict";
  const data = JSON.parse(document.getElementById("data").textContent);
  const SYMBOLS = ["circle", "square", "diamond", "triangle-up", "triangle-down", "cross", "x", "star"];
  const touch = matchMedia("(pointer: coarse)").matches;
  const root = document.documentElement;
  let paper = false;
  const system = matchMedia("(prefers-color-scheme: dark)");

  const escaped = (text) => String(text).replace(/[&<>]/g, (c) => ({ "&": "&amp;", "<": "&lt;", ">": "&gt;" })[c]);
  const make = (tag, fields = {}, ...children) => {
    const element = Object.assign(document.createElement(tag), fields);
    element.append(...children);
    return element;
  };
  const figureText = (value) => {
    if (value === null || value === undefined) return "unknown";
    const size = Math.abs(value);
    if (size !== 0 && (size >= 1e7 || size < 1e-4)) return value.toExponential(3).replace("e+", "e").replace(/\.?0+e/, "e");
    return String(Number(value.toPrecision(4 > Math.ceil(Math.log10(size || 1)) ? 4 : 8)));
  };

  // -- colours

  const chosenTheme = () => root.dataset.theme || "automatic";
  const dark = () => chosenTheme() === "dark" || (chosenTheme() === "automatic" && system.matches);
  const colour = (style) => data.styles[style][dark() ? 1 : 0];
  const variable = (name) => getComputedStyle(root).getPropertyValue(name).trim();
  const mark = (one) => one.mark ?? data.styles[one.style][2];
  const faint = (hex, alpha) =>
    `rgba(${[1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16)).join(",")},${alpha})`;

  // -- one panel

  // Points that are joined: without gaps, all with a band or none.
  const runs = (one) => {
    const found = [];
    let before = null;
    one.x.forEach((x, n) => {
      const state = one.y[n] === null ? null : one.low.length > 0 && one.low[n] !== null;
      if (state !== null) {
        if (state !== before) found.push([]);
        found[found.length - 1].push(n);
      }
      before = state;
    });
    return found;
  };

  // Corners of stairs: each value holds until the next place.
  const stairs = (points) =>
    points.flatMap(([x, y], n) => (n ? [[x, points[n - 1][1]], [x, y]] : [[x, y]]));

  const band = (one, tint) => {
    if (!one.band) return [];
    const x = [], y = [];
    for (const run of runs(one)) {
      if (!one.low.length || one.low[run[0]] === null) continue;
      let low = run.map((n) => [one.x[n], one.low[n]]);
      let high = run.map((n) => [one.x[n], one.high[n]]);
      if (one.kind === "step") [low, high] = [stairs(low), stairs(high)];
      if (x.length) x.push(null), y.push(null);
      for (const [a, b] of [...low, ...high.reverse()]) x.push(a), y.push(b);
    }
    if (!x.length) return [];
    return [{ type: "scatter", x, y, mode: "lines", line: { width: 0 }, fill: "toself", fillcolor: faint(tint, dark() ? 0.22 : 0.14), hoverinfo: "skip" }];
  };

  const said = (panel, one, n) => {
    const lines = [`<b>${escaped(one.name)}</b>`, `${escaped(panel.x)}: ${escaped(one.at[n])}`];
    const ends = one.low.length && one.low[n] !== null ? ` [${figureText(one.low[n])}, ${figureText(one.high[n])}]` : "";
    lines.push(`${escaped(panel.y)}: ${figureText(one.y[n])}${ends}`);
    if (one.about.length && one.about[n]) {
      lines.push(...(one.about[n].match(/.{1,60}(?:\s|$)|.{1,60}/g) || []).map(escaped));
    }
    return lines.join("<br>");
  };

  const traces = (panel, hidden) => {
    const [below, above, top] = [[], [], []]; // bands, lines and bars, clouds of points
    for (const one of panel.series) {
      if (hidden.has(one.name)) continue;
      const tint = colour(one.style);
      const trace = {
        x: one.x, y: one.y, hovertext: one.x.map((_, n) => said(panel, one, n)), hovertemplate: "%{hovertext}<extra></extra>",
        connectgaps: false, cliponaxis: false,
      };
      const points = one.kind === "dots" || one.kind === "bars";
      if (points && one.band && one.low.length) {
        const far = (ends, sign) => one.y.map((y, n) => (y === null || ends[n] === null ? 0 : Math.max(sign * (ends[n] - y), 0)));
        const ink = one.kind === "bars" ? variable("--text") : tint;
        trace.error_y = { type: "data", symmetric: false, array: far(one.high, 1), arrayminus: far(one.low, -1), thickness: 1.1, width: 0, color: ink };
      }
      if (one.kind === "bars") {
        above.push({ ...trace, type: "bar", width: one.width, marker: { color: tint, opacity: 0.88 } });
        continue;
      }
      if (!points) below.push(...band(one, tint));
      const many = one.x.length > 60;
      (points ? top : above).push({
        ...trace, type: "scatter",
        mode: points ? "markers" : (one.kind === "line" || one.mark !== null) && !many ? "lines+markers" : "lines",
        line: { color: tint, width: 1.8, dash: one.kind === "dashed" ? "5px,3px" : "solid", shape: one.kind === "step" ? "hv" : "linear" },
        marker: { color: tint, size: 7, symbol: SYMBOLS[mark(one)], line: { color: variable("--ground"), width: 0.8 } },
      });
    }
    return [...below, ...above, ...top];
  };

  const layout = (panel) => {
    const ends = (n) => (panel.log[n] ? panel.range[n].map(Math.log10) : panel.range[n]);
    const axis = (n) => ({
      type: panel.log[n] ? "log" : "linear", range: ends(n), fixedrange: touch, zeroline: false, automargin: true,
      gridcolor: variable("--grid"), linecolor: variable("--muted"), tickfont: { size: 11, color: variable("--muted") },
      exponentformat: "power", nticks: 7, minor: { showgrid: false },
    });
    const short = (words) => (words.length > 24 ? `${words.slice(0, 12)}…${words.slice(-11)}` : words);
    const ticks = (n) =>
      panel.ticks[n].length ? { tickmode: "array", tickvals: panel.ticks[n].map((t) => t[0]), ticktext: panel.ticks[n].map((t) => escaped(short(t[1]))) } : {};
    return {
      xaxis: { ...axis(0), ...ticks(0), showline: true, showgrid: !panel.names }, yaxis: { ...axis(1), ...ticks(1) },
      margin: { l: 40, r: 10, t: 6, b: 24 }, showlegend: false, barmode: "overlay",
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", hovermode: "closest", dragmode: touch ? false : "zoom",
      font: { family: getComputedStyle(document.body).fontFamily, color: variable("--text") },
      modebar: { bgcolor: "rgba(0,0,0,0)", color: variable("--muted"), activecolor: variable("--text") },
      hoverlabel: { bgcolor: variable("--raised"), bordercolor: variable("--line"), align: "left", font: { size: 12, color: variable("--text") } },
    };
  };

  const panels = [];
  for (const figure of document.querySelectorAll(".figure")) {
    const hidden = new Set();
    const own = [...figure.querySelectorAll(".panel")].map((element, n) => ({
      element, figure, hidden, data: data.figures[figure.dataset.figure][n], plot: element.querySelector(".plot"), near: false, stale: true,
    }));
    panels.push(...own);
    figure.legend = () => legend(figure, own, hidden);
  }
  const of = new Map(panels.map((panel) => [panel.plot, panel]));

  const draw = (panel) => {
    if (!panel.stale || panel.element.hidden) return;
    panel.stale = false;
    const config = { displaylogo: false, displayModeBar: panel.element.classList.contains("large") && !touch, responsive: false, modeBarButtons: [["toImage", "zoom2d", "pan2d", "resetScale2d"]] };
    const size = { width: panel.plot.clientWidth, height: panel.plot.clientHeight };
    if (paper) size.width = Math.min(size.width, panel.element.parentElement.classList.contains("alone") ? 660 : 325);
    Plotly.react(panel.plot, traces(panel.data, panel.hidden), { ...layout(panel.data), ...size }, config);
  };
  // What is near is drawn between two frames, a few at a time; the rest when it comes near.
  let waiting = false;
  const work = () => {
    waiting = false;
    const begun = performance.now();
    for (const panel of panels) {
      if (panel.near && panel.stale && !panel.element.hidden) {
        draw(panel);
        if (performance.now() - begun > 40) return soon();
      }
    }
  };
  const soon = () => {
    if (!waiting) waiting = true, setTimeout(work, 0);
  };
  const renew = (which = panels) => {
    for (const panel of which) panel.stale = true;
    soon();
  };
  const watch = new IntersectionObserver(
    (entries) => {
      for (const entry of entries) of.get(entry.target).near = entry.isIntersecting;
      soon();
    },
    { rootMargin: "600px 0px" },
  );
  for (const panel of panels) watch.observe(panel.plot);

  // -- legend: a button for each name, for all panels of the figure

  const legend = (figure, own, hidden) => {
    const names = new Map();
    for (const panel of own) for (const one of panel.data.series) if (!names.has(one.name)) names.set(one.name, one);
    const place = figure.querySelector(".legend");
    place.replaceChildren(
      ...[...names.values()].map((one) => {
        const button = make("button", { type: "button" }, swatch(one), make("span", { textContent: one.name }));
        button.setAttribute("aria-pressed", String(!hidden.has(one.name)));
        button.addEventListener("click", () => {
          if (!hidden.delete(one.name)) hidden.add(one.name);
          button.setAttribute("aria-pressed", String(!hidden.has(one.name)));
          renew(own);
        });
        return button;
      }),
    );
  };
  const swatch = (one) => {
    const tint = colour(one.style);
    const box = document.createElementNS("http://www.w3.org/2000/svg", "svg");
    const part = (tag, fields) => {
      const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
      for (const [name, value] of Object.entries(fields)) element.setAttribute(name, value);
      box.append(element);
    };
    for (const [name, value] of Object.entries({ width: 26, height: 12, "aria-hidden": "true" })) box.setAttribute(name, value);
    if (one.kind === "bars") part("rect", { x: 6, y: 1, width: 14, height: 10, fill: tint });
    else if (one.kind !== "dots") part("path", { d: "M0 6H26", stroke: tint, "stroke-width": 2, "stroke-dasharray": one.kind === "dashed" ? "5 3" : "none" });
    const shapes = [
      "M8.5 6a4.5 4.5 0 1 0 9 0a4.5 4.5 0 1 0-9 0", "M9 2h8v8h-8z", "M13 0.5L18.5 6L13 11.5L7.5 6z", "M13 1L18 10H8z", "M13 11L18 2H8z",
      "M11.4 1h3.2v3.4H18v3.2h-3.4V11h-3.2V7.6H8V4.4h3.4z", "M10 1l3 3 3-3 2 2-3 3 3 3-2 2-3-3-3 3-2-2 3-3-3-3z", "M13 0l1.6 4H19l-3.5 2.6L16.8 11 13 8.4 9.2 11l1.3-4.4L7 4h4.4z",
    ];
    if (one.kind === "line" || one.kind === "dots" || one.mark !== null) part("path", { d: shapes[mark(one)], fill: tint });
    return box;
  };

  // -- tables

  const compare = (a, b, down) => {
    const [one, two] = [a.dataset.value, b.dataset.value];
    const [none, nothing] = [a, b].map((cell) => cell.querySelector(".unknown") !== null || cell.textContent === "");
    if (none || nothing) return none - nothing; // what is not known stays last either way
    const order = one !== undefined && two !== undefined ? one - two : a.textContent.localeCompare(b.textContent, "en", { numeric: true });
    return down ? -order : order;
  };
  const sortable = (table) => {
    [...table.tHead.rows[0].cells].forEach((head, n) => {
      const button = make("button", { type: "button", textContent: head.textContent });
      head.replaceChildren(button);
      button.addEventListener("click", () => {
        const down = head.getAttribute("aria-sort") === "ascending";
        for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
        head.setAttribute("aria-sort", down ? "descending" : "ascending");
        const body = table.tBodies[0];
        body.append(...[...body.rows].filter((row) => row.cells.length > n).sort((a, b) => compare(a.cells[n], b.cells[n], down)));
      });
    });
  };
  for (const table of document.querySelectorAll(".table table")) sortable(table);
  for (const label of document.querySelectorAll(".rows")) {
    const [input, count, body] = [label.querySelector("input"), label.querySelector("output"), label.parentElement.querySelector("tbody")];
    label.hidden = false;
    input.addEventListener("input", () => {
      const words = input.value.toLowerCase().split(/\s+/).filter(Boolean);
      let shown = 0;
      for (const row of body.rows) {
        const text = row.textContent.toLowerCase();
        row.hidden = !words.every((word) => text.includes(word));
        shown += !row.hidden;
      }
      count.textContent = words.length ? `${shown} of ${body.rows.length}` : "";
    });
  }
  for (const panel of panels) {
    panel.element.querySelector(".numbers").addEventListener("toggle", (event) => {
      const place = event.target.querySelector(".scroll");
      if (place.firstChild) return;
      const rows = panel.data.series.flatMap((one) =>
        one.x.flatMap((_, n) => one.y[n] === null ? [] : [[one.name, one.at[n], figureText(one.y[n]), one.low.length ? figureText(one.low[n]) : "", one.high.length ? figureText(one.high[n]) : "", one.about[n] || ""]]),
      );
      const kinds = ["", panel.data.names ? "" : "number", "number", "number", "number", "short"];
      const line = (cells, tag) => make("tr", {}, ...cells.map((cell, n) => make(tag, { textContent: cell, className: kinds[n] })));
      place.append(make("table", {}, make("thead", {}, line(["series", panel.data.x, panel.data.y, "from", "to", ""], "th")), make("tbody", {}, ...rows.map((row) => line(row, "td")))));
    });
    const grow = panel.element.querySelector(".grow");
    grow.hidden = panels.length < 2;
    grow.addEventListener("click", () => {
      grow.setAttribute("aria-pressed", String(panel.element.classList.toggle("large")));
      renew([panel]);
    });
  }

  // -- filter

  const filter = document.getElementById("filter");
  const narrow = () => {
    const words = document.getElementById("words").value.toLowerCase().split(/\s+/).filter(Boolean);
    const wanted = [...filter.querySelectorAll("select")].filter((s) => s.value).map((s) => [s.dataset.facet, s.value.slice(1)]);
    let shown = 0;
    for (const panel of panels) {
      const text = panel.data.title.toLowerCase();
      // A panel that says nothing of a facet is about all of its values.
      const fits = wanted.every(([name, value]) => panel.data.facets.every((facet) => facet[0] !== name || facet[1] === value));
      panel.element.hidden = !(fits && words.every((word) => text.includes(word)));
      shown += !panel.element.hidden;
    }
    for (const figure of document.querySelectorAll(".figure")) {
      figure.querySelector(".none").hidden = figure.querySelector(".panel:not([hidden])") !== null || !figure.querySelector(".panel");
    }
    document.getElementById("count").textContent = `${shown} of ${panels.length} panels`;
    soon();
  };
  if (filter) {
    filter.hidden = false;
    const measure = () => root.style.setProperty("--bar", getComputedStyle(filter).position === "sticky" ? `${filter.offsetHeight - 1}px` : "0px");
    new ResizeObserver(measure).observe(filter);
    filter.addEventListener("input", narrow);
    filter.addEventListener("submit", (event) => event.preventDefault());
    narrow();
  }

  // -- theme, width, paper

  const theme = document.getElementById("theme");
  const repaint = () => {
    for (const figure of document.querySelectorAll(".figure")) figure.legend();
    theme.textContent = `Theme: ${chosenTheme()}`;
    renew();
  };
  const setTheme = (value) => {
    if (value === "automatic") delete root.dataset.theme;
    else root.dataset.theme = value;
    repaint();
  };
  const remember = (value) => {
    try {
      localStorage.setItem("lm-eval-sparse-theme", value);
    } catch {} // a page without storage forgets it
  };
  try {
    const kept = localStorage.getItem("lm-eval-sparse-theme");
    if (kept === "dark" || kept === "light") root.dataset.theme = kept;
  } catch {}
  theme.hidden = false;
  theme.addEventListener("click", () => {
    const next = { automatic: "dark", dark: "light", light: "automatic" }[chosenTheme()];
    remember(next);
    setTheme(next);
  });
  system.addEventListener("change", repaint);
  let width = innerWidth, pause = 0;
  addEventListener("resize", () => {
    if (innerWidth === width) return; // a phone's bar comes and goes
    width = innerWidth;
    clearTimeout(pause);
    pause = setTimeout(renew, 150);
  });
  let before = "automatic"; // paper is light and narrow, and holds all panels
  addEventListener("beforeprint", () => {
    [before, paper] = [chosenTheme(), true];
    setTheme("light");
    for (const panel of panels) draw(panel);
  });
  addEventListener("afterprint", () => {
    paper = false;
    setTheme(before);
  });
  if (matchMedia("(max-width: 70rem)").matches) document.getElementById("contents").open = false;
  repaint();
})();
