// Curves of several runs in the same charts.

import { metrics, notice } from "./api.js";
import { Chart } from "./chart.js";
import { View } from "./view.js";
import { finite } from "./series.js";

const FIRST = ["eval/kl", "eval/agreement", "eval/cross_entropy", "train/loss"];
const LATER = ["train/learning_rate", "train/tokens_per_second", "train/teacher_wait_s"];
const COUNTS = ["eval/tokens", "eval/rows"];
const SHOWN = /^(eval\/|train\/(cross_entropy|forward_kl|reverse_kl|jsd|tvd|skew_kl|skew_reverse_kl|alpha_beta|adaptive_kl|mse)$)/;
const runs = [...document.querySelectorAll("#compared li")].map((each) => ({ id: each.dataset.run, title: each.dataset.title }));
const titles = new Set(runs.map((each) => each.title));
const label = (run) => (titles.size === runs.length ? run.title : `${run.title} (${run.id.slice(0, 4)})`);
const charts = new Map();
const view = new View(() => charts.forEach((chart) => chart.draw()), zoomed);

function show(found) {
  const keys = new Set(found.flatMap((each) => each.map((one) => one.key)));
  const between = [...keys].filter((key) => SHOWN.test(key) && !FIRST.includes(key) && !COUNTS.includes(key)).sort();
  const shown = [...FIRST, ...between, ...LATER].filter((key) => keys.has(key));
  for (const key of shown) {
    const lines = runs.flatMap((run, at) => {
      const one = found[at].find((each) => each.key === key);
      return one ? [{ label: label(run), points: key.startsWith("eval/"), steps: one.steps, values: one.values.map(finite) }] : [];
    });
    if (!charts.has(key)) charts.set(key, new Chart(document.getElementById("charts"), key, "", view));
    charts.get(key).show(lines, []);
  }
  return shown.length > 0;
}

// All steps, or those of a zoom, closer.
async function load(zoom) {
  const found = await Promise.all(runs.map((run) => metrics(run.id, zoom)));
  if (view.zoom === zoom) document.getElementById("no-metrics").hidden = show(found) || charts.size > 0;
}

function zoomed(zoom) {
  load(zoom).catch((error) => notice(error.message));
}

zoomed(null);
