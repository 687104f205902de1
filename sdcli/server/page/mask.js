// The mask: strokes on the init image, kept as operations so that they can be undone.

import { $ } from "/page/dom.js";

const COLOURS = ["#e5342b", "#fff"];

let image = null, changed = null, tool = "brush", stroke = null;
let cursor = { x: 0, y: 0 };

// From operations to pixels

/** Apply an operation to a canvas: {kind: "brush" | "erase", size, points}, {kind: "clear"} or {kind: "invert"}. */
function apply(context, operation) {
  const { canvas } = context;
  context.globalCompositeOperation = { erase: "destination-out", invert: "source-out" }[operation.kind] ?? "source-over";
  if (operation.kind === "clear") return context.clearRect(0, 0, canvas.width, canvas.height);
  context.fillStyle = context.strokeStyle = stripes(context);
  if (operation.kind === "invert") return context.fillRect(0, 0, canvas.width, canvas.height);
  Object.assign(context, { lineWidth: operation.size, lineCap: "round", lineJoin: "round" });
  const [[x, y], ...others] = operation.points;
  context.beginPath();
  context.moveTo(x, y);
  context.lineTo(x + 0.01, y);  // a line without length would not be drawn
  for (const point of others) context.lineTo(...point);
  context.stroke();
}

/** Stripes of two colours, which can be seen on an image of any colour. */
function stripes(context) {
  const width = Math.max(2, Math.round(Math.min(context.canvas.width, context.canvas.height) / 60));
  const tile = Object.assign(document.createElement("canvas"), { width: 2 * width, height: 2 * width });
  const pen = tile.getContext("2d");
  COLOURS.forEach((colour, part) => {
    pen.fillStyle = colour;
    for (let row = 0; row < 2 * width; row++) {
      for (let column = 0; column < width; column++) pen.fillRect((row + column + part * width) % (2 * width), row, 1, 1);
    }
  });
  return context.createPattern(tile, "repeat");
}

/** A canvas of the image's size with the mask in stripes on transparent. */
export function paintMask({ bitmap, operations }, canvas = document.createElement("canvas")) {
  Object.assign(canvas, { width: bitmap.width, height: bitmap.height });
  const context = canvas.getContext("2d", { willReadFrequently: true });
  for (const operation of operations) apply(context, operation);
  return canvas;
}

/** Whether anything is painted on a canvas of `paintMask`. */
function isPainted(canvas) {
  const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
  for (let index = 3; index < data.length; index += 4) if (data[index] > 127) return true;
  return false;
}

/** The mask as a PNG, white where to generate and black where to keep; null without one. */
export function maskBlob(start) {
  if (!start.operations.length) return null;
  const canvas = paintMask(start), context = canvas.getContext("2d"), { width, height } = canvas;
  context.globalCompositeOperation = "source-in";
  context.fillStyle = "white";
  context.fillRect(0, 0, width, height);
  context.globalCompositeOperation = "destination-over";
  context.fillStyle = "black";
  context.fillRect(0, 0, width, height);
  return new Promise(done => canvas.toBlob(done, "image/png"));
}

// The editor

export function editMask(start, onChange) {
  [image, changed] = [start, onChange];
  const { width, height } = start.bitmap, backdrop = $("backdrop");
  Object.assign(backdrop, { width, height });
  backdrop.getContext("2d").drawImage(start.bitmap, 0, 0);
  cursor = { x: width / 2, y: height / 2 };
  draw();
  $("mask-editor").showModal();
  fit();
  $("mask").focus();
}

const draw = () => paintMask(image, $("mask"));
const say = sentence => { $("mask-live").textContent = sentence; };

/** The largest size of the image's proportions that the window has room for. */
function fit() {
  if (!image) return;
  const { width, height } = image.bitmap, { clientWidth } = $("mask-editor");
  const scale = Math.min((clientWidth - 32) / width, Math.max(160, innerHeight - 230) / height);
  Object.assign($("easel").style, { width: `${width * scale}px`, height: `${height * scale}px` });
}

/** The diameter of the brush in pixels of the image: a share of its shorter side. */
const brushSize = () => {
  const { width, height } = image.bitmap;
  return Math.max(1, Math.min(width, height) * (Number($("brush-size").value) / 100) ** 1.5 * 0.8);
};

function pick(next) {
  tool = next;
  for (const name of ["brush", "erase"]) $(name).setAttribute("aria-pressed", String(name === tool));
}

function perform(operation) {
  image.operations.push(operation);
  draw();
}

function undo() {
  const gone = image.operations.pop();
  draw();
  say(gone ? "Undone." : "There is nothing to undo.");
}

function clear() {
  if (image.operations.length) perform({ kind: "clear" });
  say("The mask is empty.");
}

function pointOf(event) {
  const box = $("mask").getBoundingClientRect(), { width, height } = image.bitmap;
  return [(event.clientX - box.left) * width / box.width, (event.clientY - box.top) * height / box.height];
}

function extend(points) {
  stroke.points.push(...points);
  const recent = { ...stroke, points: stroke.points.slice(-points.length - 1) };
  apply($("mask").getContext("2d"), recent);
}

function begin(point) {
  stroke = { kind: tool, size: brushSize(), points: [] };
  image.operations.push(stroke);
  extend([point]);
}

function showCursor() {
  const { width } = image.bitmap, scale = $("mask").clientWidth / width, size = brushSize() * scale;
  Object.assign($("cursor").style, { width: `${size}px`, height: `${size}px`,
    left: `${cursor.x * scale - size / 2}px`, top: `${cursor.y * scale - size / 2}px` });
  $("cursor").hidden = false;
}

function moved(event) {
  const events = event.getCoalescedEvents?.() ?? [];
  const points = (events.length ? events : [event]).map(pointOf);
  [cursor.x, cursor.y] = points.at(-1);
  showCursor();
  if (stroke) extend(points);
}

// Keys

const MOVES = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };

function pressed(event) {
  if (event.key === "z" && (event.ctrlKey || event.metaKey)) undo();
  else if (event.ctrlKey || event.metaKey || event.altKey) return;
  else if (event.key === "b") pick("brush");
  else if (event.key === "e") pick("erase");
  else if ("[]".includes(event.key)) resize(event.key === "]" ? 5 : -5);
  else if (event.target !== $("mask")) return;
  else if (MOVES[event.key]) walk(...MOVES[event.key]);
  else if (event.key === " ") dab();
  else return;
  event.preventDefault();
}

function resize(by) {
  $("brush-size").value = Number($("brush-size").value) + by;
  showCursor();
  say(`Brush ${Math.round(brushSize())} pixels.`);
}

function walk(x, y) {
  const { width, height } = image.bitmap, step = Math.max(1, brushSize() / 2);
  cursor = { x: Math.min(width, Math.max(0, cursor.x + x * step)), y: Math.min(height, Math.max(0, cursor.y + y * step)) };
  showCursor();
  if (stroke) extend([[cursor.x, cursor.y]]);
  say(`${Math.round(100 * cursor.x / width)} % across, ${Math.round(100 * cursor.y / height)} % down.`);
}

function dab() {
  if (!stroke) begin([cursor.x, cursor.y]);
  say(tool === "brush" ? "Painted." : "Erased.");
}

const surface = $("mask");
surface.onpointerdown = event => {
  if (event.button !== 0) return;
  surface.setPointerCapture(event.pointerId);
  begin(pointOf(event));
  moved(event);
};
surface.onpointermove = moved;
surface.onpointerup = surface.onpointercancel = surface.onblur = () => { stroke = null; };
surface.onpointerleave = () => { $("cursor").hidden = true; };
surface.onfocus = () => { if (image && $("mask-editor").open && surface.matches(":focus-visible")) showCursor(); };
$("mask-editor").addEventListener("keydown", pressed);
$("mask-editor").addEventListener("keyup", event => { if (event.key === " ") stroke = null; });
$("mask-editor").onclose = () => {
  if (!isPainted($("mask"))) image.operations.length = 0;
  stroke = image = null;
  changed();
};
$("brush").onclick = () => pick("brush");
$("erase").onclick = () => pick("erase");
$("undo").onclick = undo;
$("invert").onclick = () => { perform({ kind: "invert" }); say("Inverted."); };
$("clear").onclick = clear;
addEventListener("resize", fit);
