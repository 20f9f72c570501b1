// The page of a new run: form and run file follow each other, the server checks them, and its run is created from the text.

import { notice, request } from "../api.js";
import { Rows } from "../data/rows.js";
import { Editor } from "./editor.js";
import { showForecast } from "./forecast.js";
import { Form } from "./form.js";
import { Schema } from "./schema.js";

const TYPING_MS = 500;
const SETTLED_MS = 400;
const MOST_TRIES = 3;
const ROWS = 3;
const get = (id) => document.getElementById(id);
const opened = get("yaml").value;
const check = "/api/v1/run-files:check";
let form = null;
let timer = null;
let queue = Promise.resolve();
let created = false;
let checked = null; // the last response of the service to a text
let forecastOf = "";
const editor = new Editor(() => later(TYPING_MS, true));
const rows = new Rows(get("rows"));

// Runs `act` behind all that was asked for before.
function enqueue(act) {
  queue = queue.then(act).catch((error) => notice(error.message));
  return queue;
}

function later(ms, isTyped) {
  clearTimeout(timer);
  get("verdict").textContent = "Checking…";
  timer = setTimeout(() => enqueue(() => validate(isTyped)), ms);
}

// Makes changes of the form in the text.
async function change(changes, isStructural, focus) {
  for (let tries = 0; tries < MOST_TRIES; tries += 1) {
    const { text } = editor;
    const answer = await request("POST", check, { text, changes, opened, validate: false });
    if (editor.text !== text) continue; // typed into meanwhile
    if (!answer.written) {
      notice("The run file is no valid YAML, so the form cannot change it. Correct it first.", "form");
      show(answer);
      return;
    }
    notice(answer.keeps_comments ? "" : "The run file had to be written anew, without its comments.", "form");
    editor.set(answer.text);
    get("command").textContent = commandOf(answer);
    if (isStructural) form.show(answer.written, focus);
    later(SETTLED_MS, false);
    return;
  }
}

// Asks the service about the text, and shows what it says.
async function validate(isTyped) {
  const { text } = editor;
  const answer = await request("POST", check, { text, opened });
  if (editor.text !== text) return;
  checked = answer;
  show(answer);
  if (isTyped && answer.written) form.show(answer.written);
  if (answer.effective_spec) form.showDefaults(answer.effective_spec);
  if (answer.written) showDatasets(answer.written.data?.train ?? []);
  const matters = JSON.stringify([answer.written?.student, answer.written?.data?.max_sequence_tokens, answer.written?.optimizer, answer.written?.resources]);
  if (!answer.problems.length && matters !== forecastOf) {
    forecastOf = matters;
    await showForecast(get("memory"), text);
  }
}

function show(answer) {
  const count = answer.problems.length;
  editor.show(answer.problems);
  form.showProblems(answer.problems);
  get("verdict").textContent = count ? `${count} ${count === 1 ? "problem" : "problems"} to correct.` : "The run is valid.";
  get("verdict").className = count ? "error" : "good";
  get("command").textContent = commandOf(answer);
}

function commandOf(answer) {
  return answer.command || "Download run.yaml, then: stillhouse run create run.yaml";
}

function showDatasets(datasets) {
  const select = get("rows-of");
  const chosen = Number(select.value) || 0;
  select.replaceChildren(...datasets.map((each, at) => new Option(each.path || `dataset ${at + 1}`, String(at), false, at === chosen)));
  get("show-rows").disabled = !datasets.some((each) => each.path);
}

async function showRows() {
  const { student = {}, data = {}, teachers = [] } = checked.written;
  const { train = [], eval: _, ...settings } = data;
  const spec = { student: { model: student.model ?? "", revision: student.revision ?? "" }, data: settings, teachers };
  await rows.load({ dataset: train[Number(get("rows-of").value)], spec, first_row: Number(get("first-row").value) || 0, num_rows: ROWS });
}

async function create() {
  clearTimeout(timer);
  await validate(false);
  if (checked.problems.length) {
    get("problems").scrollIntoView({ block: "center" });
    get("problems").querySelector("button")?.focus({ preventScroll: true });
    return;
  }
  const run = await request("POST", `/api/v1/runs?request_id=${uuid()}`, editor.text, "application/yaml");
  created = true;
  location.assign(`/${run.name}`);
}

// A random UUID; crypto.randomUUID is missing where the page comes without HTTPS from another machine.
function uuid() {
  const bytes = crypto.getRandomValues(new Uint8Array(16));
  bytes[6] = (bytes[6] & 0x0f) | 0x40;
  bytes[8] = (bytes[8] & 0x3f) | 0x80;
  const digits = [...bytes].map((each) => each.toString(16).padStart(2, "0")).join("");
  return digits.replace(/^(.{8})(.{4})(.{4})(.{4})/, "$1-$2-$3-$4-");
}

function download() {
  const link = Object.assign(document.createElement("a"), { download: "run.yaml", href: URL.createObjectURL(new Blob([editor.text], { type: "application/yaml" })) });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}

async function start() {
  form = new Form(get("settings"), new Schema(await request("GET", "/api/v1/run-files/schema")), (...given) => enqueue(() => change(...given)));
  await validate(true);
}

get("create").addEventListener("click", async () => {
  get("create").disabled = true;
  notice("", "create");
  await enqueue(create);
  get("create").disabled = created;
});
get("show-rows").addEventListener("click", () => enqueue(showRows));
get("download").addEventListener("click", download);
get("find").addEventListener("input", () => form?.find(get("find").value));
get("copy").addEventListener("click", async () => {
  try {
    await navigator.clipboard.writeText(get("command").textContent);
    get("copied").textContent = "Copied.";
  } catch {
    getSelection().selectAllChildren(get("command"));
    get("copied").textContent = "Selected; copy it with the keyboard.";
  }
});
addEventListener("beforeunload", (event) => {
  if (!created && editor.text !== opened) event.preventDefault();
});
enqueue(start);
