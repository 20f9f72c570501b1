// Exchanges a token for a session, and goes on to the page that was wanted.

import { request } from "./api.js";

const form = document.getElementById("sign-in");
const failure = document.getElementById("token-error");

// Within this server, as a whole URL: a path may begin with two slashes, which would name another host.
function target() {
  const wanted = new URL(new URLSearchParams(location.search).get("next") || "/", location.origin);
  return wanted.origin === location.origin ? wanted.href : "/";
}

form.addEventListener("submit", async (event) => {
  event.preventDefault();
  failure.textContent = "";
  try {
    await request("POST", "/api/v1/session", { token: form.token.value.trim() });
    location.assign(target());
  } catch (error) {
    failure.textContent = error.message;
    form.token.select();
  }
});
