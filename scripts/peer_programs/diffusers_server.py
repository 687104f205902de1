"""An HTTP server of a diffusers pipeline, built as diffusers' guide "Create a server" describes it.

    python scripts/peer_programs/diffusers_server.py MODEL_FOLDER

One pipeline is shared; a request gets a scheduler of its own and runs in a thread of the event loop's pool. The server
prints its address when it is ready. For bench_serve.py, which compares it with `sdcli serve`.
"""

from __future__ import annotations

import asyncio
import base64
import io
import socket
import sys

import torch
import uvicorn
from diffusers import StableDiffusionPipeline
from fastapi import FastAPI
from pydantic import BaseModel


class Wanted(BaseModel):
    """The body of a request."""

    prompt: str
    seed: int = 0
    steps: int
    guidance_scale: float
    size: int


def app_of(folder: str) -> FastAPI:
    """The server of the model in a folder."""
    app = FastAPI()
    shared = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    shared.set_progress_bar_config(disable=True)

    @app.post("/v1/images/generations")
    async def generate(wanted: Wanted) -> dict[str, list[dict[str, str]]]:
        scheduler = shared.scheduler.from_config(shared.scheduler.config)
        pipeline = StableDiffusionPipeline.from_pipe(shared, scheduler=scheduler, vae=shared.vae)
        pipeline.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(wanted.seed)
        settings = {
            "num_inference_steps": wanted.steps, "guidance_scale": wanted.guidance_scale, "generator": generator,
            "height": wanted.size, "width": wanted.size,
        }  # fmt: skip
        loop = asyncio.get_running_loop()
        output = await loop.run_in_executor(None, lambda: pipeline(wanted.prompt, **settings))
        buffer = io.BytesIO()
        output.images[0].save(buffer, "PNG")
        return {"data": [{"b64_json": base64.b64encode(buffer.getvalue()).decode()}]}

    return app


def main() -> None:
    app = app_of(sys.argv[1])
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        print(f"http://127.0.0.1:{listener.getsockname()[1]}", flush=True)
        uvicorn.Server(uvicorn.Config(app, log_level="warning")).run([listener])


if __name__ == "__main__":
    main()
