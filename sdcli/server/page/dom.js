// Small helpers for the document. Text goes in as text (append, textContent, properties), never as HTML.

export const $ = id => document.getElementById(id);

export function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

export const brief = (text, most = 120) => text.length > most ? text.slice(0, most) + "…" : text;

export const shown = value => typeof value === "string" ? value : JSON.stringify(value);

/** Show a sentence in an element, or hide it for an empty one. */
export function tell(element, sentence) {
  element.textContent = sentence;
  element.hidden = !sentence;
}

let announced = 0;

/** Say something to screen readers. Progress is said at most every ten seconds. */
export function announce(sentence, { progress = false } = {}) {
  const now = Date.now();
  if (progress && now - announced < 10_000) return;
  announced = now;
  $("live").textContent = sentence;
}

/** What is kept in the browser; without storage (private windows) everything else still works. */
export const storage = {
  get(name, otherwise) {
    try {
      return JSON.parse(localStorage.getItem("sdcli." + name)) ?? otherwise;
    } catch {
      return otherwise;
    }
  },
  set(name, value) {
    try {
      localStorage.setItem("sdcli." + name, JSON.stringify(value));
    } catch { /* full or forbidden */ }
  },
};

export async function copyText(area, status) {
  let copied = true;
  try {
    await navigator.clipboard.writeText(area.value);
  } catch {  // only pages of this machine, or over HTTPS, may use the clipboard
    area.select();
    copied = document.execCommand("copy");
  }
  status.textContent = copied ? "Copied." : "Copy the selected line with the keyboard.";
}

/** A blob as base64 text. */
export async function base64(blob) {
  const url = await new Promise((done, failed) => {
    const reader = Object.assign(new FileReader(), { onload: () => done(reader.result), onerror: failed });
    reader.readAsDataURL(blob);
  });
  return url.slice(url.indexOf(",") + 1);
}

export function save(blob, name) {
  const link = make("a", { href: URL.createObjectURL(blob), download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
}
