"use strict";
// Charts: one uPlot instance per panel. Panels over training steps share one cursor; colours are the page's CSS variables.

const page = JSON.parse(document.getElementById("data").textContent);

/** Makes an element. Text is never parsed as HTML. */
function element(tag, className, text) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

function colour(name) {
  return getComputedStyle(document.documentElement)
    .getPropertyValue("--" + name)
    .trim();
}

function withAlpha(hex, alpha) {
  return (
    hex +
    Math.round(alpha * 255)
      .toString(16)
      .padStart(2, "0")
  );
}

function significant(value) {
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size >= 1000) return value.toLocaleString("en", { maximumFractionDigits: 0 });
  return size < 0.001 ? value.toExponential(1) : String(Number(value.toPrecision(3)));
}

const FORMS = {
  number: significant,
  count: (v) => (Math.abs(v) >= 100000 ? significant(v / 1000) + "k" : significant(v)),
  share: (v) => significant(Number((100 * v).toPrecision(6))) + "%",
  seconds: (v) => significant(v) + " s",
  bytes: (v) => {
    const units = ["B", "kB", "MB", "GB", "TB"];
    const power = v > 0 ? Math.min(4, Math.floor(Math.log10(v) / 3)) : 0;
    return significant(v / 1000 ** power) + " " + units[power];
  },
};
const DASHES = [undefined, [6, 4], [2, 3]];
const HEIGHT = 190;
const known = (v) => v !== null && v !== undefined;

/** Heights of stacked areas, the last at the bottom. */
function stacked(series) {
  const heights = [];
  let below = null;
  for (const one of [...series].reverse()) {
    const base = below;
    below = one.y.map((v, i) => v + (base ? base[i] : 0));
    heights.unshift(below);
  }
  return heights;
}

/** The uPlot style of one series. */
function paintOf(one) {
  const stroke = colour(one.colour);
  const dash = DASHES[one.dash % DASHES.length];
  const dots = { show: one.paint.endsWith("dots"), size: one.paint === "dots" ? 5 : 6, fill: stroke };
  switch (one.paint) {
    case "area":
      return { fill: stroke, width: 0, points: { show: false } };
    case "bars":
      return {
        fill: withAlpha(stroke, 0.75),
        width: 0,
        points: { show: false },
        paths: uPlot.paths.bars({ size: [0.9, 60] }),
      };
    case "dots":
      return {
        stroke: withAlpha(stroke, 0.55),
        width: 0,
        paths: () => null,
        points: { ...dots, fill: withAlpha(stroke, 0.45) },
      };
    default:
      return { stroke, width: 2, dash, spanGaps: true, points: dots };
  }
}

/** The arrays and styles that uPlot gets for a panel, and its bands. */
function layers(panel) {
  const made = { data: [panel.x], series: [{}], bands: [] };
  const add = (y, style) => made.series.push(style) && made.data.push(y) - 1;
  const heights = panel.series.some((one) => one.paint === "area") ? stacked(panel.series) : null;
  panel.series.forEach((one, i) => {
    const stroke = colour(one.colour);
    const thin = { stroke: withAlpha(stroke, 0.28), width: 1, points: { show: false } };
    if (one.raw) add(one.raw, thin);
    if (one.low && one.high) {
      const none = { ...thin, stroke: "transparent", spanGaps: true };
      made.bands.push({ series: [add(one.high, none), add(one.low, none)], fill: withAlpha(stroke, 0.14) });
    }
    // The tallest stacked area comes first, because later ones are painted over it.
    add(heights ? heights[i] : one.y, paintOf(one));
  });
  return made;
}

/** Shows the values at one index, or the last value of each curve if it is null. */
function fillReadout(readout, panel, index) {
  const atEnd = panel.x_name === "step" ? "last" : "";
  const when = index === null ? atEnd : panel.x_name + " " + significant(panel.x[index]);
  readout.replaceChildren();
  if (when) readout.append(element("span", "", when));
  for (const one of panel.series) {
    const value = index !== null ? one.y[index] : atEnd ? one.y.findLast(known) : null;
    if (!known(value) && (index !== null || !one.label)) continue;
    const item = element("span");
    const shape = ["area", "bars", "dots"].includes(one.paint)
      ? " block"
      : " dash-" + (one.dash % DASHES.length);
    const mark = element("i", "mark" + shape);
    mark.style.color = colour(one.colour);
    item.append(mark);
    if (one.label) item.append(one.label + " ");
    if (known(value)) item.append(element("b", "", FORMS[panel.form](value)));
    const also =
      index === null ? [] : one.raw ? [one.raw[index]] : one.low ? [one.low[index], one.high[index]] : [];
    if (also.some(known))
      item.append(element("span", "logged", " (" + also.map(FORMS[panel.form]).join(" to ") + ")"));
    readout.append(item);
  }
}

function describe(panel) {
  const form = FORMS[panel.form];
  const parts = panel.series.map((one) => {
    const values = one.y.filter(known);
    return values.length ? one.label + " " + form(values[0]) + " to " + form(values[values.length - 1]) : "";
  });
  return panel.title + ": " + parts.filter(Boolean).join("; ");
}

function optionsOf(panel, width, made, readout) {
  const form = FORMS[panel.form];
  const overSteps = panel.x_name === "step";
  const bars = panel.series.some((one) => one.paint === "bars");
  const areas = panel.series.some((one) => one.paint === "area");
  const only = panel.x.length === 1 ? [panel.x[0] - 1, panel.x[0] + 1] : null;
  const margin = bars ? (panel.x[1] - panel.x[0]) / 2 : 0;
  const xRange = only ?? (bars ? [panel.x[0] - margin, panel.x[panel.x.length - 1] + margin] : undefined);
  // uPlot would draw a series of zeros on an axis up to 100.
  const flat = panel.series.every((one) => one.y.every((v) => !v));
  const yRange =
    areas || flat ? [0, 1] : bars ? (_, low, high) => [0, (high || 1) * 1.05] : undefined;
  const axis = {
    stroke: colour("soft"),
    font: "12px system-ui, sans-serif",
    grid: { stroke: colour("line"), width: 1 },
    ticks: { show: false },
  };
  const whole = {
    incrs: [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000],
  };
  return {
    width,
    height: HEIGHT,
    legend: { show: false },
    padding: [8, 8, 0, 0],
    cursor: {
      y: false,
      points: { size: 7 },
      drag: { x: true, y: false },
      ...(overSteps ? { sync: { key: "steps", setSeries: false } } : {}),
    },
    scales: { x: { time: false, ...(xRange ? { range: xRange } : {}) }, y: yRange ? { range: yRange } : {} },
    axes: [
      {
        ...axis,
        size: 28,
        space: 60,
        ...(overSteps || panel.x.every(Number.isInteger)
          ? whole
          : { values: (_, ticks) => ticks.map((v) => significant(Number(v.toPrecision(6)))) }),
      },
      {
        ...axis,
        size: 58,
        space: 38,
        values: (_, ticks) => ticks.map((v) => form(Number(v.toPrecision(6)))),
      },
    ],
    series: made.series,
    bands: made.bands,
    hooks: { setCursor: [(plot) => fillReadout(readout, panel, plot.cursor.idx ?? null)] },
  };
}

/** Draws one panel into `holder` and returns a function that removes it. */
function drawPanel(panel, holder) {
  const card = element("article", "panel");
  card.append(element("h3", "", panel.title));
  const about = [panel.note, panel.x_name === "step" ? "" : "Across: " + panel.x_name + "."]
    .filter(Boolean)
    .join(" ");
  if (about) card.append(element("p", "note", about));
  const readout = element("p", "readout");
  const plotHolder = element("div", "plot");
  plotHolder.setAttribute("role", "img");
  plotHolder.setAttribute("aria-label", describe(panel));
  card.append(readout, plotHolder);
  holder.append(card);
  fillReadout(readout, panel, null);
  const made = layers(panel);
  const room = () => Math.max(200, plotHolder.clientWidth);
  const plot = new uPlot(optionsOf(panel, room(), made, readout), made.data, plotHolder);
  const resize = new ResizeObserver(() => {
    if (room() !== plot.width) plot.setSize({ width: room(), height: HEIGHT });
  });
  resize.observe(card);
  return () => {
    resize.disconnect();
    plot.destroy();
    card.remove();
  };
}

/** Draws the charts of every open section, again whenever the colour scheme changes. */
function startCharts() {
  const takeAway = new Map();
  const draw = (section) => {
    const key = section.dataset.section;
    (takeAway.get(key) || []).forEach((undo) => undo());
    const holder = section.querySelector(".panels");
    takeAway.set(
      key,
      page.sections[key].panels.map((panel) => drawPanel(panel, holder)),
    );
  };
  const sections = [...document.querySelectorAll("section.curves")];
  const open = (section) => section.querySelector("details")?.open !== false;
  const redraw = () => sections.filter(open).forEach(draw);
  for (const section of sections) {
    section.querySelector("details")?.addEventListener("toggle", () => {
      if (open(section)) draw(section);
    });
  }
  redraw();
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
}

startCharts();
