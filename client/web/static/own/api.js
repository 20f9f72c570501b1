// Requests to the HTTP API, with the session's CSRF token; a refusal is an Error with the problem's sentences.

export async function request(method, url, body, type = "application/json") {
  const headers = { accept: "application/json" };
  const token = document.querySelector('meta[name="csrf-token"]').content;
  if (token) headers["x-csrf-token"] = token;
  if (body !== undefined) headers["content-type"] = type;
  let response;
  try {
    response = await fetch(url, { method, headers, body: typeof body === "string" || body === undefined ? body : JSON.stringify(body) });
  } catch {
    throw new Error("The web server does not respond. Check that it runs, then try again.");
  }
  const isJson = (response.headers.get("content-type") || "").includes("json");
  const content = isJson ? await response.json() : null;
  if (!response.ok) throw new Error(content ? `${content.detail} ${content.remedy}` : `The server answered ${response.status}.`);
  return content;
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
