"""OpenAI's images API, as the client library of JavaScript sees it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.server.running import RunningServer

PROGRAM = """
import OpenAI, { toFile } from "openai";
const client = new OpenAI({ baseURL: process.argv[2] + "/v1", apiKey: "none" });
const size = (b64) => {
  const png = Buffer.from(b64, "base64");
  return png.readUInt32BE(16) + "x" + png.readUInt32BE(20);
};
const made = await client.images.generate({ prompt: "a fox", model: "tiny", n: 2, seed: 5, num_inference_steps: 3 });
const events = [];
for await (const event of await client.images.generate(
  { prompt: "a fox", model: "tiny", stream: true, partial_images: 2, num_inference_steps: 30 }
)) events.push(event.type + " " + size(event.b64_json));
const image = await toFile(Buffer.from(made.data[0].b64_json, "base64"), "a.png", { type: "image/png" });
const edited = await client.images.edit({ image, prompt: "a fox", model: "tiny" });
let refused;
try { await client.images.generate({ prompt: "a fox", quality: "hd" }); } catch (error) { refused = error.status; }
const models = [];
for await (const model of client.models.list()) models.push(model.id);
console.log(JSON.stringify({
  first: made.data[0].b64_json, seeds: made.data.map((one) => one.seed), events,
  edited: size(edited.data[0].b64_json), refused, model: models[0],
}));
"""


@pytest.mark.slow
def test_the_client_of_javascript_generates_streams_and_edits(server: RunningServer, tmp_path: Path) -> None:
    npm, node = shutil.which("npm"), shutil.which("node")
    if npm is None or node is None:
        pytest.skip("no npm here")
    environment = {**os.environ, "HOME": str(tmp_path)}
    install = [npm, "install", "--no-audit", "--no-fund", "--ignore-scripts", "openai@7"]
    installed = subprocess.run(install, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=170)
    if installed.returncode:
        pytest.skip(f"npm cannot install here: {installed.stderr.strip().splitlines()[-1:]}")
    (tmp_path / "program.mjs").write_text(PROGRAM)
    ran = subprocess.run([node, "program.mjs", server.url], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout)
    assert found["events"] == [*["image_generation.partial_image 64x64"] * 2, "image_generation.completed 64x64"]
    assert (found["seeds"], found["edited"], found["refused"], found["model"]) == ([5, 6], "64x64", 400, "tiny")
