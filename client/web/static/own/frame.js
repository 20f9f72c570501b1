// Parts of every page: signing out, and requests of htmx that fail or that nobody looks at.

import { notice, request } from "./api.js";

document.getElementById("sign-out")?.addEventListener("click", async () => {
  try {
    await request("DELETE", "/api/v1/session");
    location.assign("/sign-in");
  } catch (error) {
    notice(error.message);
  }
});

document.body.addEventListener("htmx:beforeRequest", (event) => {
  if (document.hidden && event.target.hasAttribute("data-polls")) event.preventDefault();
});
document.body.addEventListener("htmx:responseError", (event) => {
  const page = new DOMParser().parseFromString(event.detail.xhr.responseText, "text/html");
  notice(page.querySelector(".cause")?.textContent || `The server answered ${event.detail.xhr.status}.`, "refresh");
});
document.body.addEventListener("htmx:sendError", () => notice("The web server does not respond. This page goes on once it is back.", "refresh"));
document.body.addEventListener("htmx:afterOnLoad", (event) => {
  if (event.detail.successful) notice("", "refresh");
});
