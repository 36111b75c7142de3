"use strict";
// The signal ledger: a canvas of cells, one per group, arranged by step or by prompt.

const CELL_STATES = ["mixed", "right", "wrong"];
const CELL_NAMES = { mixed: "mixed", right: "all right", wrong: "all wrong" };

function cellState([, , correct, size]) {
  return correct <= 0 ? "wrong" : correct >= size ? "right" : "mixed";
}

/** Places the cells: a column per step from the bottom up, or a row of visits per prompt. */
function layout(mode) {
  const cells = [];
  const lanes = page.ledger[mode];
  const deepest = Math.max(...lanes.map((lane) => lane.length));
  lanes.forEach((lane, i) =>
    lane.forEach((cell, j) =>
      cells.push(mode === "steps" ? { cell, x: i, y: deepest - 1 - j } : { cell, x: j, y: i }),
    ),
  );
  return mode === "steps"
    ? { cells, columns: lanes.length, rows: deepest }
    : { cells, columns: deepest, rows: lanes.length };
}

function cellSize(mode, columns, rows, room) {
  const width = Math.max(5, Math.min(mode === "steps" ? 16 : 22, Math.floor(room / columns)));
  const height = mode === "steps" ? Math.max(5, Math.min(14, Math.floor(320 / rows))) : 9;
  return [width, height];
}

/** Draws the cells and returns a function from column and row to the cell. */
function paintLedger(canvas, mode) {
  const room = document.getElementById("ledger-scroll").clientWidth;
  const { cells, columns, rows } = layout(mode);
  const [width, height] = cellSize(mode, columns, rows, room);
  const ratio = window.devicePixelRatio || 1;
  canvas.width = columns * width * ratio;
  canvas.height = rows * height * ratio;
  canvas.style.width = columns * width + "px";
  canvas.style.height = rows * height + "px";
  const pen = canvas.getContext("2d");
  pen.scale(ratio, ratio);
  const paint = Object.fromEntries(CELL_STATES.map((state) => [state, colour(state)]));
  const [ink, dot] = [colour("ink"), colour("dot")];
  for (const { cell, x, y } of cells) {
    const [left, top] = [x * width, y * height];
    pen.fillStyle = paint[cellState(cell)];
    pen.fillRect(left, top, width - 1, height - 1);
    if (cell[4] > 0) {
      pen.fillStyle = ink;
      pen.beginPath();
      pen.moveTo(left, top);
      pen.lineTo(left + Math.min(width, height) * 0.6, top);
      pen.lineTo(left, top + Math.min(width, height) * 0.6);
      pen.fill();
    }
    if (cell[5]) {
      pen.fillStyle = withAlpha(dot, 0.6);
      pen.beginPath();
      pen.arc(
        left + (width - 1) / 2,
        top + (height - 1) / 2,
        Math.max(1, Math.min(width, height) * 0.18),
        0,
        7,
      );
      pen.fill();
    }
  }
  const places = new Map(cells.map(({ cell, x, y }) => [x + "," + y, cell]));
  return (x, y) => places.get(x + "," + y);
}

function describeCell(cell) {
  const [step, index, correct, size, truncated, clip] = cell;
  const parts = [
    "step " + step.toLocaleString("en"),
    "prompt " + index.toLocaleString("en"),
    CELL_NAMES[cellState(cell)] + ", " + correct + " of " + size + " right",
  ];
  if (truncated) parts.push(truncated + " truncated");
  parts.push(clip ? "gave a clip" : "no clip");
  return parts.join(" · ");
}

function movesTable(moves) {
  const total = moves.flat().reduce((a, b) => a + b, 0);
  const holder = document.getElementById("ledger-moves");
  if (!total) return;
  holder.append(element("h3", "", "From one visit to the next"));
  holder.append(
    element(
      "p",
      "note",
      "The outcome of a prompt's group at its next visit, over " +
        total.toLocaleString("en") +
        " returns.",
    ),
  );
  const table = element("table");
  const head = table.createTHead().insertRow();
  ["was", ...CELL_STATES.map((state) => "then " + CELL_NAMES[state])].forEach((text) =>
    head.append(element("th", "", text)),
  );
  const body = table.createTBody();
  moves.forEach((row, i) => {
    const sum = row.reduce((a, b) => a + b, 0);
    const line = body.insertRow();
    line.append(element("th", "", CELL_NAMES[CELL_STATES[i]]));
    row.forEach((n, j) =>
      line.append(
        element(
          "td",
          i === j ? "strong" : "",
          n.toLocaleString("en") + (sum ? " (" + Math.round((100 * n) / sum) + "%)" : ""),
        ),
      ),
    );
  });
  const scroll = element("div", "scroll");
  scroll.append(table);
  holder.append(scroll);
}

function startLedger() {
  const canvas = document.getElementById("ledger-canvas");
  const readout = document.getElementById("ledger-readout");
  const modes = [
    ["steps", "By step"],
    ["prompts", "By prompt"],
  ].filter(([mode]) => page.ledger[mode].length);
  let mode = modes[0][0];
  let at = () => undefined;
  const buttons = modes.map(([name, text]) => {
    const button = element("button", "", text);
    button.addEventListener("click", () => {
      mode = name;
      paint();
    });
    return button;
  });
  const paint = () => {
    at = paintLedger(canvas, mode);
    buttons.forEach((button, i) => button.setAttribute("aria-pressed", String(modes[i][0] === mode)));
    readout.textContent =
      mode === "steps"
        ? "A column is a step. Point at a cell, or tap it."
        : "A row is a prompt with several visits, a column a visit; the easiest prompts are on top. Point at a cell, or tap it.";
  };
  if (modes.length > 1) document.getElementById("ledger-modes").append(...buttons);
  const key = document.getElementById("ledger-key");
  for (const [tile, text] of [
    ["right", "all right"],
    ["mixed", "mixed"],
    ["wrong", "all wrong"],
    ["clip", "gave a clip"],
    ["truncated", "had a truncated rollout"],
  ]) {
    const item = element("li");
    item.append(element("i", "tile " + tile), text);
    key.append(item);
  }
  canvas.addEventListener("pointermove", (event) => pointAt(event));
  canvas.addEventListener("pointerdown", (event) => pointAt(event));
  const pointAt = (event) => {
    const { columns, rows } = layout(mode);
    const box = canvas.getBoundingClientRect();
    const x = Math.floor(((event.clientX - box.left) / box.width) * columns);
    const y = Math.floor(((event.clientY - box.top) / box.height) * rows);
    const cell = at(x, y);
    if (cell) readout.textContent = describeCell(cell);
  };
  movesTable(page.ledger.moves);
  paint();
  let width = 0;
  new ResizeObserver(([entry]) => {
    if (Math.round(entry.contentRect.width) !== width) {
      width = Math.round(entry.contentRect.width);
      paint();
    }
  }).observe(document.getElementById("ledger-scroll"));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", paint);
}

if (page.ledger) startLedger();
