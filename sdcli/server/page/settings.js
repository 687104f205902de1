// The form: its fields, the request that they make, errors beside them, and settings that survive a reload.

import { call } from "/page/api.js";
import { $, announce, make, shown, storage, tell } from "/page/dom.js";

const FIELDS = ["prompt", "negative_prompt", "model", "width", "height", "steps", "guidance_scale", "num_images",
  "scheduler", "seed", "strength"];
const NUMBERS = FIELDS.filter(name => $(name).type === "number");
const ELSEWHERE = [...FIELDS, "init_image", "mask", "guess_mode"];
const WITH_START = ["strength", "mask_blur", "invert_mask", "extend"];

export let capabilities = null;
let rows = [];  // [{name, value}] under "More settings"
let start = null;  // what init_image.js has: {width, height, masked}

export const currentModel = () => capabilities?.models.find(model => model.name === $("model").value);

// What the server can do

export async function loadCapabilities() {
  capabilities = await call("GET", "/v1/capabilities");
  $("version").textContent = capabilities.version;
  const usable = capabilities.models.filter(model => model.usable);
  const chosen = $("model").value || storage.get("settings", {}).model || capabilities.default_model;
  $("model").replaceChildren(...usable.map(({ name }) => make("option", { value: name }, name)));
  $("model").value = usable.some(model => model.name === chosen) ? chosen : capabilities.default_model;
  $("num_images").max = capabilities.limits.images;
  $("loras").replaceChildren(...capabilities.loras.map(name => make("option", { value: name })));
  const minutes = Math.round(capabilities.limits.keep / 60);
  $("keep").textContent = `The server keeps images for ${minutes === 1 ? "a minute" : `${minutes} minutes`}: download those to keep.`;
  offerMore();
  showModel();
}

/** What the model decides where a field is empty. */
function showModel() {
  const model = currentModel();
  if (!model) return;
  const { defaults } = model, scheduler = $("scheduler").value;
  $("model-hint").textContent = model.description;
  $("prompt-hint").textContent = !model.takes_prompt ? "This model takes no prompt."
    : model.classes.length ? `Its classes: ${model.classes.slice(0, 40).join(", ")}${model.classes.length > 40 ? " …" : ""}` : "";
  $("scheduler").replaceChildren(make("option", { value: "" }, `auto (${defaults.scheduler})`),
    ...model.schedulers.map(name => make("option", { value: name, title: capabilities.schedulers[name] }, name)));
  $("scheduler").value = model.schedulers.includes(scheduler) ? scheduler : "";
  for (const name of ["steps", "guidance_scale"]) $(name).placeholder = defaults[name];
  for (const side of ["width", "height"]) {
    Object.assign($(side), { step: model.size_step, min: model.size_step,
      placeholder: start ? Math.floor(start[side] / model.size_step) * model.size_step : defaults[side] });
  }
  $("strength").placeholder = start?.masked ? "1" : "0.8";
  $("guidance_scale").disabled = $("negative_prompt").disabled = Boolean(model.unguided);
}

/** The init image is another one, or gone (null). A large one is generated at the model's size. */
export function startChanged(next) {
  const model = currentModel(), came = next && (start?.width !== next.width || start?.height !== next.height);
  start = next;
  if (came && model && !$("width").value && !$("height").value) {
    const { defaults, size_step: step } = model;
    const scale = Math.sqrt(defaults.width * defaults.height / (next.width * next.height));
    if (scale < 0.7) for (const side of ["width", "height"]) $(side).value = Math.max(1, Math.round(next[side] * scale / step)) * step;
  }
  showModel();
  keep();
}

// Settings without a control of their own

const title = name => name.replaceAll("_", " ");

function offerMore() {
  const names = Object.keys(capabilities.fields).filter(name => !ELSEWHERE.includes(name));
  $("add").replaceChildren(make("option", { value: "" }, "choose …"),
    ...names.map(name => make("option", { value: name }, title(name))));
}

function showRows() {
  $("rows").replaceChildren(...rows.map((row, index) => rowElement(row, index)));
  if (rows.length) $("more").open = true;
}

function rowElement(row, index) {
  const field = capabilities?.fields[row.name], id = `row-${index}`;
  const properties = { id, oninput: () => { row.value = control.value; keep(); } };
  const control = field?.choices
    ? make("select", properties, ...field.choices.map(value => make("option", { value }, value)))
    : make("input", { ...properties, autocomplete: "off" });
  if (row.name === "loras") control.setAttribute("list", "loras");
  control.value = shown(row.value);
  control.dataset.field = row.name;
  control.setAttribute("aria-describedby", `${id}-hint`);
  const remove = make("button", { type: "button", className: "icon quiet", ariaLabel: `Remove ${title(row.name)}`,
    onclick: () => { rows.splice(index, 1); showRows(); keep(); $("add").focus(); } }, "✕");
  return make("li", {}, make("div", { className: "field" }, make("label", { htmlFor: id }, title(row.name)), control,
    make("p", { className: "hint", id: `${id}-hint` }, field?.description ?? "")), remove);
}

function addRow() {
  const name = $("add").value;
  $("add").value = "";
  if (!name) return;
  rows.push({ name, value: capabilities.fields[name].choices?.[0] ?? "" });
  showRows();
  keep();
  $(`row-${rows.length - 1}`).focus();
}

// The request

/** The request that the form makes, without the init image. Throws where a field holds no number. */
export function request() {
  const found = { prompt: $("prompt").value };
  for (const name of FIELDS.slice(1)) {
    const value = $(name).value.trim();
    if (NUMBERS.includes(name) && $(name).validity.badInput) throw new Error(`${name}: should be a number`);
    if (value && !$(name).disabled && !(name === "strength" && !start)) found[name] = value;
  }
  for (const { name, value } of rows) {
    if (value === "") continue;
    if (capabilities.fields[name]?.is_list) (found[name] ??= []).push(value);
    else found[name] = value;
  }
  return found;
}

/** Fill the form with a request; what has no control of its own comes under "More settings". */
export function fill(fields) {
  const model = capabilities.models.find(one => one.name === fields.model && one.usable) ?? currentModel();
  for (const name of FIELDS) {
    if (name === "num_images" || (name === "model" && !fields.model)) continue;
    $(name).value = fields[name] ?? "";
  }
  $("model").value = model.name;
  rows = [];
  for (const [name, value] of Object.entries(fields)) {
    const usual = value === false || value === model.defaults[name];
    if (FIELDS.includes(name) || name === "schema" || usual || (WITH_START.includes(name) && !start)) continue;
    if (["init_image", "mask"].includes(name) || !capabilities.fields[name]) continue;
    for (const one of Array.isArray(value) ? value : [value]) rows.push({ name, value: one });
  }
  if (fields.guidance_end !== undefined) {
    rows = rows.filter(({ name }) => name !== "guidance_end");
    $("guidance_scale").value = `${fields.guidance_scale}..${fields.guidance_end}`;
  }
  const scheduler = fields.scheduler ?? "";
  showRows();
  showModel();
  $("scheduler").value = scheduler;
  clearErrors();
  keep();
}

/** Show which settings were taken from an image, and which were not. */
export function showTaken(name, source, fields, left) {
  const names = Object.keys(fields ?? {}).map(title), missing = Object.entries(left);
  const from = source && source !== "sdcli" ? ` (by ${source})` : "";
  $("taken-text").textContent = fields === null ? `${name} holds no settings that can be read.`
    : `Taken from ${name}${from}: ${names.join(", ")}.${start ? " The init image stays as it is." : ""}`;
  $("taken-left").hidden = !missing.length;
  $("taken-left").open = missing.length < 6;
  $("taken-left").querySelector("summary").textContent = `Not taken over: ${missing.length}`;
  $("taken-left").querySelector("dl").replaceChildren(...missing.flatMap(([key, value]) =>
    [make("dt", {}, key), make("dd", {}, shown(value))]));
  $("taken").hidden = false;
  $("taken").scrollIntoView({ block: "nearest" });
}

// Errors

/** The control that a sentence of the server is about: it begins with the field, or names its flag. */
function fieldOf(sentence, param) {
  const named = param ?? /^([a-z_]+)(?:\.[\w.]+)?:/.exec(sentence)?.[1] ?? /--([a-z][a-z-]*)/.exec(sentence)?.[1];
  const name = named?.replaceAll("-", "_").replace(/^.*\./, "");
  if (["init_image", "mask"].includes(name)) return { field: $("choose-start"), error: $(`error-${name}`) };
  const field = FIELDS.includes(name) ? $(name) : document.querySelector(`[data-field="${CSS.escape(name ?? "")}"]`);
  return field && { field, error: $(`error-${field.id}`) ?? addError(field) };
}

function addError(field) {
  const error = make("p", { className: "error", id: `error-${field.id}` });
  (field.closest(".row") ?? field).after(error);
  return error;
}

export function showError(failure) {
  clearErrors();
  const sentence = failure.message.replace(/^line \d+: /, "");
  const place = fieldOf(sentence, failure.param);
  tell(place?.error ?? $("error"), sentence);
  if (!place) return;
  place.field.setAttribute("aria-invalid", "true");
  place.field.setAttribute("aria-errormessage", place.error.id);
  place.field.closest("details")?.setAttribute("open", "");
  place.field.focus();
  announce(sentence);
}

export function clearErrors() {
  for (const error of document.querySelectorAll("#form .error")) tell(error, "");
  for (const field of document.querySelectorAll("#form [aria-invalid]")) field.removeAttribute("aria-invalid");
}

// Reloads

function keep() {
  const values = Object.fromEntries(FIELDS.map(name => [name, $(name).value]));
  storage.set("settings", { ...values, rows });
}

/** Put the settings of the last visit into the form, once the capabilities are here. */
export function restore() {
  const kept = storage.get("settings", {});
  for (const name of FIELDS) if (kept[name] && name !== "model") $(name).value = kept[name];
  rows = (kept.rows ?? []).filter(({ name }) => capabilities.fields[name]);
  $("scheduler").value = kept.scheduler ?? "";
  showRows();
}

export function reset() {
  for (const name of FIELDS) $(name).value = name === "model" ? capabilities.default_model : "";
  rows = [];
  showRows();
  showModel();
  clearErrors();
  $("taken").hidden = true;
  keep();
  $("prompt").focus();
}

function swap() {
  const sides = [$("width"), $("height")];
  const [width, height] = sides.map(side => side.value || side.placeholder);
  Object.assign(sides[0], { value: height });
  Object.assign(sides[1], { value: width });
  keep();
}

$("form").addEventListener("input", keep);
$("model").addEventListener("change", showModel);
$("add").addEventListener("change", addRow);
$("swap").onclick = swap;
$("reset").onclick = reset;
$("taken-close").onclick = () => { $("taken").hidden = true; };
