// The run file as text: line numbers beside it, lines with a problem marked, and the problems below.

import { element } from "./element.js";

export class Editor {
  constructor(onInput) {
    this.area = document.getElementById("yaml");
    this.lines = document.getElementById("lines");
    this.list = document.getElementById("problems");
    this.wrong = new Set();
    this.area.addEventListener("input", () => {
      this.number();
      onInput();
    });
    this.area.addEventListener("scroll", () => (this.lines.scrollTop = this.area.scrollTop));
    this.list.addEventListener("click", (event) => {
      const button = event.target.closest("button[data-line]");
      if (button) this.goTo(Number(button.dataset.line));
    });
    this.number();
  }

  get text() {
    return this.area.value;
  }

  set(text) {
    if (text === this.area.value) return;
    const { scrollTop } = this.area;
    this.area.value = text;
    this.area.scrollTop = scrollTop;
    this.number();
  }

  // Shows the problems of the text.
  show(problems) {
    this.wrong = new Set(problems.map((each) => each.line).filter(Boolean));
    this.area.setAttribute("aria-invalid", problems.length ? "true" : "false");
    this.list.replaceChildren(
      ...problems.map(({ line, field, description }) =>
        element(
          "li",
          {},
          line ? element("button", { type: "button", className: "link", data: { line } }, `Line ${line}`) : null,
          line ? ": " : null,
          field ? element("code", {}, field) : null,
          field ? " " : null,
          description,
        ),
      ),
    );
    this.number();
  }

  number() {
    const count = this.area.value.split("\n").length;
    this.lines.replaceChildren(
      ...Array.from({ length: count }, (_, at) => element("span", { className: this.wrong.has(at + 1) ? "wrong" : "" }, `${this.wrong.has(at + 1) ? "▸" : ""}${at + 1}\n`)),
    );
    this.lines.scrollTop = this.area.scrollTop;
  }

  goTo(line) {
    const before = this.area.value.split("\n").slice(0, line - 1);
    const start = before.reduce((sum, each) => sum + each.length + 1, 0);
    const end = this.area.value.indexOf("\n", start);
    this.area.focus();
    this.area.setSelectionRange(start, end < 0 ? this.area.value.length : end);
    const height = this.area.scrollHeight / this.area.value.split("\n").length;
    this.area.scrollTop = Math.max(0, (line - 4) * height);
  }
}
