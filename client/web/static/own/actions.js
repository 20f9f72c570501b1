// Buttons that change a run: asked about first where they say so, and twice where a word is to be repeated.

import { notice, request } from "./api.js";

const dialog = document.getElementById("ask");

function ask(question, word) {
  document.getElementById("ask-text").textContent = question;
  const input = document.getElementById("ask-input");
  const yes = document.getElementById("ask-yes");
  document.getElementById("ask-repeat").hidden = !word;
  document.getElementById("ask-word").textContent = word;
  input.value = "";
  const check = () => (yes.disabled = Boolean(word) && input.value.trim() !== word);
  input.oninput = check;
  check();
  dialog.returnValue = "no";
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => resolve(dialog.returnValue === "yes" && !yes.disabled), { once: true });
  });
}

document.body.addEventListener("click", async (event) => {
  const button = event.target.closest("button[data-url]");
  if (!button) return;
  const { method, url, then, repeat } = button.dataset;
  if (button.dataset.ask && !(await ask(button.dataset.ask, ""))) return;
  if (repeat && !(await ask("Really delete it? This is the second question, and the last.", repeat))) return;
  button.disabled = true;
  try {
    await request(method, url);
    if (then) location.assign(then);
    else location.reload();
  } catch (error) {
    button.disabled = false;
    notice(error.message);
    document.getElementById("notice").scrollIntoView({ block: "center" });
  }
});
