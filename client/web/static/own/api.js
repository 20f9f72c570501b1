// Requests to the HTTP API, with the session's CSRF token; a refusal is an Error with the problem's sentences.

// A response that succeeded; `signal` ends the request.
export async function open(method, url, body, { type = "application/json", signal } = {}) {
  const headers = { accept: "application/json" };
  const token = document.querySelector('meta[name="csrf-token"]').content;
  if (token) headers["x-csrf-token"] = token;
  if (body !== undefined) headers["content-type"] = type;
  let response;
  try {
    response = await fetch(url, { method, headers, body: typeof body === "string" || body === undefined ? body : JSON.stringify(body), signal });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("The web server does not respond. Check that it runs, then try again.");
  }
  if (response.ok) return response;
  const content = isJson(response) ? await response.json() : null;
  throw new Error(content ? `${content.detail} ${content.remedy}` : `The server answered ${response.status}.`);
}

const isJson = (response) => (response.headers.get("content-type") || "").includes("json");

export async function request(method, url, body, type) {
  const response = await open(method, url, body, { type });
  return isJson(response) ? response.json() : null;
}

// Metric series of a run, downsampled by the service: of all steps, or of those of a zoom.
export async function metrics(run, zoom = null) {
  const query = new URLSearchParams();
  if (zoom) {
    query.set("start_step", String(Math.max(0, Math.floor(zoom.min))));
    if (Number.isFinite(zoom.max)) query.set("end_step", String(Math.ceil(zoom.max) + 1));
  }
  return (await request("GET", `/api/v1/runs/${run}/metrics?${query}`)).series;
}

const notices = new Map();

// Shows a sentence above the page until the same source replaces it; an empty one removes it.
export function notice(text, source = "action") {
  if (text) notices.set(source, text);
  else notices.delete(source);
  const place = document.getElementById("notice");
  const shown = [...notices.values()].join(" ");
  if (place.textContent !== shown) place.textContent = shown;
  place.hidden = !shown;
}
