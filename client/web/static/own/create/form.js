// The form of a run file: groups of fields, sections that may be absent, and lists; made anew whenever the structure changes.

import { control, showDefault, valueOf } from "./control.js";
import { element } from "./element.js";

const OPEN = new Set(["student", "teachers", "data", "optimizer"]);
const GENERAL = "general";
const SUGGESTIONS = [
  [/^(data\.(train|eval)|evaluation\.sets)\[\d+\]\.path$/, "known-datasets"],
  [/^student\.model$/, "known-models"],
];

const title = (name) => name.replaceAll("_", " ").replace(/^./, (first) => first.toUpperCase());
const ITEMS = { train: "training dataset", eval: "evaluation dataset", sets: "evaluation set", notify: "webhook" };
const itemOf = (name) => ITEMS[name] ?? name.replaceAll("_", " ").replace(/s$/, "");
const snake = (path) => path.replace(/[A-Z]/g, (letter) => `_${letter.toLowerCase()}`);

export class Form {
  // `onChange(changes, isStructural)` is told paths and values.
  constructor(place, schema, onChange) {
    Object.assign(this, { place, schema, onChange, problems: [], effective: null, written: {} });
    place.addEventListener("submit", (event) => event.preventDefault());
    place.addEventListener("change", (event) => {
      const input = event.target.closest("[data-path]");
      if (input) onChange([{ path: input.dataset.path, value: valueOf(input) }], false);
    });
    place.addEventListener("click", (event) => {
      const button = event.target.closest("button[data-change]");
      if (button) onChange([{ path: button.dataset.change, value: button.dataset.add ? {} : null }], true, button.dataset.focus);
    });
  }

  // Shows the values of a run file; groups stay open, and the focus stays where it is.
  show(written, focusPath) {
    const open = new Map([...this.place.querySelectorAll("details")].map((each) => [each.dataset.group, each.open]));
    const active = document.activeElement;
    const focused = focusPath ?? active?.dataset?.path;
    const fields = this.schema.fields(this.schema.root);
    for (const name of Object.keys(written)) if (!(name in this.written)) open.delete(name); // a section that is new is open
    this.written = written;
    const isGeneral = ({ kind }) => kind !== "message" && kind !== "messages";
    this.place.replaceChildren(
      this.group(GENERAL, "", fields.filter(isGeneral).map((each) => this.part(each, "", written, 0)), open, true),
      ...fields.filter((each) => !isGeneral(each)).map((each) => this.group(each.name, each.description, this.section(each, written), open, each.name in written)),
    );
    this.showDefaults(this.effective);
    this.showProblems(this.problems);
    if (!focused) return;
    const target = [...this.place.querySelectorAll("[data-path], button[data-change]")].find((each) => each.dataset.path === focused || (focusPath && (each.dataset.path || each.dataset.change).startsWith(focused)));
    if (!focusPath && target && target.value !== active.value) target.value = active.value; // typed, and not yet left
    target?.focus({ preventScroll: !focusPath });
  }

  group(name, description, children, open, isWritten) {
    const isOpen = open.get(name) ?? (OPEN.has(name) || (isWritten && name !== GENERAL));
    return element(
      "details",
      { className: "panel group", open: isOpen, data: { group: name } },
      element("summary", {}, element("h3", {}, title(name)), element("span", { className: "error count" })),
      description ? element("p", { className: "muted" }, description) : null,
      ...children,
    );
  }

  section(field, written) {
    if (field.kind === "messages") return [this.list(field, field.name, written[field.name] ?? [], 0)];
    return this.schema.fields(field.message).map((each) => this.part(each, field.name, written[field.name] ?? {}, 1));
  }

  part(field, above, values, depth) {
    const path = above ? `${above}.${field.name}` : field.name;
    const value = values[field.name];
    if (field.kind === "messages") return this.list(field, path, value ?? [], depth);
    if (field.kind === "message") return this.optional(field, path, value, depth);
    return control(field, path, value, SUGGESTIONS.find(([pattern]) => pattern.test(path))?.[1]);
  }

  optional(field, path, value, depth) {
    const name = field.name.replaceAll("_", " ");
    const legend = element("legend", {}, title(field.name));
    const about = element("p", { className: "muted about" }, field.description);
    const problem = element("p", { className: "error", id: `problem-${path}` });
    const words = { words: `${path} ${field.description}`.toLowerCase() };
    if (value === undefined) {
      const add = element("button", { type: "button", data: { change: path, add: "yes", focus: `${path}` } }, `Add ${name}`);
      return element("fieldset", { className: "part absent", data: words }, legend, about, problem, add);
    }
    const remove = element("button", { type: "button", data: { change: path, focus: path } }, `Remove ${name}`);
    const fields = this.schema.fields(field.message).map((each) => this.part(each, path, value, depth + 1));
    return element("fieldset", { className: "part", data: words }, legend, about, problem, ...fields, remove);
  }

  list(field, path, values, depth) {
    const name = itemOf(field.name);
    const items = values.map((value, at) => {
      const here = `${path}[${at}]`;
      const fields = this.schema.fields(field.message).map((each) => this.part(each, here, value, depth + 1));
      const remove = element("button", { type: "button", data: { change: here, focus: path } }, `Remove ${name} ${at + 1}`);
      return element("fieldset", { className: "part" }, element("legend", {}, `${title(name)} ${at + 1}`), element("p", { className: "error", id: `problem-${here}` }), ...fields, remove);
    });
    const next = `${path}[${values.length}]`;
    const add = element("button", { type: "button", data: { change: next, add: "yes", focus: next } }, `Add ${values.length ? "another" : /^[aeiou]/.test(name) ? "an" : "a"} ${name}`);
    const about = depth ? element("p", { className: "muted about" }, `${title(field.name)}: ${field.description}`) : null;
    return element("div", { className: "list", data: { words: `${path} ${field.description}`.toLowerCase() } }, about, element("p", { className: "error", id: `problem-${path}` }), ...items, add);
  }

  // Shows what fields have that are left empty.
  showDefaults(effective) {
    this.effective = effective;
    for (const input of this.place.querySelectorAll("[data-path]")) showDefault(input, effective ? at(effective, input.dataset.path) : undefined);
  }

  // Shows problems at their fields, and their number at the groups; one without a field of the form is the group's.
  showProblems(problems) {
    this.problems = problems;
    for (const place of this.place.querySelectorAll(".error")) place.textContent = "";
    for (const input of this.place.querySelectorAll("[aria-invalid]")) input.removeAttribute("aria-invalid");
    const counts = new Map();
    for (const { field, description } of problems) {
      const path = snake(field);
      const [name] = path.split(/[.[]/);
      const group = this.place.querySelector(`[data-group="${CSS.escape(name)}"]`) ? name : GENERAL;
      counts.set(group, (counts.get(group) || 0) + 1);
      let here = path;
      while (here && !document.getElementById(`problem-${here}`)) here = here.replace(/(\.[^.[]*|\[\d+\]|^[^.[]*)$/, "");
      if (!here) continue;
      const place = document.getElementById(`problem-${here}`);
      place.textContent = `${place.textContent} ${here === path ? "" : `${path}: `}${description}`.trim();
      document.getElementById(`field-${here}`)?.setAttribute("aria-invalid", "true");
    }
    for (const [name, count] of counts) {
      const place = this.place.querySelector(`[data-group="${CSS.escape(name)}"] > summary .count`);
      if (place) place.textContent = ` ${count} ${count === 1 ? "problem" : "problems"}`;
    }
  }

  // Hides fields without the words of `text`; opens groups that have some.
  find(text) {
    const words = text.toLowerCase().split(/\s+/).filter(Boolean);
    for (const each of this.place.querySelectorAll(".field")) each.hidden = !words.every((word) => each.dataset.words.includes(word));
    for (const group of this.place.querySelectorAll("details")) {
      const any = [...group.querySelectorAll(".field, .part, .list")].some((each) => words.every((word) => (each.dataset.words || "").includes(word)));
      group.hidden = words.length > 0 && !any;
      if (words.length && any) group.open = true;
    }
  }
}

// The value at a path such as data.train[0].path; undefined if there is none.
function at(value, path) {
  return path.split(/[.[\]]+/).filter(Boolean).reduce((here, step) => here?.[step], value);
}
