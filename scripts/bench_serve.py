"""Measure `sdcli serve` under load and faults: throughput, waits, cancels, killed workers, slow readers, memory.

    python scripts/bench_serve.py                                        about five minutes
    python scripts/bench_serve.py --seconds 60 --cancels 1000 --kills 20 --images 5000

Before and after each load the model generates in a loop without a server; the throughput of the server is a share of
the mean of both, because the speed of a machine changes. A load is so many clients, each of which submits a job of one
image, follows its events, and fetches the file, over and over. What must hold (no failed job below the limit of the
queue, the bytes after all that happened are those before) is checked; the exit code is 1 where it does not.

The part "peer" loads the starter's own folder into a server of diffusers' pipeline (peer_programs/diffusers_server.py),
and measures both servers in turns, with the same clients, prompts, seeds, steps, guidance and size.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import hashlib
import itertools
import json
import os
import platform
import random
import re
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
from bench_startup import highest_memory

ROOT = Path(__file__).resolve().parent.parent
SDCLI = [sys.executable, "-m", "sdcli"]
PARTS = ("loads", "peer", "faults")
PEER = ROOT / "scripts" / "peer_programs" / "diffusers_server.py"
STARTER = {"steps": 10, "guidance_scale": 3.0, "size": 256}
"""The starter's defaults, which sdcli's requests leave out."""
QUEUE = 24
"""--max-queue of the servers: 64 clients exceed it, 16 do not."""

# The same images by the generation service in a loop, with the same work afterwards: metadata and PNG.
LOOP = """
import json, sys, time
from sdcli.generation.model_cache import ModelCache
from sdcli.generation.plan import Batch
from sdcli.generation.provenance import provenance
from sdcli.generation.resolve.jobs import expand
from sdcli.generation.events import Generated
from sdcli.generation.run_batch import run_batch
from sdcli.generation.settings import RunSettings
from sdcli.images.pixels import from_pixels
from sdcli.images.image_files import pixels_digest
from sdcli.metadata.embed import image_bytes
from sdcli.metadata.record import Record
from sdcli.models.registry import load_registry
from sdcli.request.jobs import Line
from sdcli.io.devices import keep_freed_memory

keep_freed_memory()
cache, registry = ModelCache(RunSettings(device="cpu")), load_registry()

def generate(number):
    fields = {"model": sys.argv[1], "prompt": f"a fox {number}", "seed": number}
    (job,) = expand([Line(0, fields)], {}, registry, num_images=1, base_seed=0)
    with cache.lease(job) as lease:
        for event in run_batch(lease, Batch.of([job])):
            if isinstance(event, Generated):
                image = from_pixels(event.pixels)
                facts = provenance(lease.pipeline, batch={"size": 1, "index": 0}, fallbacks=())
                image_bytes(image, "png", Record(job.request, {**facts, "pixels": pixels_digest(image)}))

generate(0)
print(flush=True)
for line in sys.stdin:
    count, began = 0, time.monotonic()
    while time.monotonic() - began < float(line):
        count += 1
        generate(count)
    print(count / (time.monotonic() - began), flush=True)
"""


class Loop:
    """The process that generates without a server, for so many seconds whenever it is told to."""

    def __init__(self, model: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", LOOP, model], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        self._answer()

    def images_per_second(self, seconds: float) -> float:
        assert self._process.stdin is not None
        print(seconds, file=self._process.stdin, flush=True)
        return float(self._answer())

    def close(self) -> None:
        self._process.kill()
        self._process.wait()

    def _answer(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline()


class BenchServer:
    """A server process for the time of a `with` block."""

    def __init__(self, folder: Path, *options: str) -> None:
        command = [*SDCLI, "serve", "--port", "0", "--max-queue", str(QUEUE), *options]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "HOME": str(folder), "XDG_RUNTIME_DIR": str(folder)}
        self._log = (folder / "serve.log").open("ab")
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=self._log, text=True, env=environment, cwd=folder
        )

    async def __aenter__(self) -> BenchServer:
        assert self.process.stdout is not None
        url = await asyncio.to_thread(self.process.stdout.readline)
        limits = httpx.Limits(max_connections=200, max_keepalive_connections=200)
        self.http = httpx.AsyncClient(base_url=url.strip(), timeout=300, limits=limits)
        self.port = int(url.rpartition(":")[2])
        while (await self.http.get("/readyz")).status_code != 200:
            assert self.process.poll() is None, "the server has ended"
            await asyncio.sleep(0.05)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.http.aclose()
        self.process.send_signal(signal.SIGTERM)
        try:
            await asyncio.to_thread(self.process.wait, 60)
        finally:
            self.process.kill()
            self._log.close()

    @property
    def workers(self) -> list[int]:
        own = self.process.pid
        children = Path(f"/proc/{own}/task/{own}/children").read_text().split()
        return [int(pid) for pid in children if "spawn_main" in Path(f"/proc/{pid}/cmdline").read_text()]

    async def submit(self, **fields: Any) -> httpx.Response:
        body = {name: fields.pop(name) for name in ("cancel_on_disconnect", "previews") if name in fields}
        return await self.http.post("/v1/jobs", json={"requests": fields, **body})

    async def events(self, id: str) -> AsyncIterator[dict[str, Any]]:
        async with self.http.stream("GET", f"/v1/jobs/{id}/events") as stream:
            async for line in stream.aiter_lines():
                if line.startswith("data:"):
                    yield json.loads(line[5:])

    async def state(self, id: str) -> str:
        """The final state of a job, awaited."""
        async for event in self.events(id):
            if event["type"] == "end":
                return str(event["state"])
        return "lost"

    async def digest(self, **fields: Any) -> str:
        """The SHA-256 of the file of one image."""
        id = (await self.submit(**fields)).json()["id"]
        assert await self.state(id) == "done"
        return hashlib.sha256((await self.http.get(f"/v1/jobs/{id}/images/0")).content).hexdigest()

    async def memory(self) -> dict[str, float]:
        """Resident memory of each process, in MiB."""
        text = (await self.http.get("/metrics")).text
        found = re.findall(r'sdcli_memory_bytes\{process="([^"]+)"\} (\S+)', text)
        return {name: round(float(value) / 2**20, 1) for name, value in found}


async def busy(clients: int, seconds: float, one: Callable[[int], Awaitable[bool]]) -> float:
    """So many clients for so long, each calling `one` with new numbers; the seconds until the last true result."""
    numbers = itertools.count(1)
    began = ended = time.monotonic()

    async def client() -> None:
        nonlocal ended
        while time.monotonic() - began < seconds:
            if await one(next(numbers)):
                ended = time.monotonic()

    await asyncio.gather(*(client() for _ in range(clients)))
    return ended - began


async def load(server: BenchServer, model: str, clients: int, seconds: float) -> dict[str, Any]:
    """So many clients for so long: images a second, states of jobs, refusals, and waits."""
    states: Counter[str] = Counter()
    waits: list[float] = []
    refused = 0

    async def one(number: int) -> bool:
        nonlocal refused
        submitted = time.monotonic()
        answer = await server.submit(model=model, prompt=f"a fox {number}", seed=number)
        if answer.status_code == 429:
            assert int(answer.headers["retry-after"]) >= 1
            refused += 1
            await asyncio.sleep(random.uniform(0.2, 1.0))
            return False
        id = answer.json()["id"]
        state = "lost"
        async for event in server.events(id):
            if event["type"] == "running":
                waits.append(time.monotonic() - submitted)
            elif event["type"] == "end":
                state = event["state"]
        if state == "done":
            file = await server.http.get(f"/v1/jobs/{id}/images/0")
            state = "done" if file.content.startswith(b"\x89PNG") else "no file"
        states[state] += 1
        return True

    took = await busy(clients, seconds, one)
    return {
        "clients": clients,
        "images_per_second": round(states["done"] / took, 3),
        "done": states.pop("done", 0),
        "failed": dict(states),
        "refused": refused,
        "wait_p50": round(statistics.median(waits), 3) if waits else None,
        "wait_p95": round(sorted(waits)[int(len(waits) * 0.95)], 3) if waits else None,
    }


async def cancels(server: BenchServer, model: str, count: int) -> dict[str, Any]:
    """Jobs that are cancelled or whose clients vanish at random moments; the states that they end in."""
    outcomes: Counter[str] = Counter()
    gate = asyncio.Semaphore(16)

    async def one(number: int) -> None:
        async with gate:
            how = random.choice(["delete", "delete one image", "disconnect", "tied disconnect"])
            fields = {"model": model, "prompt": "x", "seed": number, "steps": 20, "num_images": 2}
            answer = await server.submit(**fields, cancel_on_disconnect=how == "tied disconnect")
            if answer.status_code != 202:
                outcomes[f"refused {answer.status_code}"] += 1
                return
            id = answer.json()["id"]
            await asyncio.sleep(random.uniform(0, 0.5))
            if how == "delete":
                await asyncio.gather(*(server.http.delete(f"/v1/jobs/{id}") for _ in range(2)))
            elif how == "delete one image":
                await server.http.delete(f"/v1/jobs/{id}/images/{random.randrange(2)}")
            else:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(random.uniform(0.01, 0.4)):
                        async for _ in server.events(id):
                            pass
            outcomes[f"{how}: {await server.state(id)}"] += 1

    await asyncio.gather(*(one(number) for number in range(count)))
    return dict(sorted(outcomes.items()))


async def kills(server: BenchServer, model: str, count: int) -> dict[str, Any]:
    """Workers killed by SIGKILL while four clients generate; what became of the jobs."""
    states: Counter[str] = Counter()
    stop = False

    async def client() -> None:
        while not stop:
            answer = await server.submit(model=model, prompt="x", seed=random.randrange(1000), steps=40)
            states[await server.state(answer.json()["id"])] += 1

    clients = [asyncio.create_task(client()) for _ in range(4)]
    for _ in range(count):
        await asyncio.sleep(1.5)
        while not (alive := server.workers):
            await asyncio.sleep(0.1)
        os.kill(random.choice(alive), signal.SIGKILL)
    await asyncio.sleep(3)
    stop = True
    await asyncio.gather(*clients)
    return {"killed": count, **states}


async def slow_reader(server: BenchServer, model: str, seconds: float) -> dict[str, Any]:
    """Images a second of one client, alone and beside a client that follows a long job without reading."""
    alone = await load(server, model, 1, seconds)
    id = (await server.submit(model=model, prompt="x", steps=200, num_images=2)).json()["id"]
    with socket.create_connection(("127.0.0.1", server.port)) as reader:
        reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        reader.sendall(f"GET /v1/jobs/{id}/events HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        assert await server.state(id) == "done"
        beside = await load(server, model, 1, seconds)
    return {"alone": alone["images_per_second"], "beside": beside["images_per_second"]}


async def memory(server: BenchServer, model: str, images: int) -> dict[str, Any]:
    """Resident memory after a tenth of the images, and after all."""
    done = 0
    marks: dict[str, dict[str, float]] = {}

    async def client() -> None:
        nonlocal done
        while done < images:
            done += 1
            answer = await server.submit(model=model, prompt=f"a fox {done}", seed=done)
            assert await server.state(answer.json()["id"]) == "done"
            if done >= images // 10 and "tenth" not in marks:
                marks["tenth"] = await server.memory()

    await asyncio.gather(*(client() for _ in range(4)))
    return {"images": images, "mib_after_a_tenth": marks["tenth"], "mib_after_all": await server.memory()}


class PeerServer:
    """diffusers' server of the starter for the time of a `with` block."""

    def __init__(self, folder: Path) -> None:
        self._log = (folder / "peer.log").open("ab")
        command = [sys.executable, str(PEER), str(ROOT / "sdcli" / "starter")]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=self._log, text=True)

    async def __aenter__(self) -> PeerServer:
        assert self.process.stdout is not None
        url = await asyncio.to_thread(self.process.stdout.readline)
        self.http = httpx.AsyncClient(base_url=url.strip(), timeout=600, transport=httpx.AsyncHTTPTransport(retries=5))
        await self.image("a fox", 0)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.http.aclose()
        self.process.terminate()
        await asyncio.to_thread(self.process.wait)
        self._log.close()

    async def image(self, prompt: str, seed: int) -> bytes:
        """The PNG file of one image. Raises HTTPStatusError."""
        answer = await self.http.post("/v1/images/generations", json={"prompt": prompt, "seed": seed, **STARTER})
        answer.raise_for_status()
        return base64.b64decode(answer.json()["data"][0]["b64_json"])


async def load_peer(server: PeerServer, clients: int, seconds: float) -> dict[str, Any]:
    """As `load`: so many clients for so long, each with one image after the other."""
    times: list[float] = []
    failed: Counter[str] = Counter()

    async def one(number: int) -> bool:
        submitted = time.monotonic()
        try:
            assert (await server.image(f"a fox {number}", number)).startswith(b"\x89PNG")
        except httpx.HTTPError as error:
            failed[type(error).__name__] += 1
            return False
        times.append(time.monotonic() - submitted)
        return True

    took = await busy(clients, seconds, one)
    return {
        "clients": clients,
        "images_per_second": round(len(times) / took, 3) if times else 0.0,
        "failed": dict(failed),
        "seconds_p50": round(statistics.median(times), 3) if times else None,
        "seconds_p95": round(sorted(times)[int(len(times) * 0.95)], 3) if times else None,
        "highest_mib": round(highest_memory(server.process.pid) / 2**20, 1),
    }


async def measure_peer(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The loads of both servers in turns; the other one waits meanwhile."""
    rows: list[dict[str, Any]] = []
    async with (
        BenchServer(folder, "--device", options.device, "--model", "starter", "--keep", "5", *options.serve) as own,
        PeerServer(folder) as peer,
    ):
        for clients in (number for number in options.clients if number <= QUEUE):  # above, sdcli refuses some
            mine = await load(own, "starter", clients, options.seconds)
            other = await load_peer(peer, clients, options.seconds)
            ratio = round(mine["images_per_second"] / other["images_per_second"], 2)
            rows.append({"sdcli": mine | {"mib": await own.memory()}, "peer": other, "ratio": ratio})
            print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
        images = await asyncio.gather(*(peer.image("a fox", 7) for _ in range(6)))
    return {"loads": rows, "peer_files_of_one_seed": len({hashlib.sha256(image).hexdigest() for image in images})}


def problems_of(result: dict[str, Any]) -> list[str]:
    """What should have held and did not."""
    found = []
    for name, model in result.get("models", {}).items():
        for row in model["loads"]:
            if row["failed"] or (row["refused"] and row["clients"] <= QUEUE):
                found.append(f"{name}, {row['clients']} clients: {row['failed']} failed, {row['refused']} refused")
        if model["bytes"] != "equal":
            found.append(f"{name}: {model['bytes']}")
    cancelled = result.get("cancels", {})
    found += [f"cancels: {outcome}" for outcome in cancelled if "lost" in outcome or "failed" in outcome]
    killed = result.get("kills", {"killed": 0})
    if killed.get("failed", 0) > killed["killed"]:
        found.append(f"{killed['failed']} jobs failed by {killed['killed']} killed workers")
    return found


async def measure_loads(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Each model in a loop without a server, and by so many clients."""
    result: dict[str, Any] = {}
    for model in options.models:
        row: dict[str, Any] = {"loads": []}
        result[model] = row
        loop = Loop(model)
        async with BenchServer(folder, "--device", "cpu", "--model", model, "--keep", "5") as server:
            one = {"model": model, "prompt": "a fox", "seed": 7}
            before = await server.digest(**one)
            after = loop.images_per_second(options.seconds / 2)
            for clients in options.clients:
                first = after
                found = await load(server, model, clients, options.seconds)
                after = loop.images_per_second(options.seconds / 2)
                found["loop_before_and_after"] = [round(first, 3), round(after, 3)]
                found["share_of_loop"] = round(2 * found["images_per_second"] / (first + after), 3)
                row["loads"].append(found)
                print(json.dumps({"model": model, **found}), file=sys.stderr, flush=True)
            loop.close()
            row["bytes"] = "equal" if await server.digest(**one) == before else "not the same after the load"
    return result


async def measure_faults(options: argparse.Namespace, folder: Path) -> AsyncIterator[tuple[str, dict[str, Any]]]:
    """What the first model's server makes of cancels, slow readers, many images and killed workers."""
    model = options.models[0]
    one = {"model": model, "prompt": "a fox", "seed": 7}
    async with BenchServer(folder, "--device", "cpu", "--model", model, "--keep", "5") as server:
        before = await server.digest(**one)
        yield "cancels", await cancels(server, model, options.cancels)
        yield "slow_reader", await slow_reader(server, model, options.seconds)
        yield "memory", await memory(server, model, options.images)
        assert await server.digest(**one) == before
    async with BenchServer(folder, "--device", "cpu:2", "--model", model, "--keep", "5") as server:
        yield "kills", await kills(server, model, options.kills)
        while len(server.workers) < 2:
            await asyncio.sleep(0.1)
        assert await server.digest(**one) == before


async def measure(options: argparse.Namespace) -> dict[str, Any]:
    result: dict[str, Any] = {}
    if options.json is not None and options.json.exists():  # the parts can be measured one after the other
        result = json.loads(options.json.read_text(encoding="utf-8"))
    result |= {
        "machine": options.machine,
        "python": platform.python_version(),
        "threads": os.environ.get("OMP_NUM_THREADS", "torch's own choice"),
        "seconds": options.seconds if "loads" in options.parts else result.get("seconds"),
        "max_queue": QUEUE,
    }
    with tempfile.TemporaryDirectory() as name:
        if "loads" in options.parts:
            result["models"] = await measure_loads(options, Path(name))
        if "peer" in options.parts:
            result["peer"] = await measure_peer(options, Path(name))
        if "faults" in options.parts:
            async for part, found in measure_faults(options, Path(name)):
                result[part] = found
                print(json.dumps({part: found}), file=sys.stderr, flush=True)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--models", nargs="+", default=["tiny", "starter"])
    parser.add_argument("--clients", nargs="+", type=int, default=[1, 4, 16, 64])
    parser.add_argument("--seconds", type=float, default=6, help="of each load")
    parser.add_argument("--cancels", type=int, default=100, help="jobs that are cancelled or deserted")
    parser.add_argument("--kills", type=int, default=3, help="workers that are killed")
    parser.add_argument("--images", type=int, default=300, help="images while memory is watched")
    parser.add_argument("--device", default="cpu", help="--device of sdcli serve in the part peer (%(default)s)")
    parser.add_argument(
        "--serve",
        action="append",
        default=[],
        metavar="OPTION",
        help="another option of it, as --serve=--batch-wait=50",
    )
    parser.add_argument("--machine", default=platform.processor() or platform.machine())
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there, too")
    options = parser.parse_args()
    result = asyncio.run(measure(options))
    text = json.dumps(result, indent=2)
    print(text)
    if options.json is not None:
        options.json.write_text(text + "\n", encoding="utf-8")
    problems = problems_of(result)
    for problem in problems:
        print(problem, file=sys.stderr)
    sys.exit(1 if problems else 0)


if __name__ == "__main__":
    main()
