"""Real processes that fill a cache of latents, slowly, for tests that kill them or let them meet."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.conftest import REPOSITORY

Start = Callable[..., subprocess.Popen[str]]
"""(pause, the folder of the cache, claims) -> a process that prints "ready" when it waits for `begin`."""

FILL = """
import contextlib, sys, time
from pathlib import Path
import numpy as np
from sdcli.vae import autoencoder
from sdcli.data.cache.claims import Claims
from sdcli.data.cache.store import TensorStore
from sdcli.data.cache.fill import fill_latents
from sdcli.data.cache.keys import CacheVae
from sdcli.data.sources import open_images
from sdcli.models.loader import load_model
from sdcli.models.registry import load_registry

model, data, cache, pause, claimed = sys.argv[1:6]
loaded = load_model(load_registry().find(model), device="cpu", dtype="float32", parts=("vae",))
images = open_images(data)
moments = autoencoder.moments
def slow(vae, pixels, **options):
    time.sleep(float(pause))
    return moments(vae, pixels, **options)
autoencoder.moments = slow
store = TensorStore(Path(cache), "latents", shard_bytes=1500)
used = np.arange(len(images))
print("ready", flush=True)
sys.stdin.readline()
vae = CacheVae(loaded.vae, loaded.identity("vae"))
with Claims(Path(cache)) if claimed == "claims" else contextlib.nullcontext() as claims:
    for last in fill_latents(images, used, [(32, 32)] * len(used), vae=vae, store=store, claims=claims):
        if last.encoded == 1:
            print("began", flush=True)
print(last.encoded, last.reused, len(last.latents.items), flush=True)
"""


@contextmanager
def filling_processes(model: Path, folder: Path) -> Iterator[Start]:
    """Starts processes that fill caches below a folder with the images in its `data`; kills those that are left."""
    running: list[subprocess.Popen[str]] = []

    def start(cache: str = "cache", *, pause: float, claims: bool = False) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", FILL, str(model), str(folder / "data"), str(folder / cache)]
        process = subprocess.Popen(
            [*command, str(pause), "claims" if claims else "alone"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
        )
        running.append(process)
        return process

    try:
        yield start
    finally:
        for process in running:
            if process.poll() is None:
                process.kill()
            process.communicate()


def begin(*processes: subprocess.Popen[str]) -> None:
    """Let processes that are ready begin at the same moment."""
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
