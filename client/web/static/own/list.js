// Selection of runs to compare; it outlasts pages and refreshes of the list.

const MOST = 8;
const KEY = "stillhouse.selected";
const selected = new Set(read());

function read() {
  try {
    const value = JSON.parse(sessionStorage.getItem(KEY));
    return Array.isArray(value) ? value.filter((each) => typeof each === "string") : [];
  } catch {
    return [];
  }
}

function show() {
  sessionStorage.setItem(KEY, JSON.stringify([...selected]));
  for (const box of document.querySelectorAll("#runs input[type=checkbox]")) {
    box.checked = selected.has(box.value);
    box.disabled = !box.checked && selected.size >= MOST;
  }
  const count = selected.size;
  document.getElementById("selected").textContent =
    count === 0 ? "No run selected" : `${count} selected${count === 1 ? "; select another to compare" : ""}${count === MOST ? ", which is the most" : ""}`;
  document.getElementById("compare").disabled = count < 2;
  document.getElementById("clear").disabled = count === 0;
  document.getElementById("selected-inputs").replaceChildren(
    ...[...selected].map((id) => Object.assign(document.createElement("input"), { type: "hidden", name: "run", value: id })),
  );
}

document.body.addEventListener("change", (event) => {
  if (!event.target.closest("#runs")) return;
  if (event.target.checked) selected.add(event.target.value);
  else selected.delete(event.target.value);
  show();
});
document.getElementById("clear").addEventListener("click", () => {
  selected.clear();
  show();
});
document.body.addEventListener("htmx:afterSettle", show);
show();
