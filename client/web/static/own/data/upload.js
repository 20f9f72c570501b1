// Uploads a file as it is read, with progress; it is never in memory as a whole.

const get = (id) => document.getElementById(id);
const form = get("upload");
const ENDED = "The upload was ended; nothing of it is stored.";
const LINES = /\.jsonl$/i;
let ending = null; // of the upload that goes on

function say(text, isError = false) {
  get("upload-status").textContent = text;
  get("upload-status").className = isError ? "error" : "";
}

function show(isBusy) {
  get("send").disabled = isBusy;
  get("cancel").hidden = !isBusy;
  get("upload-progress").hidden = !isBusy;
}

// Lines of a file of JSON lines that are not empty; 0, which is unknown, for others.
async function countRows(file, signal) {
  if (!LINES.test(file.name)) return 0;
  let [count, isEmpty] = [0, true];
  for await (const chunk of chunks(file)) {
    if (signal.aborted) throw new Error(ENDED);
    for (const byte of chunk) {
      if (byte === 10) {
        count += isEmpty ? 0 : 1;
        isEmpty = true;
      } else if (byte !== 32 && byte !== 13 && byte !== 9) isEmpty = false;
    }
  }
  return count + (isEmpty ? 0 : 1);
}

async function* chunks(file) {
  const reader = file.stream().getReader();
  for (let part = await reader.read(); !part.done; part = await reader.read()) yield part.value;
}

function send(file, query, signal) {
  return new Promise((resolve, reject) => {
    const call = new XMLHttpRequest();
    signal.addEventListener("abort", () => call.abort());
    call.open("POST", `/api/v1/datasets?${query}`);
    call.setRequestHeader("content-type", "application/octet-stream");
    call.setRequestHeader("accept", "application/json");
    const token = document.querySelector('meta[name="csrf-token"]').content;
    if (token) call.setRequestHeader("x-csrf-token", token);
    call.upload.addEventListener("progress", ({ loaded, total }) => {
      const share = total ? loaded / total : 0;
      get("upload-progress").value = share;
      say(`${Math.floor(100 * share)} % sent`);
    });
    call.addEventListener("abort", () => reject(new Error(ENDED)));
    call.addEventListener("error", () => reject(new Error("The connection broke, and nothing is stored. Send it again.")));
    call.addEventListener("load", () => {
      let answer = null;
      try {
        answer = JSON.parse(call.responseText);
      } catch {
        // not from this server
      }
      if (call.status === 201) resolve(answer);
      else reject(new Error(answer ? `${answer.detail} ${answer.remedy}` : `The server answered ${call.status}.`));
    });
    call.send(file);
  });
}

form.addEventListener("submit", async (event) => {
  event.preventDefault();
  const [file] = get("file").files;
  if (!file) {
    say("Choose a file first.", true);
    get("file").focus();
    return;
  }
  if (file.size > Number(form.dataset.maxBytes)) {
    say(`The file has ${file.size.toLocaleString("en")} bytes, more than this server takes. Use “stillhouse data push”, or start the server with a larger --max-upload-bytes.`, true);
    return;
  }
  show(true);
  get("upload-progress").value = 0;
  ending = new AbortController();
  try {
    say("Counts the rows…");
    const count = await countRows(file, ending.signal);
    const query = new URLSearchParams({ file_name: file.name, ...(count ? { num_rows: count } : {}) });
    const id = get("dataset-id").value.trim();
    if (id) query.set("dataset_id", id);
    const stored = await send(file, query, ending.signal);
    say("Stored.");
    location.assign(`/data/${encodeURIComponent((stored.dataset?.name || stored.name).replace(/^datasets\//, ""))}`);
  } catch (error) {
    say(error.message, true);
  } finally {
    show(false);
  }
});
get("cancel").addEventListener("click", () => ending?.abort());
