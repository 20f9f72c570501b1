// Rows of a dataset as a run trains on them: text, tokens, and those that count in the loss.

import { notice, request } from "../api.js";
import { element } from "../create/element.js";

const number = (value) => value.toLocaleString("en");
const bytes = (text) => Uint8Array.from(atob(text), (each) => each.charCodeAt(0));

export class Rows {
  constructor(place) {
    this.place = place;
  }

  // Asks for rows, and shows them; returns the response, null if it was refused.
  async load(asked) {
    this.place.replaceChildren(element("p", { className: "muted", aria: { role: "status" } }, "Reads the rows…"));
    notice("", "rows");
    try {
      const answer = await request("POST", "/api/v1/datasets:inspect", asked);
      this.place.replaceChildren(...shown(answer));
      return answer;
    } catch (error) {
      this.place.replaceChildren(element("p", { className: "error", aria: { role: "alert" } }, error.message));
      return null;
    }
  }
}

function shown(answer) {
  const encoded = new Map((answer.encoding?.rows ?? []).map((each) => [each.number, each]));
  if (!answer.rows.length) return [element("p", { className: "muted" }, "No row that can be trained on is there.")];
  const legend = answer.encoding ? [element("p", { className: "muted" }, "Tokens that count in the loss are ", element("span", { className: "token target" }, "marked"), "; each has its id as a title.")] : [];
  return [...legend, ...answer.rows.map((each) => row(each, encoded.get(each.number), answer.encoding?.max_sequence_tokens))];
}

function row({ number: at, json }, encoding, limit) {
  const heading = element("h3", {}, `Row ${number(at)}`);
  const raw = element("pre", { tabIndex: 0, aria: { label: `Row ${at} as it is read`, role: "region" } }, json ? JSON.stringify(JSON.parse(json), null, 1) : "It is too long to be shown.");
  if (!encoding) return element("article", { className: "row" }, heading, raw);
  const details = element("details", {}, element("summary", {}, "As it is read"), raw);
  if (encoding.problem) return element("article", { className: "row" }, heading, element("p", { className: "error" }, `Refused: field ${encoding.field} ${encoding.problem}`), details);
  const cut = encoding.num_tokens > limit ? `, cut at ${number(limit)}` : "";
  const counts = element("p", { className: "muted" }, `${number(encoding.num_tokens)} tokens${cut}; ${number(encoding.num_targets)} count in the loss.`);
  return element("article", { className: "row" }, heading, counts, tokens(encoding), details);
}

function tokens({ token_ids: ids, token_bytes: texts, targets, num_tokens: all }) {
  const decoder = new TextDecoder();
  const parts = ids.map((id, at) => {
    const text = decoder.decode(bytes(texts[at]), { stream: true });
    return element("span", { className: targets[at] ? "token target" : "token", title: `token ${at}: ${id}` }, text || "▫");
  });
  const rest = all > ids.length ? [element("span", { className: "muted" }, ` … and ${number(all - ids.length)} more tokens`)] : [];
  return element("div", { className: "tokens", tabIndex: 0, aria: { role: "group", label: "Tokens" } }, ...parts, ...rest);
}
