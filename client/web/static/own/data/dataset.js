// The page of a dataset: format, fields, lengths, refused rows, and rows as they are trained on.

import { element } from "../create/element.js";
import { Rows } from "./rows.js";

const SAMPLE = 1000;
const PERCENTILES = [[0, "shortest"], [5, "5 %"], [25, "25 %"], [50, "median"], [75, "75 %"], [95, "95 %"], [99, "99 %"], [100, "longest"]];
const get = (id) => document.getElementById(id);
const number = (value) => value.toLocaleString("en");
const form = get("inspect");
const rows = new Rows(get("rows"));

// Fields and the columns that hold them, as "prompt=question, completion=answer".
function columns() {
  const pairs = get("columns").value.split(",").map((each) => each.split("=").map((part) => part.trim()));
  return Object.fromEntries(pairs.filter(([field, name]) => field && name));
}

// Reads the dataset; encodes rows, which takes a tokenizer, if the form asks for it.
async function inspect(encodes) {
  const model = encodes ? get("model").value.trim() : "";
  const count = Number(get("num-rows").value) || 1;
  const asked = { dataset: { path: form.dataset.path, format: get("format").value, columns: columns() }, first_row: Number(get("first-row").value) || 0, num_rows: count, sample_rows: model ? SAMPLE : 0 };
  if (model) asked.spec = { student: { model }, data: { chat: get("chat").checked, ...(get("longest").value ? { max_sequence_tokens: Number(get("longest").value) } : {}) } };
  get("look").disabled = true;
  const answer = await rows.load(asked);
  get("look").disabled = false;
  if (answer) get("found").replaceChildren(...facts(answer));
}

function facts(answer) {
  const form_ = answer.format ? `, rows of ${answer.format}` : "";
  const more = answer.complete ? "" : ", and more that were not read";
  const refused = answer.num_refused ? `; ${number(answer.num_refused)} refused` : "; none refused";
  return [
    element("p", {}, `${answer.container}${form_}: ${number(answer.num_rows)} rows that can be trained on${more}${refused}.`),
    ...refusals(answer),
    ...(answer.encoding ? lengths(answer.encoding) : []),
    table("Fields", ["Field", "Rows", "Kind", "First value"], answer.fields.map((each) => [each.name, number(each.num_rows), each.kinds.join(", "), each.example])),
  ];
}

function refusals({ refusals: found, num_refused: count }) {
  if (!count) return [];
  const rest = count > found.length ? [element("p", { className: "muted" }, `and ${number(count - found.length)} more`)] : [];
  return [table("Refused rows", ["Line", "Field", "Reason"], found.map((each) => [number(each.number), each.field, each.problem])), ...rest];
}

function lengths({ rows: all, max_sequence_tokens: limit, notes }) {
  const taken = all.filter((each) => !each.problem);
  const wrong = all.filter((each) => each.problem);
  const sorted = taken.map((each) => each.num_tokens).sort((a, b) => a - b);
  const total = sorted.reduce((sum, each) => sum + each, 0);
  const targets = taken.reduce((sum, each) => sum + each.num_targets, 0);
  const long = taken.filter((each) => each.num_tokens > limit).length;
  const empty = taken.filter((each) => !each.num_targets).length;
  const at = (percent) => sorted[Math.max(0, Math.ceil((percent / 100) * sorted.length) - 1)];
  const parts = [];
  if (sorted.length) {
    parts.push(table(`Lengths in tokens, of ${number(taken.length)} rows`, PERCENTILES.map(([, name]) => name), [PERCENTILES.map(([percent]) => number(at(percent)))]));
    parts.push(element("p", {}, `${number(targets)} of ${number(total)} tokens count in the loss (${((100 * targets) / Math.max(1, total)).toFixed(1)} %).`));
  }
  if (long) parts.push(element("p", {}, `${number(long)} rows are longer than ${number(limit)} tokens, at which they are cut.`));
  if (empty) parts.push(element("p", {}, `${number(empty)} rows have no token to learn, so they are left out.`));
  for (const [name, count] of Object.entries(notes)) parts.push(element("p", { className: "muted" }, `${name.replaceAll("_", " ")}: ${number(count)}`));
  if (wrong.length) parts.push(table("Rows that this model's tokenizer or template refuses", ["Line", "Field", "Reason"], wrong.slice(0, 20).map((each) => [number(each.number), each.field, each.problem])));
  return parts;
}

function table(caption, names, cells) {
  return element(
    "div",
    { className: "scroll", tabIndex: 0, aria: { role: "region", label: caption } },
    element(
      "table",
      {},
      element("caption", {}, caption),
      element("thead", {}, element("tr", {}, ...names.map((each) => element("th", { scope: "col" }, each)))),
      element("tbody", {}, ...cells.map((line) => element("tr", {}, ...line.map((each) => element("td", { className: "value" }, each))))),
    ),
  );
}

form.addEventListener("submit", (event) => {
  event.preventDefault();
  inspect(true);
});
inspect(false);
