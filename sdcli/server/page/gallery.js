// The images of this session: a grid of all, one of them large with its settings, and what can be done with it.

import { call, fetchBlob } from "/page/api.js";
import { $, announce, brief, copyText, make, save, shown } from "/page/dom.js";
import { useStart } from "/page/init_image.js";
import { forgetImage } from "/page/jobs.js";
import { fill } from "/page/settings.js";

const entries = [];  // newest job first: {job, number, view, request, blob, url, element}
let opened = null;

/** Add a finished image; its file is loaded at once, because the server drops it later. */
export function addImage(job, number, view) {
  const entry = { job, number, view, request: view.request ?? {}, blob: null, url: "" };
  const picture = make("img", { alt: brief(entry.request.prompt || "(no prompt)"), decoding: "async" });
  entry.element = make("li", {}, make("button", { type: "button", onclick: () => open(entry), ariaLabel: label(entry) },
    picture, make("span", { className: "seed" }, String(view.seed))));
  const place = entries.findIndex(other => other.job.order < job.order || (other.job === job && other.number > number));
  entries.splice(place < 0 ? entries.length : place, 0, entry);
  $("gallery").insertBefore(entry.element, entries[entries.indexOf(entry) + 1]?.element ?? null);
  note();
  load(entry, picture);
  return entry;
}

async function load(entry, picture) {
  try {
    entry.blob = await fetchBlob(entry.view.url);
    entry.url = picture.src = URL.createObjectURL(entry.blob);
    if (opened === entry) show();
  } catch (error) {
    entry.element.firstChild.append(make("span", { className: "error" }, error.message));
  }
}

const label = ({ request, view }) => `${brief(request.prompt || "(no prompt)")}, seed ${view.seed}`;
const fileName = ({ request, view, blob }) => {
  const words = (request.prompt ?? "").toLowerCase().match(/[\p{L}\p{N}]+/gu)?.slice(0, 6).join("-") || "image";
  return `${words.slice(0, 60)}-${view.seed}.${blob?.type.split("/")[1] ?? "png"}`;
};

function note() {
  $("empty").hidden = entries.length > 0;
  $("keep").hidden = entries.length === 0;
}

// One image

function open(entry) {
  opened = entry;
  show();
  if (!$("viewer").open) $("viewer").showModal();
}

function show() {
  const { request, view, url } = opened, index = entries.indexOf(opened);
  $("viewer-title").textContent = `Image ${index + 1} of ${entries.length}`;
  $("large").src = url;
  $("large").alt = brief(request.prompt || "(no prompt)", 500);
  Object.assign($("download"), { href: url, download: fileName(opened) });
  $("previous").disabled = index === 0;
  $("next").disabled = index === entries.length - 1;
  const rows = Object.entries(request).filter(([name, value]) => name !== "schema" && value !== "");
  if (view.seconds) rows.push(["seconds", String(view.seconds)]);
  $("facts").replaceChildren(...rows.map(([name, value]) => make("tr", {},
    make("th", { scope: "row" }, name.replaceAll("_", " ")), make("td", { dir: "auto" }, named(name, value)))));
}

/** A value as text; of an init image the server knows the digest only, and the page the name. */
function named(name, value) {
  const { sources } = opened.job;
  if (name === "init_image" && sources.name) return sources.name;
  if (name === "mask" && sources.masked) return "drawn on this page";
  return shown(value);
}

function step(by) {
  const next = entries[entries.indexOf(opened) + by];
  if (next) open(next);
}

function remove() {
  const index = entries.indexOf(opened), gone = opened;
  entries.splice(index, 1);
  gone.element.remove();
  URL.revokeObjectURL(gone.url);
  forgetImage(gone.job, gone.number);
  announce("Deleted from this page.");
  note();
  if (entries.length) open(entries[Math.min(index, entries.length - 1)]);
  else $("viewer").close();
}

// What can be done with it

async function useSettings() {
  const { request, job: { sources } } = opened;
  if (sources.start) await useStart(sources.start.blob, sources.start.name, [...sources.start.operations]);
  fill(request);
  $("viewer").close();
  $("prompt").focus();
}

function useSeed() {
  $("seed").value = opened.view.seed;
  $("seed").dispatchEvent(new Event("input", { bubbles: true }));
  $("viewer").close();
  $("seed").focus();
}

async function useAsStart() {
  await useStart(opened.blob, fileName(opened));
  $("viewer").close();
  $("strength").focus();
}

/** Show the command line of a request, and copy it. `sources`: {name, masked, start} of its init image. */
export async function showCommand(request, sources, count = 1) {
  const { init_image, mask, num_images, schema, ...fields } = request;
  if (init_image) fields.init_image = sources.name ?? "init.png";
  if (mask) fields.mask = "mask.png";
  const { command } = await call("POST", "/v1/command", { request: fields, num_images: count });
  $("command").value = command ?? "";
  const files = make("span", {}, init_image ? `It reads ${fields.init_image}${mask ? " and mask.png" : ""}. ` : "");
  const blobs = [[fields.init_image, init_image && sources.start?.blob], ["mask.png", mask && await sources.mask?.()]];
  for (const [name, blob] of blobs) {
    if (blob) files.append(make("button", { type: "button", onclick: () => save(blob, name) }, `Save ${name}`), " ");
  }
  $("command-files").replaceChildren(command === null ? "The prompt is longer than an argument of a command can be." : files);
  $("copied").textContent = "";
  $("command-view").showModal();
  if (command !== null) await copyText($("command"), $("copied"));
}

$("previous").onclick = () => step(-1);
$("next").onclick = () => step(1);
$("delete").onclick = remove;
$("use-settings").onclick = useSettings;
$("use-seed").onclick = useSeed;
$("use-start").onclick = useAsStart;
$("copy-image").onclick = () => showCommand(opened.request, opened.job.sources);
$("copy-command").onclick = () => copyText($("command"), $("copied"));
$("viewer").addEventListener("keydown", event => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key === "ArrowLeft") step(-1);
  if (event.key === "ArrowRight") step(1);
  if (event.key === "Delete") remove();
});
$("viewer").onclose = () => {
  const last = opened;
  opened = null;
  if (document.activeElement === document.body) last?.element.querySelector("button")?.focus();
};
