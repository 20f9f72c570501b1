// A run's page: history and live events as curves, and its head kept as the run is.

import { notice, request } from "./api.js";
import { Chart } from "./chart.js";
import { GROUPS } from "./groups.js";
import { Live } from "./live.js";
import { Series } from "./series.js";
import { View } from "./view.js";

const REDRAW_MS = 500;
const HEAD_MS = 1500;
const PROGRESS_MS = 5000;
const article = document.getElementById("run");
const id = article.dataset.run;
const series = new Series();

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
    const lines = series.keys(takes).map((key) => ({ label: key, points: key.startsWith("eval/"), ...series.columns.get(key) }));
    any ||= lines.length > 0;
    chart.show(lines, marks);
  }
  document.getElementById("no-metrics").hidden = any;
});
const view = new View(draw);
const charts = GROUPS.map(({ title, unit, takes }) => ({ takes, chart: new Chart(document.getElementById("charts"), title, unit, view) }));

function marksOf() {
  const attempts = [...document.querySelectorAll("[data-attempt]")]
    .filter((row) => Number(row.dataset.first) > 0)
    .map((row) => ({ step: Number(row.dataset.first), text: `attempt ${row.dataset.attempt}`, kind: "attempt" }));
  const steps = new Set(series.keys((key) => key.startsWith("eval/")).flatMap((key) => series.columns.get(key).steps));
  return [...attempts.slice(1), ...[...steps].map((step) => ({ step, text: "", kind: "evaluation" }))];
}

const refresh = () => htmx.ajax("GET", `/runs/${id}/head`, { target: "#head", swap: "innerHTML" });
const head = atMostEvery(HEAD_MS, refresh);
const progress = atMostEvery(PROGRESS_MS, refresh);

async function fill() {
  try {
    series.fill((await request("GET", `/api/v1/runs/${id}/metrics`)).series);
  } catch (error) {
    notice(error.message);
  }
  draw();
}

if (article.dataset.ended === "no") {
  new Live(
    `/api/v1/runs/${id}/events`,
    "after_sequence",
    {
      run: head,
      metrics: (data) => {
        series.add(JSON.parse(data));
        draw();
        progress();
      },
      end: head,
    },
    (text) => notice(text, "events"),
  );
}
fill();
document.body.addEventListener("htmx:afterSettle", draw);
