// The init image: chosen, pasted or dropped, made small enough for the server, and the mask on it.

import { base64, $, make, tell } from "/page/dom.js";
import { editMask, maskBlob, paintMask } from "/page/mask.js";
import { capabilities, startChanged } from "/page/settings.js";

const KINDS = ["image/png", "image/jpeg", "image/webp"];

let start = null;  // {blob, name, bitmap, operations} or null
export const current = () => start;

/** Take an image file as init image; one that is too large, or of another kind, is drawn anew. */
export async function useStart(file, name = file.name ?? "pasted.png", operations = []) {
  if (!capabilities) return;
  tell($("error-init_image"), "");
  let bitmap;
  try {
    bitmap = await createImageBitmap(file);
  } catch {
    return tell($("error-init_image"), `${name} is not an image that this browser can read.`);
  }
  start = { blob: file, name, bitmap, operations, note: "" };
  const { upload_pixels, body } = capabilities.limits;
  const scale = Math.min(1, Math.sqrt(upload_pixels / (bitmap.width * bitmap.height)));
  if (scale < 1 || !KINDS.includes(file.type) || file.size > body / 2) await redraw(start, scale, body / 2);
  refresh();
}

async function redraw(image, scale, most) {
  const canvas = make("canvas", { width: Math.floor(image.bitmap.width * scale), height: Math.floor(image.bitmap.height * scale) });
  canvas.getContext("2d").drawImage(image.bitmap, 0, 0, canvas.width, canvas.height);
  const blobOf = (...form) => new Promise(done => canvas.toBlob(done, ...form));
  const png = await blobOf("image/png"), small = png.size <= most;
  image.blob = small ? png : await blobOf("image/jpeg", 0.95);
  image.name = image.name.replace(/\.\w+$/, "") + (small ? ".png" : ".jpg");
  image.note = scale < 1 ? `, scaled down from ${image.bitmap.width} × ${image.bitmap.height}` : "";
  image.bitmap = await createImageBitmap(canvas);
}

export function removeStart() {
  start = null;
  refresh();
  $("choose-start").focus();
}

/** The fields of a request that hold the images, as base64 text. */
export async function startFields() {
  if (!start) return {};
  const mask = await maskBlob(start);
  return { init_image: await base64(start.blob), ...(mask ? { mask: await base64(mask) } : {}) };
}

/** Draw the small view, and tell the form the size. */
function refresh() {
  const masked = Boolean(start?.operations.length);
  $("no-start").hidden = Boolean(start);
  $("with-start").hidden = !start;
  $("remove-mask").hidden = !masked;
  $("draw").textContent = masked ? "Edit the mask" : "Draw a mask";
  if (start) {
    const { width, height } = start.bitmap, scale = Math.min(1, 240 / Math.max(width, height));
    const view = $("start-view"), context = view.getContext("2d");
    Object.assign(view, { width: Math.ceil(width * scale), height: Math.ceil(height * scale) });
    context.drawImage(start.bitmap, 0, 0, view.width, view.height);
    if (masked) {
      context.globalAlpha = 0.6;
      context.drawImage(paintMask(start), 0, 0, view.width, view.height);
    }
    view.setAttribute("aria-label", `Init image ${start.name}${masked ? ", with a mask" : ""}`);
    $("start-text").textContent = `${start.name}, ${width} × ${height}${start.note}`;
  }
  startChanged(start && { width: start.bitmap.width, height: start.bitmap.height, masked });
}

$("choose-start").onclick = () => $("start-file").click();
$("start-file").onchange = ({ target }) => {
  if (target.files[0]) useStart(target.files[0]);
  target.value = "";
};
$("remove-start").onclick = removeStart;
$("remove-mask").onclick = () => { start.operations = []; refresh(); $("draw").focus(); };
$("draw").onclick = () => editMask(start, refresh);
document.addEventListener("paste", event => {
  const file = [...event.clipboardData.files].find(one => one.type.startsWith("image/"));
  if (!file) return;
  event.preventDefault();
  useStart(file);
});
