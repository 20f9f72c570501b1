// The box of the teachers' page: a prompt continued as a stream, or a text scored, with the distribution of each token.

import { notice, open, request } from "../api.js";
import { Events } from "./event_stream.js";
import { showTeacher } from "./panel.js";
import { Texts } from "./texts.js";

const REDRAW_MS = 200;
const get = (id) => document.getElementById(id);
const form = get("try");
let running = null;

const texts = form && new Texts(get("rows"), (token) => showTeacher(get("panel"), token));

// Text of a token; the bytes of one that is no whole character stand for themselves.
const plain = (text) => (/^bytes:(\\x[0-9a-f]{2})+$/.test(text) ? text.slice("bytes:".length) : text);

// Samples as rows of `Texts`.
class Samples {
  constructor() {
    this.rows = new Map();
    this.names = {};
    this.due = null;
  }

  add(index, title, tokens, begin) {
    if (!this.rows.has(index)) this.rows.set(index, { title, set: "", number: index, begin, tokens: [], texts: [], targets: [] });
    const row = this.rows.get(index);
    for (const token of tokens) {
      if (token.logprob !== undefined) {
        row.targets.push({
          at: row.tokens.length,
          teacher_logprob: token.logprob,
          teacher_tail: token.tail,
          top: token.top.filter((each) => each.logprob !== null).map((each) => [each.id, each.logprob, null]),
        });
        for (const each of token.top) this.names[each.id] = plain(each.text);
      }
      row.tokens.push(token.id);
      row.texts.push(plain(token.text));
    }
    this.due ??= setTimeout(() => this.draw(), REDRAW_MS);
  }

  draw() {
    clearTimeout(this.due);
    this.due = null;
    const rows = [...this.rows.values()].sort((one, other) => one.number - other.number);
    get("tried").hidden = !rows.length;
    texts.show([{ name: "", examples: { rows, texts: this.names, top_k: Number(get("top-k").value) } }], "teacher");
  }
}

function body() {
  const prompt = get("prompt").value;
  const input = get("kind").value === "chat" ? { messages: [{ role: "user", content: prompt }] } : { text: prompt };
  return { ...input, adapter: get("adapter").value, top_k: Number(get("top-k").value) };
}

async function generate(samples, signal) {
  const sampling = { max_new_tokens: Number(get("max-new").value), temperature: Number(get("temperature").value) };
  if (get("seed").value !== "") sampling.seed = Number(get("seed").value);
  const response = await open("POST", `/api/v1/teachers/${get("teacher").value}:generate`, { ...body(), sampling }, { signal });
  let finish = "";
  for await (const { event, data } of new Events(response.body)) {
    if (event === "problem") throw new Error(`${data.detail} ${data.remedy}`);
    if (event === "chunk") {
      samples.add(data.sample_index, "Continuation", data.tokens, 0);
      finish = data.finish_reason ?? finish;
    }
    if (event === "end") return `${data.generated_tokens} tokens after a prompt of ${data.prompt_tokens}; it ended by ${finish === "length" ? "its length" : "an end token"}.`;
  }
  throw new Error("The stream ended early. Try again.");
}

async function score(samples) {
  const found = await request("POST", `/api/v1/teachers/${get("teacher").value}:score`, body());
  samples.add(0, "Scored text", [...found.before, ...found.tokens], 0);
  const mean = found.tokens.reduce((sum, token) => sum - token.logprob, 0) / found.tokens.length;
  return `${found.tokens.length} tokens scored, mean -log p ${mean.toFixed(3)} nats.`;
}

async function run(work) {
  if (!form.reportValidity()) return;
  running?.abort();
  const own = new AbortController();
  running = own;
  const samples = new Samples();
  const busy = (yes) => ["generate", "score"].forEach((id) => (get(id).disabled = yes)) || (get("cancel").disabled = !yes);
  busy(true);
  get("outcome").textContent = "Waits for the teacher…";
  get("panel").replaceChildren();
  notice("", "try");
  try {
    get("outcome").textContent = await work(samples, own.signal);
  } catch (error) {
    get("outcome").textContent = error.name === "AbortError" ? "Cancelled." : "";
    if (error.name !== "AbortError") notice(error.message, "try");
  }
  samples.draw();
  busy(false);
}

// Adapters of the chosen teacher alone can be chosen.
function offer() {
  for (const option of get("adapter").options) {
    option.hidden = option.disabled = Boolean(option.dataset.teacher) && option.dataset.teacher !== get("teacher").value;
  }
  if (get("adapter").selectedOptions[0]?.disabled) get("adapter").value = "";
}

if (form) {
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    run(generate);
  });
  get("score").addEventListener("click", () => run(score));
  get("cancel").addEventListener("click", () => running?.abort());
  get("teacher").addEventListener("change", offer);
  offer();
}
