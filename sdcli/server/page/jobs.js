// Jobs: submitted, followed through their events, cancelled, and found again after a reload.

import { call, events, fetchBlob, present } from "/page/api.js";
import { $, announce, brief, make, storage } from "/page/dom.js";
import { addImage } from "/page/gallery.js";

const STREAMS = 2;  // a browser opens six connections to a server; the other jobs are asked for their state
const POLL = 2000;
const PREVIEWS = 0.4;  // seconds
const jobs = [];  // in the order of their submission
let count = 0;
const over = state => !["queued", "running"].includes(state);

// From the form to the server, and back after a reload

/** Queue a job. `sources` holds what its images are made from, which the server does not give back. */
export async function submit(request, sources) {
  const view = await call("POST", "/v1/jobs", { requests: [request], previews: PREVIEWS });
  add({ id: view.id, prompt: request.prompt, sources, deleted: [] }, view);
  remember();
  announce(view.place ? `Queued, place ${view.place}.` : "Started.");
}

function add(kept, view) {
  const job = { ...kept, order: count++, state: view.state, view, images: {}, last: null, step: null, note: "" };
  jobs.push(job);
  job.card = card(job);
  if (!over(job.state)) $("jobs").append(job.card.element);
  update(job, view);
  pump();
}

/** The jobs of the last visit that the server still has. */
export async function resume() {
  const kept = storage.get("jobs", []);
  const views = await Promise.all(kept.map(({ id }) => call("GET", `/v1/jobs/${id}`).catch(gone)));
  kept.forEach((job, index) => views[index] && add({ sources: {}, ...job }, views[index]));
  remember();
}

/** Nothing, for a job that the server has dropped. */
function gone(error) {
  if (error.status !== 404 && error.status !== 410) throw error;
  return null;
}

/** Keep the ids of the jobs, those of other tabs included. */
function remember() {
  const own = jobs.map(({ id, prompt, deleted, sources }) =>
    ({ id, prompt: brief(prompt, 300), deleted, sources: { name: sources.name, masked: sources.masked } }));
  const others = storage.get("jobs", []).filter(({ id }) => !seen.has(id));
  for (const { id } of own) seen.add(id);
  storage.set("jobs", [...others, ...own].slice(-200));
}
const seen = new Set(storage.get("jobs", []).map(({ id }) => id));

export function forgetImage(job, number) {
  job.deleted.push(number);
  if (job.deleted.length === job.view.images.length) jobs.splice(jobs.indexOf(job), 1);
  remember();
}

// Following: the first jobs by their event streams, the others by their state

function pump() {
  const open = jobs.filter(job => !over(job.state));
  for (const job of open.slice(0, STREAMS)) if (!job.followed) follow(job);
  document.title = open.length ? `${percent(open[0])} · sdcli` : "sdcli";
}

const percent = job => job.state === "queued" ? "waiting" : `${Math.round(100 * (job.progress ?? 0))} %`;

async function follow(job) {
  job.followed = true;
  while (!over(job.state)) {
    job.stream = new AbortController();
    try {
      for await (const { id, data } of events(`/v1/jobs/${job.id}/events`, job.last, job.stream.signal)) {
        job.last = id;
        await handle(job, data);
      }
      update(job, await call("GET", `/v1/jobs/${job.id}`));
    } catch (error) {
      if (error.status) return lost(job, error);
      await present();
    }
  }
}

/** Streams that broke without a word (a computer that slept) begin again where they were. */
addEventListener("serverback", () => jobs.forEach(job => job.stream?.abort()));

async function poll() {
  for (const job of jobs.filter(one => !over(one.state) && !one.followed)) {
    try {
      update(job, await call("GET", `/v1/jobs/${job.id}`));
    } catch (error) {
      if (error.status) lost(job, error);
    }
  }
  setTimeout(poll, POLL);
}
setTimeout(poll, POLL);

/** The server does not know the job any more: it was started again, or the images are dropped. */
function lost(job, error) {
  job.state = "failed";
  show(job, error.status === 404 ? "The server was started again and does not know this job any more." : error.message);
  jobs.splice(jobs.indexOf(job), 1);
  remember();
  pump();
}

async function handle(job, event) {
  if (event.type === "queued" && job.state === "running") return;  // after a reload all events come again
  if (event.type === "queued") job.view.place = event.place;
  if (event.type === "queued" || event.type === "running") return setState(job, event.type);
  if (event.type === "phase") job.step = { phase: event.phase };
  if (event.type === "step") job.step = event;
  if (event.type === "note") job.note = event.text;
  if (event.type === "preview") preview(job, event.url);
  if (event.type === "image" || event.type === "failed" || event.type === "end") {
    return update(job, await call("GET", `/v1/jobs/${job.id}`));
  }
  if (event.type === "step") job.progress = event.progress;
  show(job);
}

/** Take over what the server says of a job. */
function update(job, view) {
  job.view = view;
  job.progress = view.progress;
  view.images.forEach((image, number) => {
    if (image.state === "done" && !job.images[number] && !job.deleted.includes(number)) {
      job.images[number] = addImage(job, number, image);
    }
  });
  setState(job, view.state);
}

function setState(job, state) {
  const before = job.state;
  job.state = state;
  if (!over(state)) {
    if (before !== state) announce(state === "running" ? "Started." : "Queued.");
    show(job);
  } else {
    ended(job, before);
  }
  pump();
}

/** Say how a job ended, once; the card stays only to say what went wrong. */
function ended(job, before) {
  if (over(before)) return;
  const failed = job.view.images.filter(image => image.error && image.state !== "cancelled");
  const count = job.view.images.filter(image => image.state === "done").length;
  const sentences = [...new Set(failed.map(image => image.error))];
  announce(failed.length ? `Failed: ${sentences.join(". ")}` : job.state === "cancelled" ? "Cancelled."
    : `${count === 1 ? "The image is" : `${count} images are`} done.`);
  if (failed.length) show(job, sentences.join("\n"));
  else job.card.element.remove();
}

// The card of a job

function card(job) {
  const picture = make("img", { alt: "Preview of the image", hidden: true });
  const text = make("p", { className: "status" }), bar = make("progress", { ariaLabel: "Progress", max: 1 });
  const note = make("p", { className: "hint" });
  const stop = make("button", { type: "button", onclick: () => dismiss(job) }, "Cancel");
  const prompt = make("p", { className: "prompt", dir: "auto" }, brief(job.prompt, 200) || "(no prompt)");
  const element = make("li", { className: "job" }, make("div", { className: "preview" }, picture),
    make("div", { className: "stack" }, prompt, bar, text, note, stop));
  return { element, picture, text, bar, note, stop };
}

const time = seconds => seconds < 90 ? `${Math.ceil(seconds)} s` : seconds < 5400 ? `${Math.round(seconds / 60)} min`
  : `${(seconds / 3600).toFixed(1)} h`;
const speed = rate => rate >= 1 ? `${rate.toFixed(1)} it/s` : `${(1 / rate).toFixed(1)} s/it`;
const PHASES = { load: "Loading the model", encode: "Reading the prompt", decode: "Decoding" };

function statusOf(job) {
  if (job.state === "queued") return job.view.place ? `Queue place ${job.view.place}` : "Waiting";
  const all = job.view.images.length, done = job.view.images.filter(image => image.state !== "waiting").length;
  const which = all > 1 ? `${done} of ${all} images · ` : "";
  const { step } = job;
  if (!step) return which + "Running";
  if (step.phase) return which + (PHASES[step.phase] ?? step.phase[0].toUpperCase() + step.phase.slice(1));
  const left = step.seconds_left > 0 ? ` · ${time(step.seconds_left)} left` : "";
  return `${which}Step ${step.step} of ${step.steps} · ${speed(step.per_second)}${left}`;
}

/** Draw the card anew; with `error` the job is over, and the card stays until it is closed. */
function show(job, error) {
  const { text, bar, note, stop, element } = job.card;
  element.classList.toggle("running", job.state === "running" && !error);
  text.textContent = error ?? statusOf(job);
  text.classList.toggle("error", Boolean(error));
  bar.hidden = Boolean(error);
  if (job.state === "running") bar.value = job.progress;
  else bar.removeAttribute("value");
  note.textContent = job.note;
  note.hidden = !job.note;
  stop.textContent = error ? "Close" : job.cancelling ? "Cancelling …" : "Cancel";
  stop.disabled = job.cancelling && !error;
  if (error && !element.isConnected) $("jobs").append(element);
  if (job.state === "running" && !error) {
    announce(`${Math.round(100 * job.progress)} percent.`, { progress: true });
    document.title = `${percent(job)} · sdcli`;
  }
}

/** Load the newest preview; while one is loading, those in between are left out. */
async function preview(job, url) {
  if (job.loading) return void (job.next = url);
  job.loading = true;
  try {
    const { picture } = job.card, old = picture.src;
    picture.src = URL.createObjectURL(await fetchBlob(url));
    picture.hidden = false;
    await picture.decode();
    if (old) URL.revokeObjectURL(old);
  } catch { /* it was dropped, or the server is away; the next one comes */ }
  job.loading = false;
  if (job.next && !over(job.state)) preview(job, job.next);
  job.next = null;
}

async function dismiss(job) {
  if (over(job.state)) return job.card.element.remove();
  job.cancelling = true;
  show(job);
  try {
    update(job, await call("DELETE", `/v1/jobs/${job.id}`));
  } catch (error) {
    job.cancelling = false;
    if (error.status) lost(job, error);
  }
}

/** Cancel the job that runs, or else the one that was queued last; whether there was one. */
export function cancelOne() {
  const open = jobs.filter(one => !over(one.state) && !one.cancelling);
  const job = open.find(one => one.state === "running") ?? open.at(-1);
  if (job) dismiss(job);
  return Boolean(job);
}
