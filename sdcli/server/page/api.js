// The server: requests with the token, its sentences as errors, events of jobs, and what happens when it is away.

import { $, tell } from "/page/dom.js";

/** An answer that is an error: the server's sentence, and its status (0: it did not answer). */
export class Refusal extends Error {
  constructor(status, sentence, param = null) {
    super(sentence);
    Object.assign(this, { status, param });
  }
}

const AWAY = "The server does not answer. Is `sdcli serve` still running?";

/** JSON whose seeds may be larger than JavaScript's numbers can tell apart: those become text. */
export const parse = text => JSON.parse(text.replace(/"((?:variation_)?seed)":\s*(\d{16,})(?=[,}\s])/g, '"$1":"$2"'));

// The token

const KEY = "sdcli.token";
let token = sessionStorage.getItem(KEY) ?? localStorage.getItem(KEY);
let asking = null;

/** Ask for the token; however many requests need it, once. */
function askToken(wrong) {
  asking ??= new Promise((done, failed) => {
    tell($("token-error"), wrong ? "The server does not accept this token." : "");
    $("token").value = "";
    $("token-dialog").showModal();
    $("token-form").onsubmit = () => {
      token = $("token").value.trim();
      sessionStorage.setItem(KEY, token);
      if ($("token-keep").checked) localStorage.setItem(KEY, token);
      else localStorage.removeItem(KEY);
      done();
    };
    $("token-dialog").onclose = () => failed(new Refusal(401, "This server needs a token; reload the page to enter it."));
  }).finally(() => { asking = null; });
  return asking;
}

// Requests

async function send(path, options) {
  const used = token;
  const headers = { ...options.headers, ...(used ? { authorization: `Bearer ${used}` } : {}) };
  let answer;
  try {
    answer = await fetch(path, { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    away();
    throw new Refusal(0, AWAY);
  }
  if (answer.status === 401) {
    if (used === token) await askToken(Boolean(used));
    return send(path, options);
  }
  if (!answer.ok) throw await refusal(answer);
  return answer;
}

async function refusal(answer) {
  const { error } = await answer.json().catch(() => ({}));
  return new Refusal(answer.status, error?.message ?? `The server answered ${answer.status}.`, error?.param ?? null);
}

export async function call(method, path, body) {
  const options = { method, headers: {} };
  if (body !== undefined) Object.assign(options, { body: JSON.stringify(body), headers: { "content-type": "application/json" } });
  return parse(await (await send(path, options)).text());
}

export async function fetchBlob(path) {
  return (await send(path, {})).blob();
}

/** The events of a job from the one after `last` on: {id, data}. */
export async function* events(path, last, signal) {
  const headers = last === null ? {} : { "last-event-id": last };
  const answer = await send(path, { headers, signal });
  let rest = "";
  try {
    for await (const text of texts(answer.body)) {
      rest += text;
      const blocks = rest.split(/\r?\n\r?\n/);
      rest = blocks.pop();
      yield* blocks.map(eventOf).filter(event => event.data !== undefined);
    }
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refusal(0, AWAY);
  }
}

async function* texts(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  try {
    for (let part = await soon(reader.read()); !part.done; part = await soon(reader.read())) yield part.value;
  } finally {
    reader.cancel().catch(() => {});
  }
}

/** A stream without a word for so long is broken: the server says something every 15 seconds. */
const QUIET = 45_000;

function soon(promise) {
  let timer;
  const late = new Promise((_, failed) => { timer = setTimeout(() => failed(new Error("a broken stream")), QUIET); });
  return Promise.race([promise, late]).finally(() => clearTimeout(timer));
}

function eventOf(block) {
  const event = { id: null, data: undefined };
  for (const line of block.split(/\r?\n/)) {
    const [, name, value] = /^([a-z]+): ?(.*)$/.exec(line) ?? [];
    if (name === "id") event.id = value;
    if (name === "data") event.data = parse(value);
  }
  return event;
}

// A server that is away

let waiting = null;

/** Say that the server is away, and ask until it is back. */
export function away() {
  waiting ??= (async () => {
    tell($("connection"), "The server does not answer. Trying again …");
    for (let pause = 500; ; pause = Math.min(pause * 1.6, 10_000)) {
      await new Promise(done => setTimeout(done, pause));
      if (await fetch("/healthz").then(answer => answer.ok, () => false)) break;
    }
    tell($("connection"), "");
    waiting = null;
    dispatchEvent(new Event("serverback"));
  })();
  return waiting;
}

/** Resolves at once, or when the server answers again. */
export const present = () => waiting ?? Promise.resolve();
