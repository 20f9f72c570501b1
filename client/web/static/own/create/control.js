// A field of the form: label, input, description, range and the problem that the service finds.

import { element } from "./element.js";
import { rangeText } from "./schema.js";

const plain = (value) => (value === undefined || value === null || value === "" ? "" : typeof value === "object" ? JSON.stringify(value) : String(value));

// Texts of a value in the inputs of its field.
function shown({ kind }, value) {
  if (kind === "list") return [value ?? []].flat().join("\n");
  if (kind === "map") return Object.entries(value ?? {}).map(([name, text]) => `${name}: ${text}`).join("\n");
  return plain(value);
}

// The value of an input as the server takes it: text, a list or a set of texts, or null.
export function valueOf(input) {
  const { kind } = input.dataset;
  const lines = input.value.split("\n").map((each) => each.trim()).filter(Boolean);
  if (kind === "list") return lines.length ? lines : null;
  if (kind === "map") return lines.length ? Object.fromEntries(lines.map(pair)) : null;
  return input.value === "" ? null : input.value;
}

function pair(line) {
  const at = line.indexOf(":");
  return at < 0 ? [line, ""] : [line.slice(0, at).trim(), line.slice(at + 1).trim()];
}

function inputOf(field, text, suggestions) {
  if (field.kind === "choice") {
    const choices = field.choices.includes(text) || !text ? field.choices : [...field.choices, text];
    return element("select", {}, element("option", { value: "" }), ...choices.map((each) => element("option", { value: each }, each)));
  }
  if (field.kind === "list" || field.kind === "map" || field.long || text.includes("\n")) {
    return element("textarea", { rows: Math.min(8, Math.max(2, text.split("\n").length)) });
  }
  const input = element("input", { type: "text", autocomplete: "off", autocapitalize: "none", spellcheck: false });
  if (field.kind === "number") input.inputMode = "decimal";
  if (suggestions) input.setAttribute("list", suggestions);
  return input;
}

export function control(field, path, value, suggestions) {
  const text = shown(field, value);
  const input = inputOf(field, text, suggestions);
  const about = [field.description, rangeText(field)].filter(Boolean).join(" ");
  Object.assign(input, { id: `field-${path}`, value: text });
  Object.assign(input.dataset, { path, kind: field.kind, default: plain(field.rules.default) });
  input.setAttribute("aria-describedby", `about-${path} problem-${path}`);
  if (field.required) input.setAttribute("aria-required", "true");
  showDefault(input, undefined);
  const label = element("label", { htmlFor: input.id }, field.name.replaceAll("_", " "), field.required ? element("span", { className: "muted" }, " required") : null);
  return element(
    "div",
    { className: "field", data: { words: `${path} ${about}`.toLowerCase() } },
    label,
    input,
    element("p", { className: "error", id: `problem-${path}` }),
    element("p", { className: "muted about", id: `about-${path}` }, about),
  );
}

// Shows the value that the field has if it is left empty: the effective one where it is known.
export function showDefault(input, effective) {
  const known = shown(input.dataset, effective) || input.dataset.default;
  const text = known.length > 200 ? `${known.slice(0, 200)}…` : known.replaceAll("\n", ", ");
  if (input.tagName === "SELECT") input.options[0].text = text ? `default: ${text}` : "not set";
  else input.placeholder = text;
}
