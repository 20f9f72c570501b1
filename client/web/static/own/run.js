// A run's page: history and live events as curves, and its head kept as the run is.

import { metrics, notice } from "./api.js";
import { Chart } from "./chart.js";
import { GROUPS } from "./groups.js";
import { Live } from "./live.js";
import { Series } from "./series.js";
import { View } from "./view.js";

const REDRAW_MS = 500;
const HEAD_MS = 1500;
const PROGRESS_MS = 5000;
const STREAM_MS = 1500; // the history is read without the stream of events if that has not begun by then
const article = document.getElementById("run");
const id = article.dataset.run;
const series = new Series();
let near = null;  // the series of a zoom, which have more of its steps

// Calls `act` at once or, if it has just been called, once the time is over.
function atMostEvery(ms, act) {
  let timer = null;
  let again = false;
  return function call() {
    if (timer !== null) {
      again = true;
      return;
    }
    act();
    timer = setTimeout(() => {
      timer = null;
      if (again) {
        again = false;
        call();
      }
    }, ms);
  };
}

const draw = atMostEvery(REDRAW_MS, () => {
  const marks = marksOf();
  let any = false;
  for (const { chart, takes } of charts) {
    const shown = near ?? series;
    const lines = shown.keys(takes).map((key) => ({ label: key, points: key.startsWith("eval/"), ...shown.columns.get(key) }));
    any ||= lines.length > 0;
    chart.show(lines, marks);
  }
  document.getElementById("no-metrics").hidden = any;
  document.getElementById("chart-controls").hidden = !any && !view.zoom;
});
const view = new View(draw, zoomed);
const charts = GROUPS.map(({ title, unit, takes }) => ({ takes, chart: new Chart(document.getElementById("charts"), title, unit, view) }));

function marksOf() {
  const attempts = [...document.querySelectorAll("[data-attempt]")]
    .filter((row) => Number(row.dataset.first) > 0)
    .map((row) => ({ step: Number(row.dataset.first), text: `attempt ${row.dataset.attempt}`, kind: "attempt" }));
  const waits = [...document.querySelectorAll('[data-kind="wait"]')]
    .filter((event) => Number(event.dataset.step) > 0)
    .map((event) => ({ step: Number(event.dataset.step), text: "", kind: "wait" }));
  const steps = new Set(series.keys((key) => key.startsWith("eval/")).flatMap((key) => series.columns.get(key).steps));
  return [...attempts.slice(1), ...waits, ...[...steps].map((step) => ({ step, text: "", kind: "evaluation" }))];
}

const refresh = () => htmx.ajax("GET", `/runs/${id}/head`, { target: "#head", swap: "innerHTML" });
const head = atMostEvery(HEAD_MS, refresh);
const progress = atMostEvery(PROGRESS_MS, refresh);

async function fill() {
  try {
    series.fill(await metrics(id));
    notice("", "metrics");
  } catch (error) {
    notice(error.message, "metrics");
  }
  draw();
}

// The steps of a zoom again, closer; until they are there, those of the whole history are drawn.
async function zoomed(zoom) {
  near = null;
  if (!zoom || !series.isThinned()) return;
  const closer = new Series();
  try {
    closer.fill(await metrics(id, zoom));
  } catch (error) {
    notice(error.message, "metrics");
    return;
  }
  if (view.zoom !== zoom) return;
  near = closer;
  draw();
}

if (article.dataset.ended === "no") {
  // The stream begins with the present; the history is read behind that, so that no point falls in between.
  let begins = true;
  setTimeout(() => begins && fill(), STREAM_MS);
  new Live(
    `/api/v1/runs/${id}/events`,
    "after_sequence",
    {
      run: () => {
        if (begins) fill();
        begins = false;
        head();
      },
      metrics: (data) => {
        const point = JSON.parse(data);
        series.add(point);
        near?.add(point);
        draw();
        progress();
      },
      end: head,
    },
    (text) => notice(text, "events"),
  );
} else fill();
document.body.addEventListener("htmx:afterSettle", draw);
