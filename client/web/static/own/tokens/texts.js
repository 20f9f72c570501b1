// Texts of tokens as elements: coloured by a value, chosen by a click or from the keyboard.

export const LEVELS = [0.01, 0.05, 0.1, 0.25, 0.5, 1, 2];

const signs = { "\n": "⏎\n", "\t": "⇥\t", "\r": "␍" };
// Text of one token by itself, on one line, with the spaces at its ends to be seen.
export const named = (text) => {
  const whole = text.replace(/[\n\t\r]/g, (sign) => signs[sign][0]);
  return whole.replace(/^ +| +$/g, (spaces) => "␣".repeat(spaces.length)) || "·";
};
const visible = (text) => (text === "" ? "·" : text.replace(/[\n\t\r]/g, (sign) => signs[sign]));
const level = (value) => (value === null ? 0 : LEVELS.filter((bound) => value >= bound).length);
const minus = (value) => (value === undefined || value === null ? null : -value);

export const VALUES = {
  kl: { name: "KL", of: (target) => target.kl ?? null },
  student: { name: "-log q", of: (target) => minus(target.student_logprob) },
  teacher: { name: "-log p", of: (target) => minus(target.teacher_logprob) },
};

function element(tag, className, text) {
  const made = document.createElement(tag);
  made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

export class Texts {
  constructor(place, onSelect) {
    this.place = place;
    this.onSelect = onSelect;
    this.tokens = new Map(); // element to what it shows
    this.chosen = null; // row, place of the target and name of the evaluation, over drawings
    place.addEventListener("click", (event) => this.choose(event.target.closest(".piece")));
    place.addEventListener("keydown", (event) => this.key(event));
  }

  same(row, other) {
    return row.set === other.set && row.number === other.number && row.tokens.length === other.tokens.length && row.tokens.every((id, at) => id === other.tokens[at]);
  }

  // Draws the rows of the last of `evaluations`, each with those of the others above it.
  show(evaluations, measure) {
    const focused = this.tokens.get(document.activeElement);
    this.tokens.clear();
    this.place.replaceChildren();
    const last = evaluations[evaluations.length - 1];
    for (const row of last.examples.rows) {
      const section = element("section", "example");
      section.append(this.head(row));
      for (const each of evaluations) {
        const own = each.examples.rows.find((other) => this.same(other, row));
        if (own) section.append(...this.text(own, each, measure));
      }
      this.place.append(section);
    }
    this.restore(focused);
  }

  head(row) {
    const head = element("div", "example-head");
    if (row.title) {
      head.append(element("h3", "", row.title));
      return head;
    }
    head.append(element("h2", "", `${row.set ? `${row.set}, row` : "Held-out row"} ${row.number + 1}`));
    const cut = row.tokens.length < row.num_tokens ? ` · tokens ${(row.begin + 1).toLocaleString()} to ${(row.begin + row.tokens.length).toLocaleString()} of ${row.num_tokens.toLocaleString()}` : "";
    head.append(element("p", "muted", `${row.place}${cut}`));
    return head;
  }

  text(row, evaluation, measure) {
    const { name, of } = VALUES[measure];
    const values = row.targets.map(of);
    const known = values.filter((value) => value !== null);
    const mean = known.length ? ` · mean ${name} ${(known.reduce((sum, value) => sum + value, 0) / known.length).toFixed(3)}` : "";
    const label = element("p", "of-step", `${evaluation.name}${mean}`.replace(/^ · /, ""));
    const text = element("p", "text");
    text.setAttribute("role", "group");
    text.setAttribute("aria-label", row.title || `Tokens at ${evaluation.name}`);
    const byPlace = new Map(row.targets.map((target, at) => [target.at, at]));
    row.tokens.forEach((id, place) => {
      const shown = visible(row.texts[place]);
      const at = byPlace.get(place);
      if (at === undefined) {
        text.append(element("span", "plain", shown));
        return;
      }
      const value = values[at];
      const token = element("span", `piece level-${level(value)}`, shown);
      const told = value === null ? `no ${name}` : `${name} ${value.toFixed(4)} nats`;
      token.title = told;
      token.setAttribute("role", "button");
      token.setAttribute("aria-label", `${JSON.stringify(row.texts[place])}, ${told}`);
      token.tabIndex = text.querySelector(".piece") ? -1 : 0;
      this.tokens.set(token, { element: token, row, at, target: row.targets[at], examples: evaluation.examples, name: evaluation.name });
      text.append(token);
    });
    return [label, text];
  }

  // Puts choice and focus where they were before a drawing.
  restore(focused) {
    const find = (wanted) =>
      wanted && [...this.tokens.values()].filter((each) => this.same(each.row, wanted.row) && each.at === wanted.at).sort((one, other) => (other.name === wanted.name) - (one.name === wanted.name))[0];
    const chosen = find(this.chosen);
    if (chosen) this.choose(chosen.element, false);
    find(focused)?.element.focus({ preventScroll: true });
  }

  choose(token, focus = true) {
    const found = this.tokens.get(token);
    if (!found) return;
    this.place.querySelector(".piece.selected")?.classList.remove("selected");
    token.classList.add("selected");
    this.chosen = { row: found.row, at: found.at, name: found.name };
    this.rove(token);
    if (focus) {
      token.focus({ preventScroll: true });
      token.scrollIntoView({ block: "nearest" }); // not below the panel
    }
    this.onSelect(found);
  }

  rove(token) {
    for (const each of token.parentElement.querySelectorAll('.piece[tabindex="0"]')) each.tabIndex = -1;
    token.tabIndex = 0;
  }

  key(event) {
    const token = event.target.closest(".piece");
    if (!token || event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key === "Enter" || event.key === " ") {
      event.preventDefault();
      this.choose(token);
      return;
    }
    const all = [...token.parentElement.querySelectorAll(".piece")];
    const at = all.indexOf(token);
    const next = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: all.length - 1 }[event.key] ?? this.across(all, at, event.key);
    if (next === undefined || !all[next]) return;
    event.preventDefault();
    this.rove(all[next]);
    all[next].focus();
  }

  // The token nearest to one in the line above or below it; undefined for other keys and at the ends.
  across(all, at, key) {
    const way = { ArrowDown: 1, ArrowUp: -1 }[key];
    if (!way) return undefined;
    const here = all[at].getBoundingClientRect();
    const middle = here.left + here.width / 2;
    let best;
    let line = null;
    for (let next = at + way; all[next]; next += way) {
      const box = all[next].getClientRects()[0];
      if (Math.abs(box.top - here.top) < here.height / 2) continue;
      if (line === null) line = box.top;
      if (Math.abs(box.top - line) > here.height / 2) break;
      const distance = Math.abs(box.left + box.width / 2 - middle);
      if (!best || distance < best.distance) best = { next, distance };
    }
    return best?.next;
  }
}
