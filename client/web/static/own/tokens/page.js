// The page of what a run learns: held-out text at one evaluation, and above it at another one, with a panel for one token.

import { notice, request } from "../api.js";
import { showPair } from "./panel.js";
import { Texts } from "./texts.js";

const POLL_MS = 15000;
const get = (id) => document.getElementById(id);
const article = get("tokens");
const url = `/api/v1/runs/${article.dataset.run}/examples`;
const documents = new Map(); // step to a promise of its examples
let entries = [];
let shown = 0; // counts drawings, so that a late one is dropped

const subjects = { before: "before training", along: "in training", after: "after training" };
const name = (entry) => `step ${entry.step.toLocaleString()}, ${subjects[entry.subject] || entry.subject}`;
const nats = (value) => (value === null ? "" : ` · mean KL ${value.toFixed(3)} nats`);

function examples(entry) {
  if (!documents.has(entry.step)) {
    const loading = request("GET", `${url}/${entry.step}`);
    loading.catch(() => documents.delete(entry.step));
    documents.set(entry.step, loading);
  }
  return documents.get(entry.step);
}

const texts = new Texts(get("rows"), (token) => select(token));

async function select(token) {
  const ends = [entries[0], entries[entries.length - 1]];
  const others = await Promise.all(ends.map(examples));
  if (!token.element.isConnected) return;
  const along = ends.map((entry, at) => ({ name: name(entry), target: others[at].rows.find((row) => texts.same(row, token.row))?.targets[token.at] }));
  showPair(get("panel"), token, along);
}

async function draw() {
  const drawing = ++shown;
  const entry = entries[Number(get("step").value)];
  const other = entries.find((each) => String(each.step) === get("beside").value);
  get("step-text").textContent = `${name(entry)}${nats(entry.kl)}`;
  get("step").setAttribute("aria-valuetext", get("step-text").textContent);
  const wanted = other && other.step !== entry.step ? [other, entry] : [entry];
  try {
    const found = await Promise.all(wanted.map(examples));
    if (drawing !== shown) return;
    texts.show(
      found.map((each, at) => ({ examples: each, name: name(wanted[at]) })),
      get("measure").value,
    );
    get("about").textContent = about(found[found.length - 1]);
    notice("", "examples");
  } catch (error) {
    notice(error.message, "examples");
  }
}

// A sentence on what the numbers are.
function about(found) {
  const left = found.left_out ? ` ${found.left_out} wanted rows are left out, for their size.` : "";
  if (!found.teacher_top_k) return `Held-out text. No teacher's distributions of these tokens are there, so the student's alone are shown.${left}`;
  const source = found.from_cache ? `stored in the cache, ${found.teacher_top_k} at most` : `${found.teacher_top_k} at most`;
  return `Held-out text, each token coloured by KL(teacher ‖ student) in nats at temperature 1, over the teacher's likeliest tokens (${source}) and all others as one: a lower bound.${left}`;
}

function fill(list) {
  const follows = !entries.length || Number(get("step").value) === entries.length - 1;
  const beside = get("beside").value;
  const first = !entries.length;
  if (list.length && entries.length && list[0].step !== entries[0].step) documents.clear();
  entries = list;
  get("view").hidden = !entries.length;
  get("no-examples").hidden = entries.length > 0;
  if (!entries.length) return;
  get("step").max = entries.length - 1;
  get("step").disabled = entries.length < 2;
  if (follows) get("step").value = entries.length - 1;
  const options = [new Option("nothing", ""), ...entries.map((entry) => new Option(name(entry), String(entry.step)))];
  get("beside").replaceChildren(...options);
  get("beside").value = first && entries.length > 1 ? String(entries[0].step) : beside;
  if (get("beside").selectedIndex < 0) get("beside").value = "";
  draw();
}

async function load() {
  try {
    const list = (await request("GET", url)).evaluations;
    const same = JSON.stringify(list) === JSON.stringify(entries);
    if (!same || !entries.length) {
      for (const each of list) {
        const known = entries.find((entry) => entry.step === each.step);
        if (known && JSON.stringify(known) !== JSON.stringify(each)) documents.delete(each.step);
      }
      fill(list);
    }
  } catch (error) {
    notice(error.message, "examples");
  }
}

get("controls").addEventListener("submit", (event) => event.preventDefault());
get("step").addEventListener("input", draw);
get("beside").addEventListener("change", draw);
get("measure").addEventListener("change", draw);
load();
if (article.dataset.ended === "no") {
  setInterval(() => {
    if (!document.hidden) load();
  }, POLL_MS);
}
