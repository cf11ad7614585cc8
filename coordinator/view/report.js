"use strict";
// Adds what needs a script: values under the pointer or the arrow keys, and buttons that copy a command.

function shown(value) {
  const size = Math.abs(value);
  if (size !== 0 && (size < 0.001 || size >= 1e6)) return value.toExponential(2);
  return value.toLocaleString("en-US", { maximumFractionDigits: size >= 100 ? 0 : size >= 10 ? 1 : 3 });
}

// Index of the nearest position, or with `before` of the last one that is not after `step`; -1 where there is none.
function indexAt(positions, step, before) {
  let low = 0;
  let high = positions.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (positions[middle] <= step) low = middle + 1;
    else high = middle;
  }
  if (before) return low - 1;
  if (low === 0) return positions.length ? 0 : -1;
  if (low === positions.length) return low - 1;
  return step - positions[low - 1] <= positions[low] - step ? low - 1 : low;
}

function make(tag, className, text) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  if (text !== undefined) element.textContent = text;
  return element;
}

function follow(chart) {
  const figure = document.getElementById(chart.key);
  const plot = figure.querySelector(".plot");
  const dense = (chart.curves.find((curve) => !curve.sparse && curve.x.length) || chart.curves[0]).x;
  const cursor = make("div", "cursor");
  const tip = make("div", "tip");
  cursor.append(tip);
  cursor.hidden = true;
  plot.append(cursor);
  let index = dense.length - 1;

  plot.tabIndex = 0;
  plot.setAttribute("role", "slider");
  plot.setAttribute("aria-description", plot.getAttribute("aria-label"));
  plot.setAttribute("aria-label", figure.querySelector("h3").textContent + ", by step");
  plot.setAttribute("aria-valuemin", dense[0]);
  plot.setAttribute("aria-valuemax", dense[dense.length - 1]);

  function show(to, visible) {
    index = Math.min(Math.max(to, 0), dense.length - 1);
    const step = dense[index];
    const rows = chart.curves.flatMap((curve) => {
      const at = indexAt(curve.x, step, curve.sparse);
      if (at < 0) return [];
      const where = curve.sparse ? " (step " + Math.round(curve.x[at]).toLocaleString("en-US") + ")" : "";
      return [[curve.label.split(",")[0] + where, shown(curve.y[at])]];
    });
    const title = "step " + Math.round(step).toLocaleString("en-US");
    plot.setAttribute("aria-valuenow", step);
    plot.setAttribute("aria-valuetext", title + ": " + rows.map((row) => row.join(" ")).join(", "));
    if (!visible) return;
    tip.replaceChildren(make("b", "", title));
    for (const [label, value] of rows) {
      const row = make("span");
      row.append(make("i", "", label), make("em", "", value));
      tip.append(row);
    }
    const part = step / chart.last;
    cursor.style.left = 100 * part + "%";
    tip.classList.toggle("left", part > 0.5);
    cursor.hidden = false;
  }

  function point(event) {
    const box = plot.getBoundingClientRect();
    show(indexAt(dense, ((event.clientX - box.left) / box.width) * chart.last, false), true);
  }

  plot.addEventListener("pointermove", point);
  plot.addEventListener("pointerdown", point);
  plot.addEventListener("pointerleave", () => { cursor.hidden = true; });
  plot.addEventListener("blur", () => { cursor.hidden = true; });
  plot.addEventListener("keydown", (event) => {
    const far = Math.max(Math.round(dense.length / 10), 1);
    const moves = { ArrowLeft: -1, ArrowDown: -1, ArrowRight: 1, ArrowUp: 1, PageDown: -far, PageUp: far };
    if (event.key === "Escape") cursor.hidden = true;
    else if (event.key === "Home") show(0, true);
    else if (event.key === "End") show(dense.length - 1, true);
    else if (event.key in moves) show(index + moves[event.key], true);
    else return;
    event.preventDefault();
  });
  show(index, false);
}

for (const chart of JSON.parse(document.getElementById("data").textContent)) {
  if (chart.curves.some((curve) => curve.x.length)) follow(chart);
}

for (const block of document.querySelectorAll(".command")) {
  if (!navigator.clipboard) break;
  const button = make("button", "", "Copy");
  button.type = "button";
  button.addEventListener("click", async () => {
    await navigator.clipboard.writeText(block.querySelector("code").textContent);
    button.textContent = "Copied";
    setTimeout(() => { button.textContent = "Copy"; }, 1500);
  });
  block.append(button);
}
