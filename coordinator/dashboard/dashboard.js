"use strict";
// Fills the page with what the server tells of the run, and draws its charts with Chart.js.

const feed = document.body.dataset.feed;
const figures = new Map();
let snapshot = null;
let connected = false;
let serverTime = null; // the server's clock when it was last told, and ours then

function css(name) {
  return getComputedStyle(document.documentElement).getPropertyValue("--" + name).trim();
}

function shown(value) {
  const size = Math.abs(value);
  if (size !== 0 && (size < 0.001 || size >= 1e6)) return value.toExponential(2);
  return value.toLocaleString("en-US", { maximumFractionDigits: size >= 100 ? 0 : size >= 10 ? 1 : 3 });
}

const COLORS = ["main", "second", "third", "fourth", "fifth", "sixth"];
const LINES = ["main", "second", "fifth", "fourth", "sixth", "third"];

function faded(color, part) {
  return color + Math.round(255 * part).toString(16).padStart(2, "0");
}

// How a curve looks, as in report.css.
function look(curve, index) {
  const [kind, number] = curve.look.split("-");
  const name = kind === "area" ? COLORS[number - 1] : kind === "line" ? LINES[number - 1] : kind === "second" ? "second" : "main";
  const color = css(name);
  const dots = kind === "second" || curve.x.length === 1;
  return {
    label: curve.label,
    data: curve.x.map((x, at) => ({ x, y: curve.y[at] })),
    borderColor: kind === "raw" ? faded(color, 0.3) : color,
    borderWidth: kind === "area" ? 0 : kind === "raw" ? 1 : kind === "second" ? 1.5 : 2,
    backgroundColor: kind === "area" ? faded(color, 0.55) : color,
    fill: kind === "area" ? (index === 0 ? "origin" : "-1") : false,
    pointRadius: dots ? 3.5 : 0,
    pointHoverRadius: kind === "raw" ? 0 : 4,
    pointHitRadius: 0,
    stack: kind === "area" ? "areas" : "line" + index,
  };
}

// Dashed lines where warnings were.
const markLines = {
  id: "markLines",
  afterDatasetsDraw(chart, _, options) {
    const { ctx, chartArea, scales } = chart;
    ctx.save();
    ctx.strokeStyle = css("warn");
    ctx.setLineDash([3, 4]);
    for (const mark of options.marks || []) {
      const x = scales.x.getPixelForValue(mark.x);
      ctx.beginPath();
      ctx.moveTo(x, chartArea.top);
      ctx.lineTo(x, chartArea.bottom);
      ctx.stroke();
    }
    ctx.restore();
  },
};

function options(spec) {
  const soft = css("soft");
  const grid = css("grid");
  const ticks = { color: soft, maxRotation: 0, autoSkipPadding: 12 };
  return {
    animation: false,
    maintainAspectRatio: false,
    normalized: true,
    events: [], // the pointer and the keys are followed below, in one way
    scales: {
      x: { type: "linear", min: 0, max: Math.max(spec.last, 1), grid: { display: false }, border: { color: grid }, ticks: { ...ticks, precision: 0 } },
      y: {
        type: spec.log ? "logarithmic" : "linear",
        min: spec.low,
        max: spec.high,
        stacked: spec.curves.some((curve) => curve.look.startsWith("area")),
        grid: { color: grid },
        border: { display: false },
        afterBuildTicks: (axis) => { axis.ticks = spec.ticks.map((value) => ({ value })); },
        ticks: { ...ticks, autoSkip: false, callback: (_, index) => spec.tick_labels[index] },
      },
    },
    plugins: {
      legend: { display: false },
      markLines: { marks: spec.marks },
      tooltip: {
        backgroundColor: css("ink"),
        titleColor: css("page"),
        bodyColor: css("page"),
        footerColor: css("page"),
        footerFont: { weight: "normal" },
        callbacks: {
          title: (items) => (items.length ? stepText(items[0].parsed.x) : ""),
          label: (item) => label(spec.curves[item.datasetIndex], item.dataIndex),
          labelColor: (item) => ({ borderColor: item.dataset.borderColor, backgroundColor: item.dataset.borderColor }),
          footer: (items) => {
            if (!items.length) return "";
            const near = spec.last / 60;
            return spec.marks.filter((mark) => Math.abs(mark.x - items[0].parsed.x) <= near).map((mark) => wrapped(mark.text));
          },
        },
      },
    },
  };
}

function wrapped(text) {
  const line = text.length > 160 ? text.slice(0, 159) + "…" : text;
  return line.replace(/(.{1,44})(\s+|$)/g, "$1\n").trim();
}

// Index of the point nearest to a step, or with `before` of the last one that is not after it; -1 where there is none.
function indexAt(points, step, before) {
  let best = -1;
  points.forEach((point, at) => {
    if (before ? point.x <= step : best < 0 || Math.abs(point.x - step) < Math.abs(points[best].x - step)) best = at;
  });
  return best;
}

// Values under the pointer, and by the arrow keys step by step, as in report.html.
function readable(entry) {
  const { plot, chart, figure } = entry;
  const dense = () => chart.data.datasets[entry.spec.curves.findIndex((curve) => curve.look !== "raw" && !curve.sparse)]?.data || chart.data.datasets[0].data;
  entry.at = Infinity;
  plot.tabIndex = 0;
  plot.setAttribute("role", "slider");
  plot.setAttribute("aria-label", figure.querySelector("h3").textContent + ", by step");

  entry.read = (visible) => {
    const points = dense();
    if (!points.length) return;
    const step = points[Math.min(Math.max(entry.at, 0), points.length - 1)].x;
    const told = entry.spec.curves.flatMap((curve, datasetIndex) => {
      const index = curve.look === "raw" ? -1 : indexAt(chart.data.datasets[datasetIndex].data, step, curve.sparse);
      return index < 0 ? [] : [{ datasetIndex, index }];
    });
    const texts = told.map(({ datasetIndex, index }) => label(entry.spec.curves[datasetIndex], index));
    plot.setAttribute("aria-valuemin", points[0].x);
    plot.setAttribute("aria-valuemax", points[points.length - 1].x);
    plot.setAttribute("aria-valuenow", step);
    plot.setAttribute("aria-valuetext", stepText(step) + ": " + texts.join(", "));
    if (!visible) return;
    chart.setActiveElements(told);
    chart.tooltip.setActiveElements(told, { x: chart.scales.x.getPixelForValue(step), y: chart.chartArea.top });
    chart.update("none");
  };
  const hide = () => {
    entry.at = Infinity;
    chart.setActiveElements([]);
    chart.tooltip.setActiveElements([], { x: 0, y: 0 });
    chart.update("none");
  };
  const point = (event) => {
    const step = chart.scales.x.getValueForPixel(event.clientX - plot.getBoundingClientRect().left);
    entry.at = indexAt(dense(), step, false);
    entry.read(true);
  };
  plot.addEventListener("pointermove", point);
  plot.addEventListener("pointerdown", point);
  plot.addEventListener("pointerleave", hide);
  plot.addEventListener("blur", hide);
  plot.addEventListener("keydown", (event) => {
    const count = dense().length;
    const from = entry.at === Infinity ? count - 1 : entry.at;
    const far = Math.max(Math.round(count / 10), 1);
    const moves = { ArrowLeft: -1, ArrowDown: -1, ArrowRight: 1, ArrowUp: 1, PageDown: -far, PageUp: far, Home: -count, End: count };
    if (event.key === "Escape") hide();
    else if (event.key in moves) {
      entry.at = Math.min(Math.max(from + moves[event.key], 0), count - 1);
      entry.read(true);
    } else return;
    event.preventDefault();
  });
}

function stepText(step) {
  return "step " + Math.round(step).toLocaleString("en-US");
}

// A curve's name and its value at one of its points; of a sparse curve also where that is.
function label(curve, index) {
  const where = curve.sparse ? " (" + stepText(curve.x[index]) + ")" : "";
  return curve.label.split(",")[0] + where + " " + shown(curve.y[index]);
}

function drawCharts(specs) {
  const place = document.getElementById("charts");
  place.hidden = !specs.length;
  for (const [key, entry] of figures) {
    if (specs.some((spec) => spec.key === key)) continue;
    entry.chart.destroy();
    entry.figure.remove();
    figures.delete(key);
  }
  let before = place.querySelector("h2");
  for (const spec of specs) {
    const entry = figures.get(spec.key) || begin(spec);
    if (before.nextElementSibling !== entry.figure) before.after(entry.figure);
    before = entry.figure;
    draw(entry, spec);
  }
}

function begin(spec) {
  const figure = parsed(spec.html).firstElementChild;
  document.getElementById("charts").append(figure);
  const plot = figure.querySelector(".plot");
  const chart = new Chart(plot.querySelector("canvas"), { type: "line", data: { datasets: [] }, options: options(spec), plugins: [markLines] });
  const entry = { figure, plot, chart, spec };
  readable(entry);
  figures.set(spec.key, entry);
  return entry;
}

function draw(entry, spec) {
  const { figure, plot, chart } = entry;
  entry.spec = spec;
  const fresh = parsed(spec.html).firstElementChild;
  figure.querySelector("figcaption").replaceChildren(...fresh.querySelector("figcaption").childNodes);
  const table = figure.querySelector("details .scroll");
  const newTable = fresh.querySelector("details .scroll");
  if (table.innerHTML !== newTable.innerHTML) table.replaceChildren(...newTable.childNodes);
  plot.setAttribute("aria-description", fresh.querySelector(".plot").getAttribute("aria-label"));
  chart.data.datasets = spec.curves.map(look);
  chart.options = options(spec);
  chart.update("none");
  entry.read(entry.at !== Infinity);
}

function parsed(html) {
  const template = document.createElement("template");
  template.innerHTML = html;
  return template.content;
}

// Put a part's new text in place; what a person has opened, scrolled or focused stays so.
function fill(place, html) {
  if (place.dataset.html === html) return;
  const open = [...place.querySelectorAll("details")].map((item) => item.open);
  const scrolled = [...place.querySelectorAll(".scroll")].map((item) => [item.scrollTop, item.scrollLeft]);
  const focused = [...place.querySelectorAll(".scroll, a, summary")].indexOf(document.activeElement);
  place.dataset.html = html;
  place.replaceChildren(parsed(html));
  place.querySelectorAll("details").forEach((item, at) => { item.open = open[at] || false; });
  place.querySelectorAll(".scroll").forEach((item, at) => { [item.scrollTop, item.scrollLeft] = scrolled[at] || [0, 0]; });
  if (focused >= 0) place.querySelectorAll(".scroll, a, summary")[focused]?.focus({ preventScroll: true });
}

function ago(seconds) {
  if (seconds < 100) return Math.max(Math.round(seconds), 0) + " s";
  return seconds < 6000 ? Math.round(seconds / 60) + " min" : Math.round(seconds / 3600) + " h";
}

function say(text) {
  const live = document.getElementById("live");
  if (live.textContent !== text) live.textContent = text;
}

// Runs are dated by the server's clock, from which this machine's may differ by hours.
function setClock(told) {
  serverTime = { now: told.now, at: performance.now() };
}

// Whether the run still speaks, and whether the server does.
function tick() {
  document.body.dataset.connected = connected;
  // The browser tries no more: it was refused, as by a server that was started anew with another token.
  const closed = source.readyState === EventSource.CLOSED;
  if (closed) say("the server no longer answers this page: open the address that the command printed");
  if (!snapshot) return;
  const silence = serverTime.now + (performance.now() - serverTime.at) / 1000 - snapshot.heard;
  const silent = snapshot.status === "running" && silence > snapshot.patience;
  const pill = document.getElementById("status");
  pill.textContent = silent ? "silent" : snapshot.word;
  pill.className = "pill " + (silent ? "interrupted" : snapshot.status);
  pill.hidden = false;
  if (closed) return;
  const ended = snapshot.status && snapshot.status !== "running";
  // The server beside a training ends with it: what is shown then is how the run ended, and not old.
  if (ended) say("the run has ended");
  else if (!connected) say("no connection to the server: what is shown may be old; trying again");
  else if (silent) say("no word from the run for " + ago(silence) + ": it may have been killed");
  else say(snapshot.status ? "live" : "nothing has been written yet");
}

function show(found) {
  snapshot = found;
  setClock(found);
  document.getElementById("title").textContent = found.title;
  document.title = (found.status === "running" && found.total ? found.step + "/" + found.total + " · " : "") + found.title + " · mlx-tandem";
  const progress = document.getElementById("progress");
  progress.hidden = !(found.status === "running" && found.total);
  progress.max = Math.max(found.total, 1);
  progress.value = found.step;
  progress.setAttribute("aria-label", "step " + found.step + " of " + found.total);
  for (const place of document.querySelectorAll("[data-part]")) fill(place, found.parts[place.dataset.part] || "");
  drawCharts(found.charts);
  tick();
  document.body.dataset.step = found.step;
}

Chart.defaults.font.family = getComputedStyle(document.body).fontFamily;
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
  if (snapshot) drawCharts(snapshot.charts);
});
const source = new EventSource("/stream/" + feed);
source.onmessage = (event) => {
  connected = true;
  show(JSON.parse(event.data));
};
source.addEventListener("clock", (event) => {
  setClock(JSON.parse(event.data));
  tick();
});
source.onopen = () => { connected = true; tick(); };
source.onerror = () => { connected = false; tick(); };
setInterval(tick, 1000);
