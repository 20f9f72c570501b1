// The panel of one token: both models' likeliest tokens side by side, with their tails, and the token along training.

import { named } from "./texts.js";

const percent = (logprob) => {
  const share = 100 * Math.exp(logprob);
  return share >= 0.01 ? share.toPrecision(share >= 10 ? 4 : 3) : share > 0 ? share.toExponential(1) : "0";
};
const nats = (value) => (value === undefined || value === null ? "unknown" : `${value.toFixed(4)} nats`);

function make(tag, text, className = "") {
  const made = document.createElement(tag);
  if (text !== undefined) made.textContent = text;
  if (className) made.className = className;
  return made;
}

function share(logprob) {
  const cell = make("td", logprob === null || logprob === undefined ? "0" : percent(logprob), "share own");
  const bar = make("span", undefined, "share-bar");
  bar.style.width = `${100 * Math.exp(logprob ?? -Infinity)}%`;
  cell.append(bar);
  return cell;
}

const sides = { 1: { other: 2, name: "Teacher", short: "student" }, 2: { other: 1, name: "Student", short: "teacher" } };

// The likeliest tokens of one side: 1 the teacher, 2 the student.
function table(side, token, alone = false) {
  const { other, name, short } = sides[side];
  const { target, examples } = token;
  const block = make("div");
  block.append(make("h3", `${name}'s likeliest`));
  const rows = target.top.filter((each) => each[side] !== null).sort((one, two) => two[side] - one[side]);
  if (side === 1 && !rows.length) {
    block.append(make("p", "No distribution of a teacher is known here.", "muted"));
    return block;
  }
  const text = token.row.tokens[target.at];
  const made = make("table");
  const head = make("tr");
  for (const [title, kind] of [["Token", ""], [`${name.toLowerCase()} %`, "own"], ...(alone ? [] : [[`${short} %`, "other"]])]) {
    const cell = make("th", title, kind);
    cell.scope = "col";
    head.append(cell);
  }
  const top = make("thead");
  top.append(head);
  const body = make("tbody");
  for (const each of rows.slice(0, examples.top_k)) {
    const line = make("tr", undefined, each[0] === text ? "of-text" : "");
    const first = make("th");
    first.scope = "row";
    first.append(make("code", named(examples.texts[String(each[0])] ?? `<${each[0]}>`)));
    first.title = `id ${each[0]}`;
    line.append(first, share(each[side]));
    if (!alone) line.append(make("td", each[other] === null ? "in tail" : percent(each[other]), "share other"));
    body.append(line);
  }
  const rest = make("tr", undefined, "rest");
  const first = make("th", "all others");
  first.scope = "row";
  rest.append(first, share(side === 1 ? target.teacher_tail : target.student_tail));
  if (!alone) rest.append(make("td", "", "other"));
  body.append(rest);
  made.append(top, body);
  block.append(made);
  return block;
}

const chance = (logprob) => (logprob === null || logprob === undefined ? "unknown" : `${percent(logprob)} % · ${nats(-logprob)}`);

function heading(token, rest) {
  const made = make("h2");
  made.append(make("code", named(token.row.texts[token.target.at])), rest);
  return made;
}

const place = ({ row, target }) => make("p", `position ${(row.begin + target.at).toLocaleString()}, id ${row.tokens[target.at]}`, "muted");

function list(facts) {
  const made = make("dl", undefined, "facts");
  for (const [term, value] of facts) made.append(make("dt", term), make("dd", value));
  return made;
}

// Tells readers of the screen the likeliest token of each side in one sentence.
function say(token, names) {
  const likeliest = (side) => token.target.top.filter((each) => each[side] !== null).sort((one, two) => two[side] - one[side])[0];
  const parts = names.map(([side, name]) => {
    const best = likeliest(side);
    return best ? `${name}: ${JSON.stringify(token.examples.texts[String(best[0])] ?? String(best[0]))}, ${percent(best[side])} %` : "";
  });
  document.getElementById("said").textContent = `Likeliest by ${parts.filter(Boolean).join("; by ")}.`;
}

// Shows a token of `Texts` with both sides; `along` has the same token at other evaluations, by their names.
export function showPair(panel, token, along) {
  const { target } = token;
  const facts = [["KL", nats(target.kl)], ["Teacher, text's token", chance(target.teacher_logprob)], ["Student, text's token", chance(target.student_logprob)]];
  const pair = make("div", undefined, "pair");
  pair.append(table(1, token), table(2, token));
  panel.replaceChildren(heading(token, ` at ${token.name}`), place(token), list(facts), pair);
  say(token, [[1, "teacher"], [2, "student"]]);
  for (const each of along.filter((other) => other.target && other.name !== token.name)) panel.append(make("p", `KL at ${each.name}: ${nats(each.target.kl)}`, "muted"));
}

// Shows a token of `Texts` with the teacher's side alone.
export function showTeacher(panel, token) {
  const alone = make("div", undefined, "pair alone");
  alone.append(table(1, token, true));
  panel.replaceChildren(heading(token, ""), place(token), list([["Chosen token", chance(token.target.teacher_logprob)]]), alone);
  say(token, [[1, "teacher"]]);
}
