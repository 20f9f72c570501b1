// The forecast of a run's memory on the trainer's host.

import { request } from "../api.js";
import { element } from "./element.js";

const UNITS = ["B", "KiB", "MiB", "GiB", "TiB"];

export function size(bytes) {
  let [value, unit] = [bytes, 0];
  while (value >= 1024 && unit < UNITS.length - 1) [value, unit] = [value / 1024, unit + 1];
  return `${unit ? value.toFixed(1) : value} ${UNITS[unit]}`;
}

// Shows the forecast for the run file `text` in `place`.
export async function showForecast(place, text) {
  let found;
  try {
    found = await request("POST", "/api/v1/run-files:estimate", { text });
  } catch (error) {
    place.replaceChildren(element("p", { className: "muted" }, `No forecast: ${error.message}`));
    return;
  }
  const { student, together, memory_bytes: limit } = found;
  const total = together.total_bytes;
  const meter = element("meter", { min: 0, max: limit, high: 0.9 * limit, value: Math.min(total, limit), aria: { label: "Share of the memory" } });
  const device = found.device === "gpu" ? "GPU" : "host";
  const verdict = found.fits ? `about ${size(total)} of the ${size(limit)} that the trainer's ${device} has` : `about ${size(total)}, and the trainer's ${device} has ${size(limit)}: it cannot fit`;
  const parts = Object.entries(student.parts_bytes).filter(([, bytes]) => bytes > 0);
  place.replaceChildren(
    element("p", { className: found.fits ? "" : "error" }, `${found.parameters.toLocaleString("en")} weights; ${verdict}.`),
    meter,
    element(
      "table",
      {},
      element("caption", { className: "hidden" }, "Memory of the student by purpose"),
      element("tbody", {}, ...parts.map(([name, bytes]) => element("tr", {}, element("th", { scope: "row" }, name), element("td", {}, size(bytes))))),
    ),
    ...(together.students > 1 ? [element("p", { className: "muted" }, `${together.students} training processes share it.`)] : []),
    ...(found.remedies.length ? [element("ul", {}, ...found.remedies.map((each) => element("li", {}, element("code", {}, each.set), ` would take ${size(each.student_bytes)}`)))] : []),
  );
}
