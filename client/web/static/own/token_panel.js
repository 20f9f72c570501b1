// The panel of one token: both models' likeliest tokens side by side, with their tails, and the token along training.

const percent = (logprob) => {
  const share = 100 * Math.exp(logprob);
  return share >= 0.01 ? `${share.toPrecision(share >= 10 ? 4 : 3)} %` : share > 0 ? `${share.toExponential(1)} %` : "0 %";
};
const nats = (value) => (value === undefined || value === null ? "unknown" : `${value.toFixed(4)} nats`);

function make(tag, text, className = "") {
  const made = document.createElement(tag);
  if (text !== undefined) made.textContent = text;
  if (className) made.className = className;
  return made;
}

function share(logprob) {
  const cell = make("td", logprob === null || logprob === undefined ? "0 %" : percent(logprob), "share own");
  const bar = make("span", undefined, "bar");
  bar.style.width = `${100 * Math.exp(logprob ?? -Infinity)}%`;
  cell.append(bar);
  return cell;
}

const sides = { 1: { other: 2, name: "Teacher", short: "student" }, 2: { other: 1, name: "Student", short: "teacher" } };

// The likeliest tokens of one side: 1 the teacher, 2 the student.
function table(side, token) {
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
  for (const [title, kind] of [["Token", ""], [name.toLowerCase(), "own"], [short, "other"]]) {
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
    first.append(make("code", JSON.stringify(examples.texts[String(each[0])] ?? `<${each[0]}>`).slice(1, -1)));
    first.title = `id ${each[0]}`;
    line.append(first, share(each[side]), make("td", each[other] === null ? "in the tail" : percent(each[other]), "share other"));
    body.append(line);
  }
  const rest = make("tr", undefined, "rest");
  const first = make("th", "all others");
  first.scope = "row";
  rest.append(first, share(side === 1 ? target.teacher_tail : target.student_tail), make("td", "", "other"));
  body.append(rest);
  made.append(top, body);
  block.append(made);
  return block;
}

// Shows a token of `Texts`; `along` has the same token at other evaluations, by their names.
export function showPanel(panel, token, along) {
  const { row, target } = token;
  const text = row.texts[target.at];
  const facts = make("dl", undefined, "facts");
  const tell = (term, value) => facts.append(make("dt", term), make("dd", value));
  tell("KL", nats(target.kl));
  tell("Teacher, text's token", target.teacher_logprob === null ? "unknown" : `${percent(target.teacher_logprob)} · ${nats(-target.teacher_logprob)}`);
  tell("Student, text's token", target.student_logprob === null ? "unknown" : `${percent(target.student_logprob)} · ${nats(-target.student_logprob)}`);
  const pair = make("div", undefined, "pair");
  pair.append(table(1, token), table(2, token));
  const others = along.filter((each) => each.target && each.name !== token.name);
  const heading = make("h2");
  heading.append(make("code", JSON.stringify(text)), ` at ${token.name}`);
  panel.replaceChildren(heading, make("p", `position ${(row.begin + target.at).toLocaleString()} of the row, id ${row.tokens[target.at]}`, "muted"), facts, pair);
  for (const each of others) panel.append(make("p", `KL at ${each.name}: ${nats(each.target.kl)}`, "muted"));
}
