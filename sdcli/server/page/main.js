// The page: what its parts do together. Start reading here.

import { call } from "/page/api.js";
import { $, base64, tell } from "/page/dom.js";
import { showCommand } from "/page/gallery.js";
import { current, startFields, useStart } from "/page/init_image.js";
import { cancelOne, resume, submit } from "/page/jobs.js";
import { maskBlob } from "/page/mask.js";
import { clearErrors, fill, loadCapabilities, request, restore, showError, showTaken } from "/page/settings.js";

/** What the images of the form are made from, for later. */
function sources() {
  const start = current();
  if (!start) return {};
  const kept = { ...start, operations: [...start.operations] };
  return { name: start.name, masked: kept.operations.length > 0, start: kept, mask: () => maskBlob(kept) };
}

async function generate() {
  clearErrors();
  $("generate").disabled = true;
  try {
    await submit({ ...request(), ...await startFields() }, sources());
    if (matchMedia("(max-width: 800px)").matches) $("results").scrollIntoView();
  } catch (error) {
    showError(error);
  }
  $("generate").disabled = false;
}

async function copyCommand() {
  clearErrors();
  try {
    const fields = request(), count = Number(fields.num_images ?? 1), start = current();
    const images = start ? { init_image: true, mask: start.operations.length > 0 } : {};
    await showCommand({ ...fields, ...images }, sources(), count);
  } catch (error) {
    showError(error);
  }
}

/** Take the settings that are stored in an image. */
async function readSettings(file) {
  clearErrors();
  try {
    const found = await call("POST", "/v1/metadata", { image: await base64(file) });
    if (found.request) fill(found.request);
    showTaken(file.name, found.source, found.request, found.not_taken);
  } catch (error) {
    tell($("error"), error.message.replace(/^image: /, `${file.name}: `));
  }
}

// Dropping

let inside = false;  // an image of this page is being dragged

const holdsFiles = event => !inside && [...event.dataTransfer?.types ?? []].includes("Files");
document.addEventListener("dragstart", () => { inside = true; });
document.addEventListener("dragend", () => { inside = false; });
document.addEventListener("dragenter", event => {
  if (holdsFiles(event) && !document.querySelector("dialog[open]")) $("dropping").hidden = false;
});
document.addEventListener("dragover", event => {
  if (holdsFiles(event)) event.preventDefault();
});
document.addEventListener("dragleave", event => {
  if (event.relatedTarget === null) $("dropping").hidden = true;
});
document.addEventListener("drop", event => {
  if (!holdsFiles(event)) return;
  event.preventDefault();
  $("dropping").hidden = true;
  const file = event.dataTransfer.files[0];
  if (!file || document.querySelector("dialog[open]")) return;
  if (event.target.closest("#drop-start, #start")) useStart(file);
  else readSettings(file);
});
for (const target of document.querySelectorAll(".target")) {
  target.ondragenter = () => target.classList.add("over");
  target.ondragleave = event => { if (!target.contains(event.relatedTarget)) target.classList.remove("over"); };
  target.addEventListener("drop", () => target.classList.remove("over"));
}

// Keys and buttons

document.addEventListener("keydown", event => {
  if (event.isComposing || document.querySelector("dialog[open]")) return;
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    generate();
  }
  if (event.key === "Escape" && !$("dropping").hidden) $("dropping").hidden = true;
  else if (event.key === "Escape") cancelOne();
});
$("form").onsubmit = event => { event.preventDefault(); generate(); };
$("copy").onclick = copyCommand;
$("read").onclick = () => $("read-file").click();
$("read-file").onchange = ({ target }) => {
  if (target.files[0]) readSettings(target.files[0]);
  target.value = "";
};
for (const button of document.querySelectorAll("[data-close]")) button.onclick = () => button.closest("dialog").close();

async function begin() {
  await loadCapabilities();
  restore();
  await resume();
}

addEventListener("serverback", () => loadCapabilities().catch(() => {}));
begin().catch(error => tell($("error"), error.message));
