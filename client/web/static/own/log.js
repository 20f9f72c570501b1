// A run's log, followed while its panel is open: lines of JSON as text, from a level on, with a text in them.

import { Live } from "./live.js";
import { notice } from "./api.js";

const MOST_LINES = 2000;
const TAIL_BYTES = 65536;
const LEVELS = { debug: 0, info: 1, warning: 2, error: 3, critical: 3 };
const HIDDEN = new Set(["ts", "level", "event", "run", "attempt", "exception"]);
const panel = document.getElementById("log");
const list = document.getElementById("log-lines");
const get = (id) => document.getElementById(id);
let live = null;

function parse(line) {
  try {
    const value = JSON.parse(line);
    if (value && typeof value === "object" && "event" in value) return value;
  } catch {
    // a line of another program
  }
  return null;
}

function text(fields) {
  const time = typeof fields.ts === "string" ? new Date(fields.ts) : null;
  const parts = [time && !Number.isNaN(time.getTime()) ? time.toLocaleTimeString("en-GB") : "", String(fields.level ?? "").toUpperCase(), String(fields.event)];
  for (const [name, value] of Object.entries(fields)) {
    if (!HIDDEN.has(name)) parts.push(`${name}=${typeof value === "string" ? value : JSON.stringify(value)}`);
  }
  const first = parts.filter(Boolean).join("  ");
  return fields.exception ? `${first}\n${fields.exception}` : first;
}

function item(line) {
  const fields = parse(line);
  const element = document.createElement("li");
  const level = fields ? (LEVELS[fields.level] ?? 1) : 1;
  element.dataset.level = level;
  element.className = ["debug", "info", "warning", "error"][level];
  element.textContent = fields ? text(fields) : line;
  return element;
}

function hide(element) {
  const wanted = get("log-text").value.toLowerCase();
  element.hidden = Number(element.dataset.level) < Number(get("level").value) || !element.textContent.toLowerCase().includes(wanted);
}

function add(data) {
  const items = data.split("\n").filter(Boolean).slice(-MOST_LINES).map(item);
  items.forEach(hide);
  list.append(...items);
  while (list.childElementCount > MOST_LINES) list.firstElementChild.remove();
  if (get("follow").checked) list.scrollTop = list.scrollHeight;
}

function turn() {
  if (panel.open && !live) {
    live = new Live(`/api/v1/runs/${get("run").dataset.run}/logs?follow=true&start_offset=-${TAIL_BYTES}`, "start_offset", { log: add }, (text) => notice(text, "log"));
  }
}

for (const id of ["level", "log-text"]) get(id).addEventListener("input", () => [...list.children].forEach(hide));
get("log-filter").addEventListener("submit", (event) => event.preventDefault());
panel.addEventListener("toggle", turn);
turn();
